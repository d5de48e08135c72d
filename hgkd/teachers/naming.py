"""Weight files of ViTs in other namings, brought to timm's names by one table.

Known: timm and what shares its names (official MAE, DINO, DINOv2, BEiT and BEiTv2), OpenAI's CLIP (and open_clip), and Hugging
Face's ViT, DINO, MAE, DINOv2, BEiT and CLIP. A naming is recognised by one entry that it alone has, its anchor; what stands
before the anchor's name is the network's place in a larger model, whose other parts are left aside and counted in the log.

Facts from the projects' public code: DINOv2 with registers stores a position for the class token, which timm adds to the token;
BEiT's keys have no bias; CLIP keeps class token and positions without a batch axis.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from mmengine.logging import print_log
from torch import Tensor

from hgkd.errors import WeightsError

# heads, training remainders and what is computed anyway: no feature comes from there
_UNUSED = (
    r"head\..*|classifier\..*|lm_head\..*|pooler\..*|layernorm_head\..*",
    r".*relative_position_index",
    r"embeddings\.position_ids|embeddings\.mask_token",
)
_HF_BLOCK = r"encoder\.layer\.(\d+)\."
_HF_ATTENTION = (
    (_HF_BLOCK + r"attention\.attention\.(q)uery\.", r"blocks.\1.attn.\2."),
    (_HF_BLOCK + r"attention\.attention\.(k)ey\.", r"blocks.\1.attn.\2."),
    (_HF_BLOCK + r"attention\.attention\.(v)alue\.", r"blocks.\1.attn.\2."),
    (_HF_BLOCK + r"attention\.attention\.relative_position_bias\.", r"blocks.\1.attn."),
    (_HF_BLOCK + r"attention\.output\.dense\.", r"blocks.\1.attn.proj."),
    (_HF_BLOCK + r"intermediate\.dense\.", r"blocks.\1.mlp.fc1."),
    (_HF_BLOCK + r"output\.dense\.", r"blocks.\1.mlp.fc2."),
    (_HF_BLOCK + r"layernorm_before\.", r"blocks.\1.norm1."),
    (_HF_BLOCK + r"layernorm_after\.", r"blocks.\1.norm2."),
    (_HF_BLOCK + r"lambda_([12])", r"blocks.\1.gamma_\2"),  # BEiT
    (_HF_BLOCK + r"layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),  # DINOv2
    (_HF_BLOCK + r"(norm[12]|mlp\.fc[12])\.", r"blocks.\1.\2."),
    (_HF_BLOCK + r"mlp\.weights_in\.", r"blocks.\1.mlp.fc1."),  # DINOv2 giant
    (_HF_BLOCK + r"mlp\.weights_out\.", r"blocks.\1.mlp.fc2."),
)


@dataclass(frozen=True)
class Naming:
    """How a family of files names a ViT's weights.

    Attributes:
        kind: its name, for the log.
        anchor: an entry that every such file has and no other.
        renames: (pattern at the beginning of a name, replacement); the first that fits counts.
        beside: beginnings of entries outside the network's own place that belong to it as well.
        positions_of_class: the positions include the class token's although the network has registers.
    """

    kind: str
    anchor: str
    renames: tuple[tuple[str, str], ...]
    beside: tuple[str, ...] = ()
    positions_of_class: bool = False


NAMINGS = (
    Naming(
        "Hugging Face ViT",
        "embeddings.patch_embeddings.projection.weight",
        (
            *_HF_ATTENTION,
            (r"embeddings\.cls_token", "cls_token"),
            (r"embeddings\.register_tokens", "reg_token"),
            (r"embeddings\.position_embeddings", "pos_embed"),
            (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
            (r"encoder\.relative_position_bias\.", "rel_pos_bias."),
            (r"layernorm\.", "norm."),
            # MAE's decoder, in MAE's own names afterwards
            *((rule.replace(r"encoder\.layer", r"decoder\.decoder_layers"), "decoder_" + new) for rule, new in _HF_ATTENTION),
            (r"decoder\.mask_token", "mask_token"),
            (r"decoder\.(decoder_\w+)", r"\1"),
        ),
        beside=("decoder.",),
        positions_of_class=True,
    ),
    Naming(
        "Hugging Face CLIP",
        "embeddings.patch_embedding.weight",
        (
            (r"embeddings\.class_embedding", "cls_token"),
            (r"embeddings\.patch_embedding\.", "patch_embed.proj."),
            (r"embeddings\.position_embedding\.weight", "pos_embed"),
            (r"pre_layrnorm\.", "norm_pre."),
            (r"post_layernorm\.", "norm."),
            (r"encoder\.layers\.(\d+)\.self_attn\.(q|k|v)_proj\.", r"blocks.\1.attn.\2."),
            (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"blocks.\1.attn.proj."),
            (r"encoder\.layers\.(\d+)\.layer_norm([12])\.", r"blocks.\1.norm\2."),
            (r"encoder\.layers\.(\d+)\.mlp\.", r"blocks.\1.mlp."),
        ),
    ),
    Naming(
        "OpenAI CLIP",
        "transformer.resblocks.0.attn.in_proj_weight",
        (
            (r"class_embedding", "cls_token"),
            (r"positional_embedding", "pos_embed"),
            (r"conv1\.", "patch_embed.proj."),
            (r"ln_(pre)\.", r"norm_\1."),
            (r"ln_post\.", "norm."),
            (r"proj$", "head.weight"),
            (r"transformer\.resblocks\.(\d+)\.attn\.in_proj_", r"blocks.\1.attn.qkv."),
            (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.", r"blocks.\1.attn.proj."),
            (r"transformer\.resblocks\.(\d+)\.ln_([12])\.", r"blocks.\1.norm\2."),
            (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"blocks.\1.mlp.fc1."),
            (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"blocks.\1.mlp.fc2."),
        ),
    ),
    Naming(
        "DINOv2 with registers",
        "register_tokens",
        (
            (r"register_tokens", "reg_token"),
            (r"blocks\.\d+\.(\d+)\.", r"blocks.\1."),
            (r"blocks\.(\d+)\.mlp\.w12\.", r"blocks.\1.mlp.fc1."),
            (r"blocks\.(\d+)\.mlp\.w3\.", r"blocks.\1.mlp.fc2."),
        ),
        positions_of_class=True,
    ),
    Naming(
        "timm",
        "patch_embed.proj.weight",
        (
            (r"blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # DINOv2's training checkpoints group their blocks
            (r"blocks\.(\d+)\.mlp\.w12\.", r"blocks.\1.mlp.fc1."),  # DINOv2 giant
            (r"blocks\.(\d+)\.mlp\.w3\.", r"blocks.\1.mlp.fc2."),
        ),
    ),
)


def to_timm_names(weights: Mapping[str, Tensor], source: str) -> tuple[str, dict[str, Tensor]]:
    """The kind of a file, and its weights under timm's names; MAE's decoder under MAE's.

    Args:
        weights: as :func:`hgkd.engine.weights.read_weights` gives them.
        source: name of the file, for messages.

    Raises:
        WeightsError: no ViT in a naming that is known.
    """
    naming, place = _recognise(weights, source)
    inside = {key.removeprefix(place): value for key, value in weights.items() if key.startswith(place)}
    inside.update({key: value for key, value in weights.items() if key.startswith(naming.beside or "\0")})
    inside = {key: value for key, value in inside.items() if not _fits(_unused(naming), key)}
    if naming.kind != "timm" or len(inside) < len(weights):
        aside = f"; {len(weights) - len(inside)} entries are left aside" if len(inside) < len(weights) else ""
        print_log(f"{source}: {naming.kind} naming" + (f", network at {place!r}" if place else "") + aside, "current")
    renamed = {_rename(naming, key): value for key, value in inside.items()}
    return naming.kind, _reshape(_fuse(renamed), naming.positions_of_class)


def _unused(naming: Naming) -> tuple[str, ...]:
    # timm's own head is judged by the loader, which knows the network
    return _UNUSED[1:2] if naming.kind == "timm" else _UNUSED


def _recognise(weights: Mapping[str, Tensor], source: str) -> tuple[Naming, str]:
    for naming in NAMINGS:
        places = [key.removesuffix(naming.anchor) for key in weights if key.endswith(naming.anchor)]
        places = [place for place in places if not place or place.endswith(".")]
        if "visual." in places:  # CLIP: the text tower has the anchor's name too
            return naming, "visual."
        if places:
            return naming, min(places, key=len)
    some = ", ".join(list(weights)[:4])
    known = ", ".join(naming.kind for naming in NAMINGS)
    raise WeightsError(f"{source} is no ViT in a known naming ({known}); its first entries: {some}")


def _fits(patterns: Iterable[str], key: str) -> bool:
    return any(re.fullmatch(pattern, key) for pattern in patterns)


def _rename(naming: Naming, key: str) -> str:
    for pattern, replacement in naming.renames:
        if re.match(pattern, key):
            return re.sub("^" + pattern, replacement, key)
    return key


def _fuse(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Query, key and value as one ``qkv``; BEiT's biases, of which the key has none, as ``q_bias`` and ``v_bias``."""
    out = {}
    for key, value in weights.items():
        match = re.fullmatch(r"(.*\.attn\.)(q|k|v)\.(weight|bias)", key)
        if match is None:
            out[key] = value
            continue
        place, part, kind = match.groups()
        parts = [weights.get(f"{place}{name}.{kind}") for name in "qkv"]
        found = [tensor for tensor in parts if tensor is not None]
        if len(found) == 3:
            out[f"{place}qkv.{kind}"] = torch.cat(found)
        else:
            out[f"{place}{part}_{kind}"] = value
    return out


def _reshape(weights: dict[str, Tensor], positions_of_class: bool) -> dict[str, Tensor]:
    for name in ("cls_token", "pos_embed", "reg_token"):
        if name in weights:
            value = weights[name]
            weights[name] = value.reshape((1,) * (3 - value.ndim) + tuple(value.shape))
    if positions_of_class and "reg_token" in weights:
        positions = weights["pos_embed"]
        weights["cls_token"] = weights["cls_token"] + positions[:, :1]
        weights["pos_embed"] = positions[:, 1:]
    return weights
