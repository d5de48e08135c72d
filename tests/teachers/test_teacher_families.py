"""Families of networks as teachers: equal to timm's own, positions that follow the patches, and what is refused."""

from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hgkd.distillers import MaskedDistiller
from hgkd.errors import WeightsError, code_of
from hgkd.structures import TeacherNeeds
from hgkd.teachers import TimmTeacher
from hgkd.teachers.families import EXAMPLES, Levels, RotaryViT

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 64, "patch_size": 16}
ROTARY: dict[str, dict[str, Any]] = {
    "vit_small_patch16_dinov3": {},
    "vit_small_plus_patch16_dinov3_qkvb": {},
    "eva02_tiny_patch14_224": {},
    "eva02_base_patch14_224": {},
    "eva_giant_patch14_224": {},  # no rotary positions at all
    "vit_pe_core_tiny_patch16_384": {},
    "vit_pe_spatial_tiny_patch16_512": {},
    "vit_small_patch16_rope_ape_224": {},
    "vit_small_patch16_rope_mixed_224": {},
    "vit_medium_patch16_rope_reg1_gap_256": {},
    "vit_small_patch16_lingbot": {},
    "vit_base_patch16_sapiens2": {"num_kv_heads": 1},  # two heads of queries share one of keys
}


def _loud(network: Any) -> None:
    """Weights large enough that a wrong position shows."""
    generator = torch.Generator().manual_seed(3)
    for name, value in network.state_dict().items():
        if value.is_floating_point() and "periods" not in name:
            value.copy_(torch.randn(value.shape, generator=generator) * (0.3 if value.ndim > 1 else 0.5))


def _teacher(name: str, **kwargs: Any) -> TimmTeacher:
    from hgkd.teachers.vit import build_network, family_of

    teacher = TimmTeacher(name, allow_random=True, **kwargs)
    network = build_network(name, **kwargs)
    _loud(network)
    teacher.reference = build_network(name, **kwargs).eval()  # type: ignore[assignment]
    teacher.reference.load_state_dict(network.state_dict())
    size = kwargs.get("img_size")
    teacher.family = family_of(network, name, None, None if size is None else (size, size))
    teacher.network = network
    teacher.freeze()
    return teacher


