"""Files as DINOv3, EUPE, the Perception Encoder, SigLIP2 and AIMv2 are published: outputs equal timm's on the same tensors.

The names are written here from the published files, by hand. Where timm has a translation of its own, it is the reference; for
Hugging Face's names the reference is the network that the tensors were taken from.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import convnext, eva, vision_transformer
from torch import Tensor

from hgkd.errors import WeightsError, code_of
from hgkd.networks import ImageClassifier, build_encoder
from hgkd.networks.encoder import encoder_features, encoder_levels
from hgkd.structures import TeacherNeeds
from hgkd.teachers import TimmTeacher
from hgkd.weights.identify import Kind, identify

Weights = dict[str, Tensor]
SIZES: dict[str, Any] = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 64, "patch_size": 16}
CONVNEXT: dict[str, Any] = {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 16)}


def recipe(shapes: Mapping[str, tuple[int, ...]]) -> Weights:
    """Numbers from a fixed recipe: every entry is other than every other."""
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def like(network: Any) -> Weights:
    return recipe({key: tuple(value.shape) for key, value in network.state_dict().items()})


def made(name: str, weights: Weights | None = None, **kwargs: Any) -> Any:
    network = timm.create_model(name, num_classes=0, **{**SIZES, **kwargs}).eval()
    network.load_state_dict(like(network) if weights is None else weights, strict=True)
    return network


def same_tokens(file: Path, reference: Any, name: str, **kwargs: Any) -> TimmTeacher:
    teacher = TimmTeacher(name, checkpoint=file, allow_random=True, **{**SIZES, **kwargs})
    teacher.prepare((4, 4), 16)
    images = torch.rand(2, 3, 64, 64)
    out = teacher(images, None, TeacherNeeds(blocks=(0, 1)))
    with torch.no_grad():
        inputs = (images - teacher.mean) / teacher.std
        expected = reference.forward_intermediates(inputs, indices=[0, 1], norm=False, intermediates_only=True)
    for block in (0, 1):
        torch.testing.assert_close(out.tokens[block], expected[block], rtol=1e-5, atol=1e-5)
    return teacher


def official_dinov3(gated: bool = False, zero_biases: bool = False) -> Weights:
    """facebookresearch/dinov3, a ViT."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, 32),
        "storage_tokens": (1, 4, 32),
        "mask_token": (1, 32),
        "patch_embed.proj.weight": (32, 3, 16, 16),
        "patch_embed.proj.bias": (32,),
        "norm.weight": (32,),
        "norm.bias": (32,),
    }
    layers = {"w1": (64, 32), "w2": (64, 32), "w3": (32, 64)} if gated else {"fc1": (128, 32), "fc2": (32, 128)}
    for i in range(2):
        block = {"norm1": (32,), "norm2": (32,), "attn.qkv": (96, 32), "attn.proj": (32, 32)}
        for layer, shape in {**block, **{f"mlp.{key}": shape for key, shape in layers.items()}}.items():
            shapes[f"blocks.{i}.{layer}.weight"] = shape
            shapes[f"blocks.{i}.{layer}.bias"] = shape[:1]
        shapes[f"blocks.{i}.ls1.gamma"] = shapes[f"blocks.{i}.ls2.gamma"] = (32,)
    weights = recipe(shapes)
    for i in range(2):
        mask = torch.ones(96)
        mask[32:64] = 0
        weights[f"blocks.{i}.attn.qkv.bias_mask"] = mask
        if zero_biases:
            weights[f"blocks.{i}.attn.qkv.bias"] = torch.zeros(96)
    weights["rope_embed.periods"] = (100 ** (torch.arange(4) / 4)).bfloat16()
    return weights


