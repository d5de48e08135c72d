"""Files in every known naming give the outputs of timm with the same tensors."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused
from torch import Tensor

from hgkd.errors import WeightsError
from hgkd.networks.mae import MaskedAutoencoder, make_arch
from hgkd.structures import TeacherNeeds
from hgkd.teachers import MAETeacher, TimmTeacher
from hgkd.weights.identify import identify
from hgkd.weights.vit_names import to_timm_names

SIZES: dict[str, Any] = {"depth": 2, "embed_dim": 16, "num_heads": 2, "img_size": 64}
Weights = dict[str, Tensor]


def network(name: str, **kwargs: Any) -> Any:
    """timm's network with weights from a fixed recipe: no entry is 0 or 1 by chance."""
    model = timm.create_model(name, num_classes=0, **{**SIZES, **kwargs}).eval()
    generator = torch.Generator().manual_seed(7)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    return model


def split_qkv(weights: Weights, names: Callable[[str, str], str]) -> Weights:
    """Fused qkv entries taken apart; ``names(part, kind)`` is what stands instead of 'qkv.kind'."""
    out = {}
    for key, value in weights.items():
        match = re.fullmatch(r"(.*)qkv\.(weight|bias)", key)
        if match is None:
            out[key] = value
        else:
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                out[match[1] + names(part, match[2])] = rows
    return out


def renamed(weights: Weights, table: dict[str, str]) -> Weights:
    out = {}
    for key, value in weights.items():
        for old, new in table.items():
            key = re.sub(old, new, key)
        out[key] = value
    return out


HF_VIT = {
    r"^blocks\.(\d+)\.": r"encoder.layer.\1.",
    r"attn\.(query|key|value)": r"attention.attention.\1",
    r"attn\.proj": "attention.output.dense",
    r"norm1": "layernorm_before",
    r"norm2": "layernorm_after",
    r"mlp\.fc1": "intermediate.dense",
    r"mlp\.fc2": "output.dense",
    r"^norm\.": "layernorm.",
    r"^cls_token": "embeddings.cls_token",
    r"^pos_embed": "embeddings.position_embeddings",
    r"^patch_embed\.proj": "embeddings.patch_embeddings.projection",
}
HF_DINOV2 = {k: v for k, v in HF_VIT.items() if k not in ("norm1", "norm2", r"mlp\.fc1", r"mlp\.fc2")} | {
    r"ls([12])\.gamma": r"layer_scale\1.lambda1",
    r"^reg_token": "embeddings.register_tokens",
}


def hf_vit(model: Any) -> Weights:
    weights = split_qkv(model.state_dict(), lambda part, kind: f"{part}.{kind}")
    return {f"vit.{k}": v for k, v in renamed(weights, HF_VIT).items()} | {
        "vit.pooler.dense.weight": torch.ones(2),
        "classifier.weight": torch.ones(3),
    }


def with_class_position(model: Any, register: str) -> Weights:
    """What timm folds into the class token, taken out again."""
    weights = dict(model.state_dict())
    position = torch.full((1, 1, 16), 0.25)
    weights["cls_token"] = weights["cls_token"] - position
    weights["pos_embed"] = torch.cat([position, weights["pos_embed"]], 1)
    weights[register] = weights.pop("reg_token")
    return weights


def hf_dinov2(model: Any) -> Weights:
    weights = dict(model.state_dict())
    if "reg_token" in weights:
        weights = with_class_position(model, "reg_token")
    weights = split_qkv(weights, lambda part, kind: f"{part}.{kind}")
    return renamed(weights, HF_DINOV2) | {"embeddings.mask_token": torch.zeros(1, 16)}


def hf_beit(model: Any) -> Weights:
    weights = {}
    for key, value in model.state_dict().items():
        if key.endswith("qkv.weight"):
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                weights[key.replace("qkv", part)] = rows
        else:
            key = key.replace("q_bias", "query.bias").replace("v_bias", "value.bias")
            weights[key.replace("relative_position_bias_table", "relative_position_bias.relative_position_bias_table")] = value
    table = HF_VIT | {
        r"attn\.relative": "attention.attention.relative",
        r"gamma_([12])": r"lambda_\1",
        "^fc_norm": "pooler.layernorm",
    }
    return {f"beit.{k}": v for k, v in renamed(weights, table).items()}