def _expected(teacher: TimmTeacher, images: Tensor, index: int) -> Tensor:
    with torch.no_grad():
        inputs = (images - teacher.mean) / teacher.std
        found: Tensor = teacher.reference.forward_intermediates(inputs, norm=False, intermediates_only=True)[index]
    return found


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_vits_are_timms_own_on_their_grid_and_on_another(name: str) -> None:
    teacher = _teacher(name, **{**SMALL, **ROTARY[name]})
    assert isinstance(teacher.family, RotaryViT)
    for grid in ((4, 4), (3, 5)):
        teacher.prepare(grid, 16)
        images = torch.rand(2, 3, 16 * grid[0], 16 * grid[1])
        if grid != (4, 4):
            teacher.reference.set_input_size(img_size=images.shape[2:])
        expected = _expected(teacher, images, 1)
        torch.testing.assert_close(teacher(images).tokens[1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ROTARY)
def test_a_permutation_of_the_kept_patches_permutes_their_tokens(name: str) -> None:
    teacher = _teacher(name, **{**SMALL, **ROTARY[name]})
    teacher.prepare((4, 4), 16)
    inputs = teacher._inputs(torch.rand(2, 3, 64, 64))

    @settings(max_examples=5, deadline=None)
    @given(st.permutations(range(7)), st.integers(0, 2**16))
    def holds(order: list[int], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        ids_keep = torch.stack([torch.randperm(16, generator=generator)[:7] for _ in range(2)])  # of each image others
        with torch.no_grad():
            first, cls = teacher.family.tokens(inputs, ids_keep, (1,))
            second, same = teacher.family.tokens(inputs, ids_keep[:, order], (1,))
        torch.testing.assert_close(second[1], first[1][:, order], rtol=1e-4, atol=1e-4)
        if cls is not None:
            torch.testing.assert_close(cls, same, rtol=1e-4, atol=1e-4)

    holds()
    everything = torch.stack([torch.randperm(16) for _ in range(2)])
    with torch.no_grad():
        whole = teacher.family.tokens(inputs, None, (1,))[0][1]
        kept_all = teacher.family.tokens(inputs, everything, (1,))[0][1]
    torch.testing.assert_close(kept_all, whole.gather(1, everything[:, :, None].expand_as(whole)), rtol=1e-4, atol=1e-4)


def test_positions_of_kept_patches_are_those_of_their_places() -> None:
    """Two patches swapped, and their places with them, are two patches swapped; with their places left they are not."""
    teacher = _teacher("vit_small_patch16_dinov3", **SMALL)
    teacher.prepare((4, 4), 16)
    images = torch.rand(1, 3, 64, 64)
    visible = torch.zeros(1, 4, 4, dtype=torch.bool)
    visible[0, 0, 0] = visible[0, 2, 3] = visible[0, 3, 0] = True
    needs = TeacherNeeds(blocks=(1,), visible_only=True)
    out = teacher(images, visible, needs).tokens[1]
    swapped = images.clone()
    swapped[..., :16, :16], swapped[..., 32:48, 48:] = images[..., 32:48, 48:], images[..., :16, :16]
    other = teacher(swapped, visible, needs).tokens[1]
    assert not torch.allclose(other[0, :, 0, 0], out[0, :, 2, 3], atol=1e-3)
    changed = torch.where(visible.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None], images, torch.rand_like(images))
    torch.testing.assert_close(teacher(changed, visible, needs).tokens[1], out)
    assert bool((out[0][:, ~visible[0]] == 0).all())


@pytest.mark.parametrize("name", [name for name in ROTARY if name != "eva_giant_patch14_224"])
def test_attention_of_rotary_vits_is_that_of_their_block(name: str) -> None:
    teacher = _teacher(name, **{**SMALL, **ROTARY[name]})
    teacher.prepare((4, 4), 16)
    images = torch.rand(2, 3, 64, 64)
    seen = {}
    attn = teacher.network.blocks[1].attn
    attn.fused_attn = False
    attn.attn_drop.register_forward_hook(lambda module, inputs, output: seen.update(weights=inputs[0]))
    teacher(images, None, TeacherNeeds(blocks=(1,)))
    prefix = teacher.family.prefix
    weights = seen["weights"][:, :, :1, prefix:] if teacher.has_class_token else seen["weights"][..., prefix:]
    expected = weights.mean((1, 2)).view(2, 4, 4)
    torch.testing.assert_close(teacher.attention(images), expected, rtol=1e-4, atol=1e-5)
    assert teacher.capabilities.no_attention == ""


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"])
def test_angles_stay_exact_in_lower_precision(name: str, dtype: str) -> None:
    full, low = (TimmTeacher(name, allow_random=True, dtype=kind, **SMALL) for kind in ("float32", dtype))
    low.network.load_state_dict(full.network.state_dict())
    if name.endswith("mixed_224"):  # learned frequencies
        low.family._rope.load_state_dict(full.family._rope.state_dict())
    images = torch.rand(1, 3, 64, 64)
    for teacher in (full, low):
        teacher.prepare((4, 4), 16)
    a, b = full(images).tokens[1], low(images).tokens[1]
    assert 0 < (a - b).norm() / a.norm() < 0.05
    torch.testing.assert_close(full.family._angles, low.family._angles)
    assert low.family._angles.dtype == torch.float32


SHORT_SWIN: dict[str, Any] = {"depths": (1, 1, 1, 1), "embed_dim": 16, "num_heads": (1, 1, 2, 2)}
LEVELS: list[tuple[str, dict[str, Any], int | None, tuple[int, int], tuple[int, int, int, int]]] = [
    # name, options, level, grid, (width, blocks, stride, index of timm's feature)
    ("swin_tiny_patch4_window7_224", SHORT_SWIN, None, (7, 7), (128, 1, 32, 3)),
    ("swin_tiny_patch4_window7_224", SHORT_SWIN, 1, (28, 28), (32, 1, 8, 1)),
    ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}, -2, (4, 6), (16, 1, 16, 2)),
    ("test_resnet", {}, 3, (3, 2), (192, 1, 16, 3)),
    ("test_vit_relpos", {}, None, (10, 10), (96, 9, 16, 8)),
    ("hiera_tiny_224", {"embed_dim": 16, "stages": (1, 1, 1, 1)}, 2, (14, 14), (64, 1, 16, 2)),
    ("samvit_base_patch16_224", {"depth": 2, "embed_dim": 32, "num_heads": 2}, None, (14, 14), (32, 2, 16, 1)),
]