def eupe() -> Weights:
    """facebookresearch/eupe: DINOv3's names, and the distillation's projectors beside them."""
    return {**official_dinov3(), "projectors.dinov3.0.weight": torch.ones(8, 32), "projectors.dinov3.0.bias": torch.ones(8)}


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("vit_small_patch16_dinov3_qkvb", official_dinov3()),
        ("vit_small_patch16_dinov3", official_dinov3(zero_biases=True)),
        ("vit_tiny_patch16_dinov3_qkvb", eupe()),
        ("vit_small_plus_patch16_dinov3_qkvb", official_dinov3(gated=True)),
    ],
    ids=["dinov3-biases", "dinov3-zero-biases", "eupe", "dinov3-gated"],
)
def test_official_dinov3_and_eupe(name: str, weights: Weights, tmp_path: Path) -> None:
    kwargs = {"mlp_ratio": 2} if "plus" in name else {}
    torch.save(weights, tmp_path / "teacher.pth")
    model = timm.create_model(name, num_classes=0, **SIZES, **kwargs)
    reference = made(name, eva.checkpoint_filter_fn(dict(weights), model), **kwargs)
    teacher = same_tokens(tmp_path / "teacher.pth", reference, name, **kwargs)
    assert teacher.capabilities.registers == 4
    found = identify(tmp_path / "teacher.pth")
    assert (found.kind, found.naming) == (Kind.VIT, "official DINOv3")
    wrapped = {f"backbone._orig_mod.{key}": value for key, value in weights.items()}
    torch.save({"model": {"module." + key: value for key, value in wrapped.items()}}, tmp_path / "wrapped.pth")
    same_tokens(tmp_path / "wrapped.pth", reference, name, **kwargs)


def test_biases_that_a_network_lacks_are_not_dropped_in_silence(tmp_path: Path) -> None:
    torch.save(official_dinov3(), tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"The file has biases .* set model\.teacher\.name=vit_small_patch16_dinov3_qkvb"):
        TimmTeacher("vit_small_patch16_dinov3", checkpoint=tmp_path / "a.pth", **SIZES)
    without = {key: value for key, value in official_dinov3().items() if "qkv.bias" not in key}
    torch.save(without, tmp_path / "b.pth")
    with pytest.raises(
        WeightsError, match=r"no biases of queries and values: set model\.teacher\.name=vit_small_patch16_dinov3$"
    ):
        TimmTeacher("vit_small_patch16_dinov3_qkvb", checkpoint=tmp_path / "b.pth", **SIZES)


def test_rotary_positions_of_other_periods_are_refused(tmp_path: Path) -> None:
    weights = official_dinov3(zero_biases=True)
    weights["rope_embed.periods"] = 50 ** (torch.arange(4) / 4)
    torch.save(weights, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"4 periods from 1 to 18\.8, the network 4 from 1 to 31\.6") as caught:
        TimmTeacher("vit_small_patch16_dinov3", checkpoint=tmp_path / "a.pth", **SIZES)
    assert code_of(caught.value) == "other-rotary-positions"


def by_patterns(weights: Weights, table: Mapping[str, str]) -> Weights:
    out = {}
    for key, value in weights.items():
        for old, new in table.items():
            key = re.sub(old, new, key)
        out[key] = value
    return out


def halves(weights: Weights, place: str) -> Weights:
    """``qkv`` taken apart into three layers, under ``place`` (with {} for q, k or v)."""
    out = {}
    for key, value in weights.items():
        found = re.fullmatch(r"blocks\.(\d+)\.attn\.(?:qkv\.(weight|bias)|([qv])_bias)", key)
        if found is None:
            out[key] = value
        elif found[3]:
            out[place.format(i=found[1], part=found[3]) + "bias"] = value
        else:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                out[place.format(i=found[1], part=part) + found[2]] = rows.clone()
    return out


def hf_dinov3(model: Any) -> Weights:
    """transformers' DINOv3ViTModel; names: https://github.com/Intellindust-AI-Lab/DEIMv2/issues/68."""
    weights = halves(model.state_dict(), "layer.{i}.attention.{part}_proj.")
    table = {
        r"^blocks\.(\d+)\.": r"layer.\1.",
        r"attn\.proj": "attention.o_proj",
        r"gamma_([12])": r"layer_scale\1.lambda1",
        r"mlp\.fc1_g": "mlp.gate_proj",
        r"mlp\.fc1(_x)?\.": "mlp.up_proj.",
        r"mlp\.fc2": "mlp.down_proj",
        r"^cls_token": "embeddings.cls_token",
        r"^reg_token": "embeddings.register_tokens",
        r"^patch_embed\.proj": "embeddings.patch_embeddings",
    }
    return by_patterns(weights, table) | {"embeddings.mask_token": torch.zeros(1, 1, 32)}