def beit(model: Any) -> Weights:
    index = {f"blocks.{i}.attn.relative_position_index": torch.zeros(17, 17, dtype=torch.long) for i in range(2)}
    return dict(model.state_dict()) | index | {"mask_token": torch.zeros(1, 1, 16), "lm_head.weight": torch.ones(4, 16)}


def dino(model: Any) -> Weights:
    return {f"backbone.{k}": v for k, v in model.state_dict().items()} | {"head.mlp.0.weight": torch.ones(2)}


def dinov2(model: Any) -> Weights:
    weights = dict(model.state_dict())
    if "reg_token" in weights:
        weights = with_class_position(model, "register_tokens")
    grouped = {re.sub(r"^blocks\.(\d+)\.", r"blocks.0.\1.", k): v for k, v in weights.items()}
    return grouped | {"mask_token": torch.zeros(1, 16)}


def openai_clip(model: Any) -> Weights:
    table = {
        r"^blocks\.(\d+)\.": r"transformer.resblocks.\1.",
        r"attn\.qkv\.": "attn.in_proj_",
        r"attn\.proj": "attn.out_proj",
        r"norm([12])\.": r"ln_\1.",
        r"mlp\.fc1": "mlp.c_fc",
        r"mlp\.fc2": "mlp.c_proj",
        r"^norm_pre": "ln_pre",
        r"^norm\.": "ln_post.",
        r"^patch_embed\.proj": "conv1",
    }
    weights = renamed(model.state_dict(), table)
    weights["class_embedding"] = weights.pop("cls_token").flatten()
    weights["positional_embedding"] = weights.pop("pos_embed")[0]
    weights["proj"] = torch.ones(16, 4)
    text = {"transformer.resblocks.0.attn.in_proj_weight": torch.ones(3), "positional_embedding": torch.ones(2, 2)}
    return {f"visual.{k}": v for k, v in weights.items()} | text


def hf_clip(model: Any) -> Weights:
    weights = split_qkv(model.state_dict(), lambda part, kind: f"{part[0]}_proj.{kind}")
    table = {
        r"^blocks\.(\d+)\.": r"encoder.layers.\1.",
        r"attn\.proj": "self_attn.out_proj",
        r"\.attn\.": ".self_attn.",
        r"norm([12])\.": r"layer_norm\1.",
        r"^norm_pre": "pre_layrnorm",
        r"^norm\.": "post_layernorm.",
        r"^patch_embed\.proj": "embeddings.patch_embedding",
    }
    weights = renamed(weights, table)
    weights["embeddings.class_embedding"] = weights.pop("cls_token").flatten()
    weights["embeddings.position_embedding.weight"] = weights.pop("pos_embed")[0]
    weights["embeddings.position_ids"] = torch.arange(17)[None]
    text = {"text_model.encoder.layers.0.self_attn.q_proj.weight": torch.ones(3), "visual_projection.weight": torch.ones(2)}
    return {f"vision_model.{k}": v for k, v in weights.items()} | text


FILES = [
    ("timm", "vit_tiny_patch16_224", {}, lambda model: dict(model.state_dict())),
    ("timm", "vit_tiny_patch16_224", {}, dino),
    ("timm", "vit_small_patch14_dinov2", {"patch_size": 16}, dinov2),
    ("DINOv2 with registers", "vit_small_patch14_reg4_dinov2", {"patch_size": 16}, dinov2),
    ("timm", "beit_base_patch16_224", {}, beit),
    ("timm", "beitv2_base_patch16_224", {}, beit),
    ("OpenAI CLIP", "vit_base_patch16_clip_quickgelu_224", {}, openai_clip),
    ("Hugging Face CLIP", "vit_base_patch16_clip_quickgelu_224", {}, hf_clip),
    ("Hugging Face ViT", "vit_tiny_patch16_224", {}, hf_vit),
    ("Hugging Face ViT", "vit_small_patch14_dinov2", {"patch_size": 16}, hf_dinov2),
    ("Hugging Face ViT", "vit_small_patch14_reg4_dinov2", {"patch_size": 16}, hf_dinov2),
    ("Hugging Face ViT", "beit_base_patch16_224", {}, hf_beit),
]