@pytest.mark.parametrize(("name", "kwargs", "level", "grid", "facts"), LEVELS, ids=[f"{row[0]}-{row[2]}" for row in LEVELS])
def test_levels_are_timms_features(
    name: str, kwargs: dict[str, Any], level: int | None, grid: tuple[int, int], facts: tuple[int, int, int, int]
) -> None:
    torch.manual_seed(0)
    teacher = TimmTeacher(name, allow_random=True, level=level, **kwargs)
    width, depth, stride, index = facts
    assert (teacher.info.width, teacher.info.depth, teacher.info.patch_size) == (width, depth, stride)
    assert teacher.prepare(grid, stride) == grid
    reference = timm.create_model(name, num_classes=0, **kwargs).eval()
    reference.load_state_dict(teacher.network.state_dict())
    images = torch.rand(1, 3, grid[0] * stride, grid[1] * stride)
    with torch.no_grad():
        inputs = (images - teacher.mean) / teacher.std
        expected = reference.forward_intermediates(inputs, intermediates_only=True)[index]
    torch.testing.assert_close(teacher(images).tokens[depth - 1], expected, rtol=1e-5, atol=1e-5)


def test_a_network_goes_to_another_size_and_back_without_loss() -> None:
    teacher = TimmTeacher("test_vit_relpos", allow_random=True)
    images = torch.rand(1, 3, 160, 160)
    teacher.prepare((10, 10), 16)
    before = teacher(images).tokens[8]
    teacher.prepare((6, 4), 16)
    assert teacher(torch.rand(1, 3, 96, 64)).tokens[8].shape == (1, 96, 6, 4)
    teacher.prepare((10, 10), 16)
    assert torch.equal(teacher(images).tokens[8], before)


def test_what_levels_cannot_do_is_refused_with_its_reason() -> None:
    teacher = TimmTeacher("test_resnet", allow_random=True)
    with pytest.raises(ValueError, match=r"sees whole images alone: .*HGKD target='full'.*vit_small_patch16_dinov3") as caught:
        teacher.check(TeacherNeeds(blocks=(0,), visible_only=True))
    assert code_of(caught.value) == "teacher-sees-whole-images"
    with pytest.raises(ValueError, match="has no decoder, so it cannot infer hidden positions"):
        teacher.check(TeacherNeeds(decoder_block=0))
    with pytest.raises(ValueError, match=r"gives no attention to guide masks; use RandomMask"):
        teacher.check_attention()
    with pytest.raises(ValueError, match=r"level 5 does not exist: .* the levels 0 \(stride 2, 32 channels\), ") as no:
        TimmTeacher("test_resnet", allow_random=True, level=5)
    assert code_of(no.value) == "no-such-level"
    with pytest.raises(ValueError, match=r"is a ViT whose blocks all have one grid; choose a block"):
        TimmTeacher("vit_tiny_patch16_224", allow_random=True, level=2, **SMALL)