def hf_siglip2(model: Any) -> Weights:
    """transformers' Siglip2Model of a fixed resolution (the names of SigLIP), both towers."""
    weights = halves(model.state_dict(), "encoder.layers.{i}.self_attn.{part}_proj.")
    pooling = {key for key in weights if key.startswith("attn_pool.")}
    table = {
        r"^blocks\.(\d+)\.": r"encoder.layers.\1.",
        r"attn\.proj": "self_attn.out_proj",
        r"norm([12])\.": r"layer_norm\1.",
        r"^patch_embed\.proj": "embeddings.patch_embedding",
        r"^norm\.": "post_layernorm.",
    }
    tower = by_patterns({key: value for key, value in weights.items() if key not in pooling}, table)
    tower["embeddings.position_embedding.weight"] = tower.pop("pos_embed")[0]
    tower["head.probe"] = torch.ones(1, 1, 32)
    tower["head.attention.in_proj_weight"] = torch.ones(96, 32)
    text = {"text_model.embeddings.token_embedding.weight": torch.ones(4, 32), "logit_scale": torch.ones(1)}
    return {f"vision_model.{key}": value for key, value in tower.items()} | text


def hf_siglip2_naflex(model: Any) -> Weights:
    """The same for any resolution, whose patches are flattened by (row, column, channel) and projected by a linear layer."""
    weights = hf_siglip2(model)
    name = "vision_model.embeddings.patch_embedding.weight"
    weights[name] = weights[name].permute(0, 2, 3, 1).flatten(1)
    return weights


def hf_aimv2(model: Any) -> Weights:
    """transformers' Aimv2VisionModel."""
    weights = halves(model.state_dict(), "encoder.layers.{i}.attention.{part}_proj.")
    table = {
        r"^blocks\.(\d+)\.norm([12])": r"encoder.layers.\1.rms_norm\2",
        r"^blocks\.(\d+)\.attn\.proj": r"encoder.layers.\1.attention.out_proj",
        r"^blocks\.(\d+)\.mlp\.fc1_g": r"encoder.layers.\1.ffn.gate_proj",
        r"^blocks\.(\d+)\.mlp\.fc1_x": r"encoder.layers.\1.ffn.up_proj",
        r"^blocks\.(\d+)\.mlp\.fc2": r"encoder.layers.\1.ffn.down_proj",
        r"^patch_embed\.proj": "embeddings.patch_embed",
        r"^patch_embed\.norm": "embeddings.rms_norm",
        r"^norm\.": "rms_norm.",
    }
    found = by_patterns(weights, table)
    found["embeddings.position_embedding.weight"] = found.pop("pos_embed")[0]
    return found


HUGGING_FACE: list[tuple[str, str, dict[str, Any], Callable[[Any], Weights]]] = [
    ("Hugging Face DINOv3", "vit_small_patch16_dinov3_qkvb", {}, hf_dinov3),
    ("Hugging Face DINOv3", "vit_small_patch16_dinov3", {}, hf_dinov3),
    ("Hugging Face DINOv3", "vit_small_plus_patch16_dinov3_qkvb", {}, hf_dinov3),
    ("Hugging Face CLIP", "vit_base_patch16_siglip_224", {}, hf_siglip2),
    ("Hugging Face CLIP", "vit_base_patch16_siglip_256", {}, hf_siglip2_naflex),
    ("Hugging Face AIMv2", "aimv2_large_patch14_224", {}, hf_aimv2),
]


