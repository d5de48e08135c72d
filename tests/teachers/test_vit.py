"""timm's ViTs as teachers, and what the base of all teachers promises."""

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from refusals import refused
from safetensors.torch import save_file
from teaching import ARCH
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor

from hgkd.distillers import MaskedDistiller
from hgkd.errors import WeightsError
from hgkd.networks.mae import MaskedAutoencoder, make_arch, save_mae
from hgkd.registry import MODELS
from hgkd.structures import TeacherNeeds
from hgkd.teachers import MAETeacher, Teacher, base
from hgkd.teachers.described import vit_of
from hgkd.teachers.vit import TimmTeacher, load_vit

SMALL: dict[str, Any] = {"depth": 3, "embed_dim": 32, "num_heads": 2, "img_size": 64}
PATCH = 16


def _teacher(name: str = "vit_tiny_patch16_224", **kwargs: Any) -> TimmTeacher:
    return TimmTeacher(name, allow_random=True, **{**SMALL, **kwargs})


def _with_positions(teacher: TimmTeacher) -> TimmTeacher:
    """Positions large enough that a wrong one shows."""
    teacher.family.native_positions = torch.randn_like(teacher.family.native_positions)
    return teacher


def _normalised(teacher: TimmTeacher, images: Tensor) -> Tensor:
    cfg = timm.create_model("vit_tiny_patch16_224", **SMALL).pretrained_cfg
    mean, std = (torch.tensor(cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return (images - mean) / std


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vit_tiny_patch16_224", {}),
        ("deit_tiny_distilled_patch16_224", {}),  # two prefix tokens
        ("deit3_small_patch16_224", {}),  # positions without the class token
        ("vit_tiny_patch16_224", {"reg_tokens": 4, "no_embed_class": True}),  # DINOv2 with registers
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg", "reg_tokens": 2}),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
        ("vit_base_patch16_clip_224", {}),  # a norm before the blocks, mean and std of its own
    ],
)
def test_tokens_are_those_of_timm_itself(name: str, kwargs: dict[str, Any]) -> None:
    teacher = _teacher(name, **kwargs)
    assert teacher.prepare((4, 4), PATCH) == (4, 4)
    images = torch.rand(2, 3, 64, 64)
    out = teacher(images, None, TeacherNeeds(blocks=(0, 2)))
    reference = timm.create_model(name, num_classes=0, **{**SMALL, **kwargs}).eval()
    reference.load_state_dict(teacher.network.state_dict(), strict=False)  # it has a final norm
    cfg: Any = reference.pretrained_cfg
    inputs = (images - torch.tensor(cfg["mean"]).view(3, 1, 1)) / torch.tensor(cfg["std"]).view(3, 1, 1)
    with torch.no_grad():
        expected = reference.forward_intermediates(
            inputs, indices=[0, 2], norm=False, return_prefix_tokens=True, intermediates_only=True
        )
    for block, (tokens, _) in zip((0, 2), expected, strict=True):
        torch.testing.assert_close(out.tokens[block], tokens, rtol=0, atol=1e-6)
    if reference.has_class_token:
        torch.testing.assert_close(out.cls, expected[-1][1][:, 0], rtol=0, atol=1e-6)
    else:
        assert out.cls is None
    assert out.grid == (4, 4)


def test_no_block_beyond_the_deepest_asked_for_is_run() -> None:
    teacher = _teacher()
    teacher.prepare((2, 2), PATCH)
    runs: list[int] = []
    for i, block in enumerate(teacher.network.blocks):
        block.register_forward_hook(lambda *_, i=i: runs.append(i))
    out = teacher(torch.rand(1, 3, 32, 32), None, TeacherNeeds(blocks=(1,)))
    assert runs == [0, 1]
    assert set(out.tokens) == {1}