@pytest.mark.parametrize("name", ["pit_ti_224", "crossvit_tiny_240"])
def test_a_teacher_without_tokens_on_a_grid_is_refused_with_one_that_serves(name: str) -> None:
    with pytest.raises(ValueError, match=r"gives no tokens on a grid.*; teachers that serve are") as caught:
        TimmTeacher(name, allow_random=True)
    assert code_of(caught.value) == "teacher-without-grid"
    assert any(example in str(caught.value) for example in EXAMPLES)


def test_a_network_of_one_size_says_which_grids_it_has() -> None:
    teacher = TimmTeacher("hiera_tiny_224", allow_random=True, embed_dim=16, stages=(1, 1, 1, 1))
    assert isinstance(teacher.family, Levels)
    with pytest.raises(ValueError, match=r"takes no images of 192 x 192 px .* Its own are 224 x 224, 7 x 7 tokens") as caught:
        teacher.prepare((6, 6), 32)
    assert code_of(caught.value) == "teacher-image-size"


STUDENT = dict(type="SparseUNet", encoder="test_resnet", decoder_width=16, min_decoder_width=8)
ALL = dict(hgkd=dict(type="HGKD", target="full"), mgd=dict(type="MGD"), pooled=dict(type="PooledFeature"))
CONVNEXT = dict(type="TimmTeacher", name="convnext_atto", allow_random=True, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), level=2)


def test_a_cnn_teaches_every_objective_of_whole_images_and_no_other() -> None:
    model = MaskedDistiller(STUDENT, ALL, dict(type="RandomMask", mask_ratio=0.5), 64, teacher=CONVNEXT)
    losses = model(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), mode="loss")
    assert {name.split("_")[0] for name in losses} == {"hgkd", "mgd", "pooled"}
    assert all(bool(loss.isfinite()) and loss.requires_grad for loss in losses.values())
    for objective, reason in (
        (dict(type="DMAE"), "sees whole images alone"),
        (dict(type="HGKD", target="inferred"), "has no decoder"),
        (dict(type="G2SD"), "has no decoder"),
    ):
        with pytest.raises(ValueError, match=reason):
            MaskedDistiller(STUDENT, dict(x=objective), dict(type="RandomMask", mask_ratio=0.5), 64, teacher=CONVNEXT)
    with pytest.raises(ValueError, match="gives no attention to guide masks"):
        MaskedDistiller(STUDENT, ALL, dict(type="AttentionMask"), 64, teacher=CONVNEXT)


def test_a_rotary_vit_teaches_dmae_and_guides_a_mask() -> None:
    teacher = dict(type="TimmTeacher", name="vit_small_patch16_dinov3", allow_random=True, depth=2, embed_dim=32, num_heads=2)
    model = MaskedDistiller(STUDENT, dict(dmae=dict(type="DMAE")), dict(type="AttentionMask"), 64, teacher=teacher)
    losses = model(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), mode="loss")
    assert all(bool(loss.isfinite()) for loss in losses.values())


def test_random_weights_of_hierarchical_networks_are_noticed() -> None:
    teacher = TimmTeacher("convnext_atto", checkpoint=None, allow_random=True)
    teacher.require_trained()
    teacher.allow_random = False
    with pytest.raises(WeightsError, match="looks random"):
        teacher.require_trained()


def test_a_cnn_that_overflows_is_named_before_the_first_step() -> None:
    teacher = TimmTeacher("convnext_atto", allow_random=True, dtype="float16", depths=(1, 1, 1, 1), dims=(8, 8, 16, 16))
    teacher.network.stages[1].blocks[0].mlp.fc2.weight.data.fill_(6e4)
    teacher.network.stages[1].blocks[0].mlp.fc2.bias.data.fill_(6e4)
    teacher.network.stages[1].blocks[0].gamma.data.fill_(10.0)
    teacher.prepare((2, 2), 32)
    with pytest.raises(WeightsError, match=r"the teacher's .*stages\.1\.blocks\.0.* gives inf in float16 .*dtype=bfloat16"):
        teacher(torch.rand(1, 3, 64, 64))