@pytest.mark.parametrize(
    ("naming", "name", "kwargs", "write"), HUGGING_FACE, ids=[f"{name}-{write.__name__}" for _, name, _, write in HUGGING_FACE]
)
def test_hugging_face(naming: str, name: str, kwargs: dict[str, Any], write: Callable[[Any], Weights], tmp_path: Path) -> None:
    reference = made(name, **kwargs)
    weights = write(reference)
    save_file({key: value.contiguous() for key, value in weights.items()}, tmp_path / "model.safetensors")
    assert identify(tmp_path / "model.safetensors").naming == naming
    same_tokens(tmp_path / "model.safetensors", reference, name, **kwargs)


def test_aimv2_as_apple_names_it(tmp_path: Path) -> None:
    name = "aimv2_large_patch14_224"
    table = {
        r"^patch_embed\.": "preprocessor.patchifier.",
        r"^pos_embed": "preprocessor.pos_embed",
        r"^blocks\.(\d+)\.norm([12])": r"trunk.blocks.\1.norm_\2",
        r"^blocks\.": "trunk.blocks.",
        r"mlp\.fc1_g": "mlp.fc1",
        r"mlp\.fc1_x": "mlp.fc3",
        r"^norm\.": "trunk.post_trunk_norm.",
    }
    weights = by_patterns(like(timm.create_model(name, num_classes=0, **SIZES)), table)
    torch.save(weights, tmp_path / "a.pth")
    model = timm.create_model(name, num_classes=0, **SIZES)
    reference = made(name, vision_transformer.checkpoint_filter_fn(dict(weights), model))
    same_tokens(tmp_path / "a.pth", reference, name)


def test_perception_encoder_as_it_is_published(tmp_path: Path) -> None:
    name = "vit_pe_spatial_tiny_patch16_512"
    model = timm.create_model(name, num_classes=0, init_values=0.1, **SIZES)
    weights = by_patterns(
        like(model),
        {
            r"^blocks\.": "transformer.resblocks.",
            r"attn\.qkv\.": "attn.in_proj_",
            r"attn\.proj": "attn.out_proj",
            r"norm([12])\.": r"ln_\1.",
            r"gamma_([12])": r"ls_\1.gamma",
            r"mlp\.fc1": "mlp.c_fc",
            r"mlp\.fc2": "mlp.c_proj",
            r"^norm_pre": "ln_pre",
            r"^norm\.": "ln_post.",
            r"^patch_embed\.proj": "conv1",
            r"^cls_token": "class_embedding",
            r"^pos_embed": "positional_embedding",
        },
    )
    weights["positional_embedding"] = weights["positional_embedding"][0]
    if "class_embedding" in weights:
        weights["class_embedding"] = weights["class_embedding"].flatten()
    torch.save({f"visual.{key}": value for key, value in weights.items()}, tmp_path / "a.pth")
    reference = made(name, eva.checkpoint_filter_fn(dict(weights), model), init_values=0.1)
    same_tokens(tmp_path / "a.pth", reference, name, init_values=0.1)


def test_several_files_and_an_average(tmp_path: Path) -> None:
    name = "vit_small_patch16_dinov3"
    network, averaged = made(name), made(name)
    for value in averaged.state_dict().values():
        value.mul_(1.5)
    state = network.state_dict()
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for part, keys in parts.items():
        save_file({key: state[key] for key in keys}, tmp_path / part)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: part for part, keys in parts.items() for key in keys}}))
    same_tokens(index, network, name)
    with pytest.raises(WeightsError, match="part 1 of 2; give the index file") as caught:
        same_tokens(tmp_path / "model-00001-of-00002.safetensors", network, name)
    assert code_of(caught.value) == "one-part-of-several"
    both = tmp_path / "both.pth"
    torch.save({"state_dict": state, "state_dict_ema": averaged.state_dict()}, both)
    same_tokens(both, network, name)
    same_tokens(both, averaged, name, ema=True)
    with pytest.raises(ValueError, match="both choose a set of weights"):
        same_tokens(both, averaged, name, ema=True, entry="state_dict")
    torch.save({"state_dict": state}, both)
    with pytest.raises(WeightsError, match="holds no moving average"):
        same_tokens(both, averaged, name, ema=True)