@pytest.mark.parametrize(
    ("kind", "name", "kwargs", "write"), FILES, ids=[f"{name}-{write.__name__}" for _, name, _, write in FILES]
)
def test_outputs_are_timms(
    kind: str, name: str, kwargs: dict[str, Any], write: Callable[[Any], Weights], tmp_path: Path
) -> None:
    reference = network(name, **kwargs)
    weights = write(reference)
    torch.save(weights, tmp_path / "teacher.pth")
    assert to_timm_names(weights, "file")[0] == kind
    teacher = TimmTeacher(name, checkpoint=tmp_path / "teacher.pth", allow_random=True, **{**SIZES, **kwargs})
    teacher.prepare((4, 4), 16)
    images = torch.rand(2, 3, 64, 64)
    out = teacher(images, None, TeacherNeeds(blocks=(0, 1)))
    inputs = (images - teacher.mean) / teacher.std
    with torch.no_grad():
        expected = reference.forward_intermediates(inputs, indices=[0, 1], norm=False, intermediates_only=True)
    for block in (0, 1):
        torch.testing.assert_close(out.tokens[block], expected[block], rtol=1e-5, atol=1e-5)


def two_networks(first: str, second: str) -> tuple[Weights, Weights]:
    """A file with two networks, and the second one."""
    own, other = network("vit_tiny_patch16_224").state_dict(), network("vit_tiny_patch16_224").state_dict()
    other = {key: value + 1.0 for key, value in other.items()}
    return {f"{first}{k}": v for k, v in own.items()} | {f"{second}{k}": v for k, v in other.items()}, other


def test_of_a_student_and_its_teacher_the_teacher_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    monkeypatch.setattr("hgkd.weights.vit_names.print_log", lambda text, *_: logged.append(text))
    weights, expected = two_networks("student.backbone.", "teacher.backbone.")  # as DINOv2's training writes them
    weights["student.dino_head.mlp.0.weight"] = torch.ones(2)
    torch.save({"model": weights}, tmp_path / "training.pth")
    teacher = TimmTeacher("vit_tiny_patch16_224", checkpoint=tmp_path / "training.pth", allow_random=True, **SIZES)
    assert all(torch.equal(value, expected[key]) for key, value in teacher.network.state_dict().items())
    assert "network at 'teacher.backbone.', the teacher's of 2 equal ones" in "".join(logged)
    assert identify(tmp_path / "training.pth").prefix == "teacher.backbone."


def test_of_two_networks_none_is_guessed(tmp_path: Path) -> None:
    weights, _ = two_networks("left_hand.", "righthand.")
    with refused(WeightsError, "network-found-several-times", "2", "left_hand.", "righthand."):
        to_timm_names(weights, "file.pth")
    torch.save(weights, tmp_path / "two.pth")
    assert "2 of them, under 'left_hand.', 'righthand.'" in identify(tmp_path / "two.pth").detail
    weights, expected = two_networks("momentum_encoder.", "base_encoder.")  # MoCo v3's: the shorter place
    assert all(torch.equal(value, expected[key]) for key, value in to_timm_names(weights, "file.pth")[1].items())


def test_hugging_face_mae_with_its_decoder(tmp_path: Path) -> None:
    arch = make_arch(
        dict(embed_dim=16, depth=2, num_heads=2, decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2, image_size=(32, 32))
    )
    reference = MaskedAutoencoder(arch).eval()
    for p in reference.parameters():
        p.data += 0.1 * torch.randn_like(p)
    own = split_qkv(reference.state_dict(), lambda part, kind: f"{part}.{kind}")
    encoder = {k: v for k, v in own.items() if not k.startswith(("decoder", "mask_token"))}
    decoder = {k.removeprefix("decoder_"): v for k, v in own.items() if k.startswith("decoder_blocks.")}
    table = HF_VIT | {r"encoder\.layer": "decoder_layers"}
    weights = {f"vit.{k}": v for k, v in renamed(encoder, HF_VIT).items()}
    weights |= {f"decoder.{k}": v for k, v in renamed(decoder, table).items()}
    weights |= {
        f"decoder.{k}": own[k] for k in own if k.startswith(("decoder_embed", "decoder_pos", "decoder_norm", "decoder_pred"))
    }
    weights["decoder.mask_token"] = own["mask_token"]
    torch.save(weights, tmp_path / "mae.bin")
    teacher = MAETeacher(tmp_path / "mae.bin", num_heads=2, decoder_num_heads=2)
    assert teacher.info.kind == "mae"
    expected = reference.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in teacher.network.state_dict().items())


