"""The network that a file's own shapes describe, on the meta device: without weights and without a name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import RmsNorm, SwiGLU, SwiGLUPacked
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from hgkd.errors import WeightsError
from hgkd.pixels import check_channels
from hgkd.weights.vit_names import count_blocks

_ROTARY = (".attn.q_bias", ".gamma_1", ".attn.q_proj.weight", ".attn.norm.weight", ".mlp.norm.weight")


def vit_of(weights: Mapping[str, Tensor], source: str) -> Any:
    """The network that a ViT's weights describe. What no shape tells, the number of heads say, is any.

    Args:
        weights: under timm's names.

    Raises:
        WeightsError: they are of no ViT of equal blocks.
    """
    patches = weights["patch_embed.proj.weight"]
    width, patch = patches.shape[0], patches.shape[-1]
    gated = "blocks.0.mlp.fc1_g.weight" in weights
    fc1, fc2 = weights.get(f"blocks.0.mlp.fc1{'_g' * gated}.weight"), weights.get("blocks.0.mlp.fc2.weight")
    if patches.ndim != 4 or patches.shape[-2] != patch or fc1 is None or fc2 is None:
        shapes = f"patches {tuple(patches.shape)}" + ("" if fc1 is not None else ", blocks without mlp.fc1")
        raise WeightsError(
            "file-not-plain-vit", f"{source} is of no ViT of equal blocks: {shapes}; name its network (model.teacher.name)"
        )
    try:
        check_channels(patches.shape[1], f"the number of channels of {source}")
    except ValueError as error:
        raise WeightsError("channels-not-rgb", str(error)) from error
    sizes: dict[str, Any] = {
        "patch_size": patch,
        "embed_dim": width,
        "depth": count_blocks(weights),
        "mlp_ratio": fc1.shape[0] / width,
        "num_classes": 0,
    }
    packed = fc1.shape[0] == 2 * fc2.shape[1]
    with torch.device("meta"):
        tables = [key for key in weights if key.endswith("relative_position_bias_table")]
        if tables:
            return _beit(weights, tables, {**sizes, **({"swiglu_mlp": True} if packed or gated else {})})
        rotary = "pos_embed" not in weights or "rope.freqs" in weights
        if rotary or any(key.startswith("blocks.0") and key.endswith(_ROTARY) for key in weights):
            return _eva(weights, {**sizes, "mlp_ratio": fc2.shape[1] / width}, packed or gated)
        if packed or gated:
            sizes["mlp_layer"] = SwiGLU if gated else SwiGLUPacked
        return _vit(weights, sizes)


def _positions(weights: Mapping[str, Tensor], prefix: int) -> tuple[int, bool]:
    """How many patches the positions are for, and whether the tokens before the patches have none."""
    positions = weights["pos_embed"].shape[1]
    outside = math.isqrt(positions) ** 2 == positions and prefix > 0
    return positions if outside else positions - prefix, outside


def _image(patches: int, patch: int) -> tuple[int, int]:
    side = math.isqrt(max(patches, 1))
    return (side * patch, side * patch) if side * side == patches else (patches * patch, patch)


def _beit(weights: Mapping[str, Tensor], tables: Sequence[str], sizes: dict[str, Any]) -> Beit:
    entries, heads = weights[tables[0]].shape
    side = (math.isqrt(entries - 3) + 1) // 2  # (2 * side - 1)^2 distances, and three of the class token
    shared = tables[0].startswith("rel_pos_bias.")
    return Beit(
        img_size=side * sizes["patch_size"],
        num_heads=heads,
        qkv_bias="blocks.0.attn.q_bias" in weights,
        init_values=1.0 if "blocks.0.gamma_1" in weights else None,
        use_abs_pos_emb="pos_embed" in weights,
        use_rel_pos_bias=not shared,
        use_shared_rel_pos_bias=shared,
        **sizes,
    )


def _eva(weights: Mapping[str, Tensor], sizes: dict[str, Any], gated: bool) -> Eva:
    width, patch = sizes["embed_dim"], sizes["patch_size"]
    class_token, registers = "cls_token" in weights, weights["reg_token"].shape[1] if "reg_token" in weights else 0
    prefix = class_token + registers
    patches, outside = _positions(weights, prefix) if "pos_embed" in weights else (16, False)
    frequencies, key_norm = weights.get("rope.freqs"), weights.get("blocks.0.attn.q_norm.weight")
    heads = max(1, width // 64) if width % 64 == 0 else 1
    heads = heads if key_norm is None else width // key_norm.shape[0]
    split, fused_bias = "blocks.0.attn.q_proj.weight" in weights, "blocks.0.attn.qkv.bias" in weights
    layer: dict[str, Any] = {"norm_layer": RmsNorm} if "blocks.0.norm1.bias" not in weights else {}
    return Eva(
        img_size=_image(patches, patch),
        num_heads=heads if frequencies is None else frequencies.shape[2],
        qkv_bias=fused_bias or any(f"blocks.0.attn.{name}" in weights for name in ("q_bias", "q_proj.bias")),
        qkv_fused=not split,
        attn_type="rope" if fused_bias or "blocks.0.attn.k_proj.bias" in weights else "eva",
        qk_norm=key_norm is not None,
        swiglu_mlp=gated,
        swiglu_align_to=1 if "blocks.0.mlp.fc1_g.weight" in weights else 0,
        scale_mlp="blocks.0.mlp.norm.weight" in weights,
        scale_attn_inner="blocks.0.attn.norm.weight" in weights,
        init_values=1e-5 if "blocks.0.gamma_1" in weights else None,
        class_token=class_token,
        num_reg_tokens=registers,
        no_embed_class=outside,
        use_abs_pos_emb="pos_embed" in weights,
        use_rot_pos_emb=True,
        rope_type="cat" if frequencies is None else "mixed",
        use_pre_transformer_norm="norm_pre.weight" in weights,
        global_pool="token" if class_token else "avg",
        **layer,
        **sizes,
    )


def _vit(weights: Mapping[str, Tensor], sizes: dict[str, Any]) -> VisionTransformer:
    width, patch = sizes["embed_dim"], sizes["patch_size"]
    class_token, registers = "cls_token" in weights, weights["reg_token"].shape[1] if "reg_token" in weights else 0
    distilled = "dist_token" in weights
    patches, outside = _positions(weights, class_token + registers + distilled)
    key_norm = weights.get("blocks.0.attn.q_norm.weight")
    heads = 1 if key_norm is None else width // key_norm.shape[0]  # no other shape depends on their number
    kind: type[VisionTransformer] = VisionTransformerDistilled if distilled else VisionTransformer
    if not distilled:
        sizes = {**sizes, "class_token": class_token, "reg_tokens": registers, "no_embed_class": outside}
        sizes["global_pool"] = "token" if class_token else "avg"
    if "blocks.0.norm1.bias" not in weights:  # AIMv2's
        sizes["norm_layer"] = RmsNorm
        sizes["embed_norm_layer"] = RmsNorm if "patch_embed.norm.weight" in weights else None
    if "blocks.0.attn.proj.bias" not in weights and "blocks.0.attn.proj.weight" in weights:
        sizes["proj_bias"] = False
    return kind(
        img_size=_image(patches, patch),
        num_heads=heads,
        qkv_bias="blocks.0.attn.qkv.bias" in weights,
        qk_norm=key_norm is not None,
        init_values=1e-5 if "blocks.0.ls1.gamma" in weights else None,
        pre_norm="norm_pre.weight" in weights,
        **sizes,
    )