def official_convnext(projectors: bool) -> Weights:
    """facebookresearch/dinov3's and eupe's ConvNeXt: the official names, a norm of every stage's feature."""
    model = timm.create_model("convnext_tiny", num_classes=0, **CONVNEXT)
    table = {
        r"^stem\.": "downsample_layers.0.",
        r"^stages\.(\d)\.downsample\.": r"downsample_layers.\1.",
        r"^stages\.(\d)\.blocks\.": r"stages.\1.",
        r"conv_dw": "dwconv",
        r"mlp\.fc": "pwconv",
        r"^head\.norm": "norm",
    }
    weights = by_patterns(like(model), table)
    for part in ("weight", "bias"):
        weights[f"norms.3.{part}"] = weights[f"norm.{part}"].clone()
        if projectors:
            weights[f"projectors.teacher.0.{part}"] = torch.ones(4)
    return weights


def hf_convnext() -> Weights:
    """transformers' DINOv3ConvNextModel."""
    model = timm.create_model("convnext_tiny", num_classes=0, **CONVNEXT)
    table = {
        r"^stem\.": "stages.0.downsample_layers.",
        r"^stages\.(\d)\.downsample\.": r"stages.\1.downsample_layers.",
        r"^stages\.(\d)\.blocks\.": r"stages.\1.layers.",
        r"conv_dw": "depthwise_conv",
        r"(layers\.\d+)\.norm": r"\1.layer_norm",
        r"mlp\.fc": "pointwise_conv",
        r"^head\.norm": "layer_norm",
    }
    return by_patterns(like(model), table)


@pytest.mark.parametrize(
    ("weights", "naming"),
    [
        (official_convnext(False), "official ConvNeXt"),
        (official_convnext(True), "official ConvNeXt"),
        (hf_convnext(), "transformers DINOv3 ConvNeXt"),
    ],
    ids=["dinov3", "eupe", "transformers"],
)
def test_convnexts_teach_and_start_a_student(weights: Weights, naming: str, tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "a.pth")
    assert (identify(tmp_path / "a.pth").kind, identify(tmp_path / "a.pth").naming) == (Kind.CNN, naming)
    reference = timm.create_model("convnext_tiny", num_classes=0, **CONVNEXT).eval()
    if naming.startswith("official"):
        reference.load_state_dict(convnext.checkpoint_filter_fn(dict(weights), reference))
    else:
        reference.load_state_dict(like(reference))
    teacher = TimmTeacher(
        "convnext_tiny.dinov3_lvd1689m", checkpoint=tmp_path / "a.pth", allow_random=True, level=2, **CONVNEXT
    )
    assert teacher.prepare((4, 4), 16) == (4, 4)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = reference.forward_intermediates((images - teacher.mean) / teacher.std, intermediates_only=True)
    torch.testing.assert_close(teacher(images).tokens[0], expected[2], rtol=1e-5, atol=1e-5)
    student = build_encoder("convnext_tiny", checkpoint=tmp_path / "a.pth", **CONVNEXT).eval()
    with torch.no_grad():
        found = encoder_features(student, images, encoder_levels(student))
        wanted = reference.forward_intermediates(images, intermediates_only=True)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_fine_tuning_starts_from_official_dinov3(tmp_path: Path) -> None:
    torch.save(official_dinov3(), tmp_path / "a.pth")
    sizes = {key: value for key, value in SIZES.items() if key != "img_size"}
    model = ImageClassifier("vit_small_patch16_dinov3_qkvb", 3, 64, backbone=tmp_path / "a.pth", **sizes)
    weights = official_dinov3()
    assert torch.equal(model.network.blocks[1].gamma_2, weights["blocks.1.ls2.gamma"])
    assert torch.equal(model.network.blocks[1].attn.v_bias, weights["blocks.1.attn.qkv.bias"][64:])
    assert torch.equal(model.network.reg_token, weights["storage_tokens"])