def test_beit_on_another_grid_is_timms_own_resizing(tmp_path: Path) -> None:
    reference = network("beit_base_patch16_224")
    torch.save(reference.state_dict(), tmp_path / "beit.pth")
    teacher = TimmTeacher("beit_base_patch16_224", checkpoint=tmp_path / "beit.pth", allow_random=True, **SIZES)
    images = torch.rand(1, 3, 96, 64)
    for grid in ((2, 2), (6, 4)):  # the second from the file's biases, not from the first
        teacher.prepare(grid, 16)
    reference.set_input_size(img_size=(96, 64))
    with torch.no_grad():
        expected = reference.forward_intermediates(
            (images - teacher.mean) / teacher.std, indices=[1], norm=False, intermediates_only=True
        )[0]
    torch.testing.assert_close(teacher(images, None, TeacherNeeds(blocks=(1,))).tokens[1], expected, rtol=1e-5, atol=1e-5)


def test_shared_biases_of_beit(tmp_path: Path) -> None:
    kwargs = dict(use_rel_pos_bias=False, use_shared_rel_pos_bias=True)
    reference = network("beit_base_patch16_224", **kwargs)
    torch.save(reference.state_dict(), tmp_path / "beit.pth")
    teacher = TimmTeacher("beit_base_patch16_224", checkpoint=tmp_path / "beit.pth", allow_random=True, **SIZES, **kwargs)
    teacher.prepare((4, 4), 16)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = reference.forward_intermediates(
            (images - teacher.mean) / teacher.std, indices=[1], norm=False, intermediates_only=True
        )[0]
    torch.testing.assert_close(teacher(images, None, TeacherNeeds(blocks=(1,))).tokens[1], expected, rtol=1e-5, atol=1e-5)


def test_what_beit_cannot_do_is_refused() -> None:
    teacher = TimmTeacher("beit_base_patch16_224", allow_random=True, **SIZES)
    teacher.prepare((2, 2), 32)
    with refused(ValueError, "teacher-sees-whole-images", "BEiT"):
        teacher.check(TeacherNeeds(blocks=(0,), visible_only=True))
    with refused(ValueError, "teacher-without-attention", "BEiT"):
        teacher.attention(torch.rand(1, 3, 64, 64))


def test_nothing_is_lost_or_invented_in_silence(tmp_path: Path) -> None:
    reference = network("vit_tiny_patch16_224")
    for change, refusal in (
        (
            lambda w: w.pop("vit.encoder.layer.1.attention.attention.key.weight"),
            ("weights-of-another-network", "blocks.1.attn"),
        ),
        (
            lambda w: w.update({"vit.encoder.layer.0.adapter.weight": torch.ones(1)}),
            ("weights-of-another-network", "encoder.layer.0.adapter.weight"),
        ),
    ):
        weights = hf_vit(reference)
        change(weights)
        torch.save(weights, tmp_path / "teacher.pth")
        with refused(WeightsError, *refusal):
            TimmTeacher("vit_tiny_patch16_224", checkpoint=tmp_path / "teacher.pth", **SIZES)
    with refused(WeightsError, "vit-naming-unknown", "layer1.0.conv1.weight"):
        to_timm_names({"layer1.0.conv1.weight": torch.ones(1)}, "file")


def test_a_clip_file_does_not_load_into_another_vit(tmp_path: Path) -> None:
    torch.save(openai_clip(network("vit_base_patch16_clip_224")), tmp_path / "clip.pth")
    with refused(WeightsError, "weights-of-another-network", "norm_pre.weight"):
        TimmTeacher("vit_tiny_patch16_224", checkpoint=tmp_path / "clip.pth", **SIZES)


def of_timm(name: str, **kwargs: Any) -> Weights:
    with torch.device("meta"):
        return dict(timm.create_model(name, num_classes=0, **kwargs).state_dict())