def test_visible_only_equals_a_run_on_the_visible_tokens() -> None:
    teacher = _with_positions(_teacher())
    teacher.prepare((2, 2), 2 * PATCH)  # two tokens a cell side
    visible = torch.tensor([[[True, False], [False, True]], [[False, True], [True, False]]])
    images = torch.rand(2, 3, 64, 64)
    out = teacher(images, visible, TeacherNeeds(blocks=(2,), visible_only=True)).tokens[2]
    network: Any = teacher.network
    with torch.no_grad():
        for i in range(2):  # one image at a time, patches picked one by one
            x = network.patch_embed(_normalised(teacher, images[i : i + 1])) + network.pos_embed[:, 1:]
            places = [(r, c) for r in range(4) for c in range(4) if visible[i, r // 2, c // 2]]
            x = torch.stack([x[0, 4 * r + c] for r, c in places])[None]
            x = torch.cat([network.cls_token + network.pos_embed[:, :1], x], 1)
            for block in network.blocks:
                x = block(x)
            for n, (r, c) in enumerate(places):
                torch.testing.assert_close(out[i, :, r, c], x[0, 1 + n], rtol=1e-5, atol=1e-5)
            hidden = [(r, c) for r in range(4) for c in range(4) if not visible[i, r // 2, c // 2]]
            assert all(bool((out[i, :, r, c] == 0).all()) for r, c in hidden)


def test_visible_only_does_not_see_hidden_pixels_and_whole_images_do() -> None:
    teacher = _teacher()
    teacher.prepare((4, 4), PATCH)
    visible = torch.rand(2, 4, 4) < 0.5
    visible[:, 0, 0] = True
    images = torch.rand(2, 3, 64, 64)
    pixels = visible[:, None].repeat_interleave(16, 2).repeat_interleave(16, 3)
    changed = torch.where(pixels, images, torch.rand_like(images))
    needs = TeacherNeeds(blocks=(2,), visible_only=True)
    torch.testing.assert_close(teacher(images, visible, needs).tokens[2], teacher(changed, visible, needs).tokens[2])
    whole = TeacherNeeds(blocks=(2,))
    assert not torch.allclose(teacher(images, visible, whole).tokens[2], teacher(changed, visible, whole).tokens[2])


def test_images_with_different_numbers_of_visible_cells_equal_one_by_one() -> None:
    teacher = _teacher()
    teacher.prepare((4, 4), PATCH)
    visible = torch.zeros(3, 4, 4, dtype=torch.bool)
    visible[0, 0], visible[1, :2], visible[2, 3] = True, True, True
    images, needs = torch.rand(3, 3, 64, 64), TeacherNeeds(blocks=(0, 2), visible_only=True)
    together = teacher(images, visible, needs)
    for i in range(3):
        alone = teacher(images[i : i + 1], visible[i : i + 1], needs)
        for block in (0, 2):
            torch.testing.assert_close(together.tokens[block][i], alone.tokens[block][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(together.cls[i], alone.cls[0], rtol=1e-5, atol=1e-5)


def test_frozen_in_eval_and_without_gradient_whatever_is_called() -> None:
    teacher = _teacher(drop_path_rate=0.5, proj_drop_rate=0.5)
    teacher.prepare((2, 2), PATCH)
    teacher.train()
    torch.nn.ModuleList([teacher]).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    first, second = teacher(images).tokens[2], teacher(images).tokens[2]
    assert not first.requires_grad
    assert torch.equal(first, second)


def test_images_are_resized_to_the_teacher_s_own_size_and_left_alone_when_equal() -> None:
    teacher = TimmTeacher("vit_tiny_patch16_224", allow_random=True, patch_size=14, **{**SMALL, "img_size": 56})
    assert teacher.prepare((4, 6), 32) == (8, 12)
    assert teacher.input_size == (112, 168)
    sizes: list[torch.Size] = []
    teacher.network.patch_embed.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape))
    out = teacher(torch.rand(1, 3, 128, 192))
    assert sizes[0][2:] == (112, 168)
    assert out.tokens[2].shape == (1, 32, 8, 12)
    same = torch.rand(1, 3, 112, 168)
    assert torch.equal(teacher._inputs(same), (same - teacher.mean) / teacher.std)


def test_positions_are_resampled_from_the_file_s_own_every_time() -> None:
    teacher = _teacher()
    original = teacher.family.native_positions.clone()
    rows = torch.arange(4.0).repeat_interleave(4)  # a ramp over the rows
    teacher.family.native_positions = original.clone()
    teacher.family.native_positions[0, 1:, 0] = rows
    teacher.prepare((2, 3), PATCH)
    ramp = teacher.network.pos_embed[0, 1:, 0].view(2, 3)
    assert ramp[0, 0] < 1.5 < ramp[1, 0]
    torch.testing.assert_close(ramp[:, 0], ramp[:, 2])
    torch.testing.assert_close(teacher.network.pos_embed[:, :1], original[:, :1])
    teacher.prepare((4, 4), PATCH)  # back: nothing was lost
    assert torch.equal(teacher.network.pos_embed[0, 1:, 0], rows)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_lower_precision_is_near_and_outputs_stay_fp32(dtype: str) -> None:
    full = _teacher()
    low = _teacher(dtype=dtype)
    full.prepare((2, 2), PATCH)
    low.prepare((2, 2), PATCH)
    low.network.load_state_dict(full.network.state_dict())
    images = torch.rand(2, 3, 32, 32)
    a, b = full(images).tokens[2], low(images).tokens[2]
    assert b.dtype == torch.float32
    assert next(low.network.parameters()).dtype == getattr(torch, dtype)
    assert torch.equal(low.mean, full.mean)  # not rounded
    assert 0 < (a - b).norm() / a.norm() < 0.05


def test_autocast_of_the_student_leaves_the_teacher_alone() -> None:
    teacher = _teacher()
    teacher.prepare((2, 2), PATCH)
    images = torch.rand(1, 3, 32, 32)
    expected = teacher(images).tokens[2]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher(images).tokens[2], expected)


def test_normalisation_is_timm_s_unless_told() -> None:
    assert _teacher().mean.flatten().tolist() == [0.5, 0.5, 0.5]
    told = _teacher(normalize=((0.1, 0.2, 0.3), (0.2, 0.3, 1.0)))
    torch.testing.assert_close(told.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(told.std.flatten(), torch.tensor([0.2, 0.3, 1.0]))


def test_fp16_file_with_a_classifier_loads_strictly(tmp_path: Path) -> None:
    source = timm.create_model("vit_tiny_patch16_224", num_classes=7, **SMALL)
    save_file({key: value.half() for key, value in source.state_dict().items()}, tmp_path / "vit.safetensors")
    teacher = TimmTeacher("vit_tiny_patch16_224", checkpoint=tmp_path / "vit.safetensors", **SMALL)
    torch.testing.assert_close(teacher.network.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight.half().float())
    with pytest.raises(WeightsError, match=r"it has 3 blocks, width 32, .*, the network 2 blocks, width 32"):
        TimmTeacher("vit_tiny_patch16_224", checkpoint=tmp_path / "vit.safetensors", **{**SMALL, "depth": 2})


def test_refusals_say_what_to_do() -> None:
    with refused(ValueError, "timm-name-unknown", "vit_small_patch14_dinov2"):
        TimmTeacher("vit_smal_patch14_dinov2", allow_random=True)
    with pytest.raises(ValueError, match=r"no weights tagged 'lvd'.*'vit_small_patch16_dinov3\.lvd1689m'"):
        TimmTeacher("vit_small_patch16_dinov3.lvd", allow_random=True)
    with refused(ValueError, "teacher-without-weights", "pretrained=True"):
        TimmTeacher("vit_tiny_patch16_224")
    with refused(ValueError, "weights-named-twice"):
        TimmTeacher("vit_tiny_patch16_224", checkpoint="a.pth", pretrained=True)
    with refused(FileNotFoundError, "weight-file-missing", "absent.pth"):
        TimmTeacher("vit_tiny_patch16_224", checkpoint="absent.pth", **SMALL)
    with refused(ValueError, "dtype-unknown"):
        _teacher(dtype="int8")
    teacher = _teacher()
    with refused(ValueError, "teacher-block-out-of-range", "3", "0", "2"):
        teacher.check(TeacherNeeds(blocks=(0, 3)))
    with refused(ValueError, "teacher-without-decoder"):
        teacher.check(TeacherNeeds(decoder_block=0))
    with pytest.raises(RuntimeError, match="prepare"):
        teacher(torch.rand(1, 3, 32, 32))
    teacher.prepare((2, 2), PATCH)
    with refused(ValueError, "visible-missing", "visible_only"):
        teacher(torch.rand(1, 3, 32, 32), None, TeacherNeeds(blocks=(0,), visible_only=True))
    with refused(ValueError, "visible-shape", "(2, 2)"):
        teacher(torch.rand(1, 3, 32, 32), torch.ones(1, 4, 4).bool(), TeacherNeeds(blocks=(0,), visible_only=True))


def test_is_registered() -> None:
    built = MODELS.build({"type": "TimmTeacher", "name": "vit_tiny_patch16_224", "allow_random": True, **SMALL})
    assert isinstance(built, TimmTeacher)
    assert (built.info.width, built.info.depth, built.info.patch_size) == (32, 3, 16)


@pytest.mark.parametrize("kwargs", [{}, {"class_token": False, "global_pool": "avg", "reg_tokens": 2}, {"qk_norm": True}])
def test_attention_is_that_of_the_block(kwargs: dict[str, Any]) -> None:
    teacher = _with_positions(_teacher(**kwargs))
    teacher.prepare((2, 2), 2 * PATCH)
    images = torch.rand(2, 3, 64, 64)
    seen = {}
    attn = teacher.network.blocks[1].attn
    attn.fused_attn = False
    attn.attn_drop.register_forward_hook(lambda module, inputs, output: seen.update(weights=inputs[0]))
    teacher(images, None, TeacherNeeds(blocks=(1,)))
    classes = kwargs.get("class_token", True)
    weights = seen["weights"][:, :, :1, 1:] if classes else seen["weights"][..., 2:]
    cells = weights.mean((1, 2)).view(2, 2, 2, 2, 2).mean((2, 4))
    torch.testing.assert_close(teacher.attention(images, block=1), cells)


def test_attention_of_post_norm_blocks_is_theirs() -> None:
    teacher = _with_positions(_teacher("vit_base_patch16_rpn_224"))
    assert type(teacher.network.blocks[1]) is ResPostBlock
    teacher.prepare((4, 4), PATCH)
    images = torch.rand(2, 3, 64, 64)
    seen = {}
    attn = teacher.network.blocks[1].attn
    attn.fused_attn = False
    attn.attn_drop.register_forward_hook(lambda module, inputs, output: seen.update(weights=inputs[0]))
    teacher(images, None, TeacherNeeds(blocks=(1,)))
    expected = seen["weights"].mean((1, 2)).view(2, 4, 4)  # it has no class token
    torch.testing.assert_close(teacher.attention(images, block=1), expected)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("vit_small_patch16_18x2_224", "ParallelThingsBlock"),
        ("vit_pwee_patch16_reg1_gap_256", "ParallelScalingBlock"),
        ("vit_dlittle_patch16_reg1_gap_256", "Block with timm.*DiffAttention"),
    ],
)
def test_attention_of_other_blocks_is_refused_by_name_when_the_model_is_built(name: str, kind: str) -> None:
    teacher = _teacher(name)
    teacher.prepare((2, 2), 2 * PATCH)
    with pytest.raises(ValueError, match=rf"attention of blocks of the kind timm.*{kind} is not read.*RandomMask"):
        teacher.attention(torch.rand(1, 3, 64, 64))
    size = {key: value for key, value in SMALL.items() if key != "img_size"}
    model = dict(
        student=dict(type="SparseUNet", encoder="test_resnet", decoder_width=16, min_decoder_width=8),
        objectives=dict(hgkd=dict(type="HGKD", block=1)),
        image_size=64,
        teacher=dict(type="TimmTeacher", name=name, allow_random=True, **size),
    )
    with pytest.raises(ValueError, match=rf"{kind} is not read"):
        MaskedDistiller(mask=dict(type="AttentionMask"), **model)
    MaskedDistiller(mask=dict(type="RandomMask"), **model)


def _overflowing(kind: str, dtype: str) -> Teacher:
    """Finite weights whose second block leaves float16's range."""
    teacher: Teacher
    if kind == "timm":
        teacher = _teacher(dtype=dtype)
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = save_mae(MaskedAutoencoder(make_arch(ARCH)), Path(folder) / "mae.safetensors")
            teacher = MAETeacher(path, dtype=dtype, allow_random=True)
    for name in ("weight", "bias"):
        getattr(teacher.network.blocks[1].mlp.fc2, name).data.fill_(3e4)
    teacher.prepare((4, 4), PATCH)
    return teacher


@pytest.mark.parametrize("kind", ["timm", "mae"])
@pytest.mark.parametrize("visible_only", [False, True])
def test_a_teacher_that_overflows_is_named_with_its_block_before_the_first_step(kind: str, visible_only: bool) -> None:
    """Half precision of DINOv2: https://github.com/facebookresearch/dinov2/issues/380."""
    images, visible = torch.rand(2, 3, 64, 64), torch.rand(2, 4, 4) < 0.5
    visible[:, 0, 0] = True
    needs = TeacherNeeds(blocks=(2,), visible_only=visible_only)
    overflows = r"the teacher's block 1 \(blocks\.1\.mlp\.fc2\) gives inf in float16 on the first images; .*dtype=bfloat16"
    with pytest.raises(WeightsError, match=overflows):
        _overflowing(kind, "float16")(images, visible, needs)
    assert _overflowing(kind, "bfloat16")(images, visible, needs).tokens[2].isfinite().all()


def test_a_teacher_that_is_wrong_in_any_precision_is_not_told_to_change_it() -> None:
    teacher = _teacher()
    teacher.network.blocks[0].mlp.fc1.weight.data.fill_(float("nan"))
    teacher.prepare((4, 4), PATCH)
    with refused(WeightsError, "teacher-not-finite", "0", "blocks.0.mlp.fc1", "float32") as caught:
        teacher(torch.rand(1, 3, 64, 64))
    assert "dtype" not in str(caught.value)


def test_after_the_first_images_nothing_is_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr("hgkd.teachers.base.check_outputs", lambda *_: calls.append(1))
    teacher = _teacher()
    teacher.prepare((4, 4), PATCH)
    for _ in range(3):
        teacher(torch.rand(1, 3, 64, 64))
    assert calls == [1]


def _file(folder: Path, name: str = "vit_tiny_patch16_224", **kwargs: Any) -> Path:
    path = folder / "vit.pth"
    torch.save(timm.create_model(name, num_classes=0, **{**SMALL, **kwargs}).state_dict(), path)
    return path


def test_a_file_with_nan_is_refused_with_the_entry(tmp_path: Path) -> None:
    path = _file(tmp_path)
    weights = torch.load(path)
    weights["blocks.1.norm1.bias"][3] = float("nan")
    torch.save(weights, path)
    with refused(WeightsError, "weights-of-another-network", "1", "blocks.1.norm1.bias"):
        _teacher(checkpoint=path)


@pytest.mark.parametrize(
    ("of_file", "of_network", "remedy"),
    [
        ({"init_values": 1e-5}, {}, {"init_values": 1e-5}),
        ({}, {"init_values": 1e-5}, {"init_values": None}),
        ({"img_size": 96}, {}, {"img_size": 96}),
        ({"img_size": 96, "init_values": 1e-5}, {}, {"img_size": 96, "init_values": 1e-5}),
    ],
)
def test_what_a_difference_means_is_said_and_the_remedy_works(
    of_file: dict[str, Any], of_network: dict[str, Any], remedy: dict[str, Any], tmp_path: Path
) -> None:
    path = _file(tmp_path, **of_file)
    with pytest.raises(WeightsError) as caught:
        _teacher(checkpoint=path, **of_network)
    found = dict(re.findall(r"set model\.teacher\.(\w+)=([\w.-]+)", str(caught.value)))
    assert {key: None if value == "None" else float(value) for key, value in found.items()} == remedy
    _teacher(checkpoint=path, **{**of_network, **remedy})


def test_another_size_and_half_a_model_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(
        WeightsError, match=r"has 3 blocks, width 64, .* the network 3 blocks, width 32, .*model\.teacher\.name"
    ):
        _teacher(checkpoint=_file(tmp_path, embed_dim=64))
    weights = torch.load(_file(tmp_path))
    part = tmp_path / "model-00001-of-00002.safetensors"
    save_file({key: value for key, value in weights.items() if not key.startswith("blocks.2.")}, part)
    with pytest.raises(
        WeightsError,
        match=r"this is part 1 of 2; give the index file .*There is none in its folder",
    ):
        _teacher(checkpoint=part)


def test_the_other_set_of_weights_in_a_file_can_be_taken(tmp_path: Path) -> None:
    first, second = (timm.create_model("vit_tiny_patch16_224", num_classes=0, **SMALL).state_dict() for _ in range(2))
    torch.save({"state_dict": first, "state_dict_ema": second}, tmp_path / "vit.pth")
    for entry, expected in ((None, first), ("state_dict_ema", second)):
        teacher = _teacher(checkpoint=tmp_path / "vit.pth", entry=entry)
        assert torch.equal(teacher.network.blocks[0].mlp.fc1.weight, expected["blocks.0.mlp.fc1.weight"])


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("vit_tiny_patch16_224", {}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("deit3_small_patch16_224", {}),
        ("vit_small_patch14_reg4_dinov2", {}),
        ("vit_base_patch16_clip_224", {}),
        ("vit_tiny_patch16_224", {"qk_norm": True, "qkv_bias": False}),
        ("vit_tiny_patch16_224", {"img_size": (32, 96)}),
        ("vit_giant_patch14_dinov2", {}),
        ("beit_base_patch16_224", {}),
        ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
        ("vit_small_patch16_dinov3", {}),
        ("vit_small_plus_patch16_dinov3_qkvb", {}),
        ("eva02_tiny_patch14_224", {}),
        ("eva02_base_patch14_224", {}),
        ("vit_pe_core_tiny_patch16_384", {}),
        ("vit_pe_spatial_tiny_patch16_512", {}),
        ("vit_small_patch16_rope_mixed_ape_224", {}),
        ("vit_medium_patch16_rope_reg1_gap_256", {}),
        ("aimv2_large_patch14_224", {}),
        ("vit_base_patch16_siglip_224", {}),
    ],
)
def test_a_file_s_own_shapes_describe_its_network(name: str, kwargs: dict[str, Any]) -> None:
    with torch.device("meta"):
        state = dict(timm.create_model(name, num_classes=0, **{**SMALL, **kwargs}).state_dict())
    load_vit(vit_of(state, "file"), state, "file", dry=True)


class TestUsualPrecision:
    """Without a dtype a teacher computes in bfloat16 on a GPU that does, which here is a CPU that is taken for one."""

    def teacher(self, **options):
        torch.manual_seed(0)
        return TimmTeacher("vit_tiny_patch16_224", allow_random=True, img_size=32, depth=1, **options)

    def test_follows_the_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made, chosen = self.teacher(), self.teacher(dtype="float32")
        assert made.dtype == torch.float32
        made.prepare((2, 2), 16)
        chosen.prepare((2, 2), 16)
        monkeypatch.setattr(base, "usual_precision", lambda device: torch.bfloat16)
        for teacher in (made, chosen):
            teacher.to("cpu")
        images = torch.rand(2, 3, 32, 32)
        found, expected = (teacher(images).tokens[0] for teacher in (made, chosen))
        assert (made.dtype, chosen.dtype) == (torch.bfloat16, torch.float32)
        assert {p.dtype for p in made.network.parameters()} == {torch.bfloat16}
        assert made.mean.dtype == found.dtype == torch.float32
        assert not torch.equal(found, expected)
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)

    def test_emulated_bfloat16_is_not_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[bool] = []
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: asked.append(including_emulation))
        assert base.usual_precision(torch.device("cuda")) == torch.float32
        assert asked == [False]
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
        assert base.usual_precision(torch.device("cuda")) == torch.bfloat16
        assert base.usual_precision(torch.device("cpu")) == torch.float32