FOREIGN: dict[str, tuple[Callable[[], Weights], str]] = {
    "Swin": (lambda: of_timm("swin_tiny_patch4_window7_224"), "looks like a Swin Transformer"),
    "SAM": (lambda: of_timm("samvit_base_patch16_224", depth=2), "looks like the ViT of SAM"),
    "relative positions": (
        lambda: of_timm("vit_relpos_small_patch16_224", depth=2),
        "looks like a ViT with relative positions",
    ),
    "Hiera": (lambda: of_timm("hiera_tiny_224"), "looks like Hiera"),
    "PVT": (lambda: of_timm("pvt_v2_b0"), "no row of blocks"),
    "ConvNeXt": (lambda: of_timm("convnext_atto"), "looks like a ConvNeXt"),
    "ResNet": (lambda: of_timm("resnet18"), "looks like a ResNet"),
    "video": (lambda: {"patch_embed.proj.weight": torch.zeros(4, 3, 2, 16, 16)}, "looks like a video or volume ViT"),
    "register tokens alone": (lambda: {"register_tokens": torch.zeros(1, 4, 8)}, "no row of blocks"),
}


@pytest.mark.parametrize("family", FOREIGN)
def test_a_file_that_is_no_vit_of_equal_blocks_ends_in_what_it_looks_like(family: str) -> None:
    make, looks = FOREIGN[family]
    with pytest.raises(WeightsError, match=rf"^file\.pth .*{looks}"):
        to_timm_names(make(), "file.pth")


ANCHORS = ("patch_embed.proj.weight", "register_tokens", "embeddings.patch_embeddings.projection.weight", "pos_embed")


@given(
    st.sets(
        st.sampled_from([*ANCHORS, "embeddings.patch_embedding.weight", "cls_token", "blocks.0.norm1.weight", "blocks.x"]),
        min_size=1,
    ),
    st.sampled_from(["", "model.", "visual."]),
)
def test_any_half_of_a_naming_ends_in_names_or_a_weights_error(keys: set[str], place: str) -> None:
    weights = {place + key: torch.zeros(1, 2, 4) for key in keys}
    try:
        _, found = to_timm_names(weights, "file.pth")
    except WeightsError:
        return
    assert "patch_embed.proj.weight" in found
    assert "blocks.0.norm1.weight" in found


def test_siglip_of_transformers_and_its_pooling_head() -> None:
    model = network("vit_base_patch16_siglip_gap_224")
    weights = split_qkv(dict(model.state_dict()), lambda part, kind: f"{part[0]}_proj.{kind}")
    weights = renamed(
        weights,
        {
            r"^patch_embed\.proj": "embeddings.patch_embedding",
            r"^pos_embed$": "embeddings.position_embedding.weight",
            r"^norm\.": "post_layernorm.",
            r"^blocks\.(\d+)\.attn\.proj": r"encoder.layers.\1.self_attn.out_proj",
            r"^blocks\.(\d+)\.attn": r"encoder.layers.\1.self_attn",
            r"^blocks\.(\d+)\.norm": r"encoder.layers.\1.layer_norm",
            r"^blocks\.(\d+)\.mlp": r"encoder.layers.\1.mlp",
        },
    )
    weights["embeddings.position_embedding.weight"] = weights["embeddings.position_embedding.weight"][0]
    weights["head.probe"] = torch.zeros(1, 1, 16)
    with_text = {f"vision_model.{key}": value for key, value in weights.items()} | {"logit_scale": torch.zeros(1)}
    found = to_timm_names(with_text, "siglip")[1]
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["vit_base_patch16_siglip_224", "vit_base_patch16_siglip_gap_224"])
@pytest.mark.parametrize("in_file", ["vit_base_patch16_siglip_224", "vit_base_patch16_siglip_gap_224"])
def test_siglips_attention_pooling_is_left_aside(name: str, in_file: str, tmp_path: Path) -> None:
    """timm has names with and without it (siglip, siglip_gap) for the same tower; no feature comes from it."""
    source = network(in_file)
    torch.save(source.state_dict(), tmp_path / "siglip.pth")
    teacher = TimmTeacher(name, checkpoint=tmp_path / "siglip.pth", allow_random=True, **SIZES)
    assert torch.equal(teacher.network.blocks[1].mlp.fc2.weight, source.blocks[1].mlp.fc2.weight)
