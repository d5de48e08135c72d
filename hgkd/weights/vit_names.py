"""Weight files of ViTs in other namings, brought to timm's names by one table.

Known: timm and what shares its names (official MAE, DINO, DINOv2, BEiT and BEiTv2), the official DINOv3 and EUPE, OpenAI's CLIP
(and open_clip, the Perception Encoder), Apple's AIMv2, and Hugging Face's ViT, DINO, MAE, DINOv2, DINOv3, BEiT, CLIP, SigLIP,
SigLIP2 and AIMv2. A naming is recognised by one entry that it alone has, its anchor; what stands
before the anchor's name is the network's place in a larger model, whose other parts are left aside and counted in the log. Of
several places the shortest counts; of equally short ones the one called ``teacher``, else the file is refused.

Facts from the projects' public code: DINOv2 with registers stores a position for the class token, which timm adds to the token;
BEiT's and DINOv3's keys have no bias (DINOv3's files have a masked position for it); CLIP keeps class token and positions
without a batch axis; SigLIP2's NaFlex files project patches by a linear layer over (row, column, channel).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from hgkd.errors import WeightsError
from hgkd.weights.files import shortest_places

# heads, training remainders and what is computed anyway: no feature comes from there
_UNUSED = (
    r"head\..*|classifier\..*|lm_head\..*|pooler\..*|layernorm_head\..*",
    r".*relative_position_index",
    r"embeddings\.position_ids|embeddings\.mask_token",
)
_PERIODS = "rope_embed.periods"  # of DINOv3; other families note none
_LAYER_SCALES = (
    (r"^blocks\.(\d+)\.ls([12])\.gamma$", r"blocks.\1.gamma_\2"),
    (r"^blocks\.(\d+)\.gamma_([12])$", r"blocks.\1.ls\2.gamma"),
)
_HF_LAYER = r"(?:model\.|encoder\.)?layer\.(\d+)\."  # DINOv3's, of several versions of transformers
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

# an entry that a family alone has -> what it is; looked at in this order. They are read by timm's name of the network
_FAMILIES = (
    (r"rel_pos_[hw]$", "the ViT of SAM, ViTDet or MViT (relative positions in windows)"),
    (r"patch_embed\.backbone\.", "a hybrid ViT (its patches come out of a CNN)"),
    (r"(^|\.)pixel_pos$", "TNT (a transformer in a transformer)"),
    (r"layers\.\d+\.blocks\.\d+\.|encoder\.layers\.\d+\.blocks\.", "a Swin Transformer"),
    (r"(^|\.)blocks\.\d+\.attn\.rel_pos\.", "a ViT with relative positions (vit_relpos_*)"),
    (r"(^|\.)blocks\.\d+\.proj\.(weight|bias)$|mask_unit|pos_embed_win", "Hiera (a hierarchical network)"),
    (
        r"downsample_layers\.\d+\.|stages\.\d+\.(layers|blocks|\d+)\.?\d*\.(dwconv|conv_dw|depthwise_conv)\.",
        "a ConvNeXt (a CNN: it can be a student, encoder_checkpoint)",
    ),
    (
        r"(^|\.)layer[1-4]\.\d+\.conv\d\.|(^|\.)res[2-5]\.\d+\.conv\d\.",
        "a ResNet (a CNN: it can be a student, encoder_checkpoint)",
    ),
)
# likewise for what is read
_READ_FAMILIES = (
    (r"rope_embed\.periods|storage_tokens|(^|\.)layer\.\d+\.attention\.o_proj\.", "DINOv3 or EUPE (rotary positions)"),
    (r"preprocessor\.patchifier\.|embeddings\.rms_norm\.|blocks\.\d+\.mlp\.fc1_g\.", "AIMv2, or another ViT with gated layers"),
    (r"relative_position_bias_table$|lambda_1$", "BEiT"),
    (r"blocks\.\d+\.(\d+\.)?ls1\.gamma$|layer_scale1\.lambda1$", "DINOv2, or another ViT with layer scale"),
    (
        r"blocks\.\d+\.attn\.q_bias$|blocks\.\d+\.gamma_1$|(^|\.)rope\.freqs$",
        "EVA, DINOv3, or another ViT with layer scale",
    ),
    (r"resblocks\.\d+\.ls_1\.gamma$", "the Perception Encoder (rotary positions), or CLIP with layer scale"),
    (r"in_proj_weight$|pre_layrnorm\.|norm_pre\.", "CLIP, or the Perception Encoder"),
    (r"vision_model\.head\.probe$|(^|\.)attn_pool\.latent$", "SigLIP"),
    (r"dino_head\.|^head\.(mlp|last_layer)\.", "DINO"),
)
_VIDEO = "a video or volume ViT (patches of three dimensions)"
_NO_VIDEO = "no teacher of pictures can be made of it"
KNOWN_FILES = "known are ViTs (DINO, DINOv2, DINOv3, EUPE, EVA, MAE, CLIP, SigLIP, AIMv2, DeiT, AugReg), BEiT and BEiTv2"
BY_NAME = "a file of that kind is read by timm's name of its network: model.teacher.name (doctor: --name)"


@dataclass(frozen=True)
class Naming:
    """How a family of files names a ViT's weights.

    Attributes:
        kind: its name, for the log.
        anchor: an entry that every such file has and no other.
        renames: (pattern at the beginning of a name, replacement); the first that fits counts.
        beside: beginnings of entries outside the network's own place that belong to it as well.
        positions_of_class: the positions include the class token's although the network has registers.
        unused: further entries (patterns of whole names) that no feature comes from.
        keys_without_bias: a third of ``qkv.bias`` is a place without effect.
    """

    kind: str
    anchor: str
    renames: tuple[tuple[str, str], ...]
    beside: tuple[str, ...] = ()
    positions_of_class: bool = False
    unused: tuple[str, ...] = ()
    keys_without_bias: bool = False


NAMINGS = (
    Naming(
        "official DINOv3",  # and EUPE's
        "storage_tokens",
        (
            (r"storage_tokens", "reg_token"),
            (r"blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # training checkpoints group their blocks
            (r"blocks\.(\d+)\.mlp\.w1\.", r"blocks.\1.mlp.fc1_g."),
            (r"blocks\.(\d+)\.mlp\.w2\.", r"blocks.\1.mlp.fc1_x."),
            (r"blocks\.(\d+)\.mlp\.w3\.", r"blocks.\1.mlp.fc2."),
        ),
        unused=(r"mask_token", r"blocks\.[\d.]+\.attn\.qkv\.bias_mask", r"(local_)?cls_norm\..*", r"projectors\..*"),
        keys_without_bias=True,
    ),
    Naming(
        "Apple AIMv2",
        "preprocessor.patchifier.proj.weight",
        (
            (r"preprocessor\.patchifier\.", "patch_embed."),
            (r"preprocessor\.pos_embed", "pos_embed"),
            (r"trunk\.blocks\.(\d+)\.norm_([12])\.", r"blocks.\1.norm\2."),
            (r"trunk\.blocks\.(\d+)\.mlp\.fc1\.", r"blocks.\1.mlp.fc1_g."),
            (r"trunk\.blocks\.(\d+)\.mlp\.fc3\.", r"blocks.\1.mlp.fc1_x."),
            (r"trunk\.post_trunk_norm\.", "norm."),
            (r"trunk\.", ""),
        ),
    ),
    Naming(
        "Hugging Face AIMv2",
        "embeddings.patch_embed.weight",
        (
            (r"embeddings\.patch_embed\.", "patch_embed.proj."),
            (r"embeddings\.rms_norm\.", "patch_embed.norm."),
            (r"embeddings\.position_embedding\.weight", "pos_embed"),
            (r"encoder\.layers\.(\d+)\.attention\.(q|k|v)_proj\.", r"blocks.\1.attn.\2."),
            (r"encoder\.layers\.(\d+)\.attention\.out_proj\.", r"blocks.\1.attn.proj."),
            (r"encoder\.layers\.(\d+)\.rms_norm([12])\.", r"blocks.\1.norm\2."),
            (r"encoder\.layers\.(\d+)\.ffn\.gate_proj\.", r"blocks.\1.mlp.fc1_g."),
            (r"encoder\.layers\.(\d+)\.ffn\.up_proj\.", r"blocks.\1.mlp.fc1_x."),
            (r"encoder\.layers\.(\d+)\.ffn\.down_proj\.", r"blocks.\1.mlp.fc2."),
            (r"rms_norm\.", "norm."),
        ),
    ),
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
        "Hugging Face DINOv3",
        "embeddings.register_tokens",  # which DINOv2's have too, but these are looked for before
        (
            (r"embeddings\.cls_token", "cls_token"),
            (r"embeddings\.register_tokens", "reg_token"),
            (r"embeddings\.patch_embeddings\.", "patch_embed.proj."),
            (_HF_LAYER + r"attention\.(q|k|v)_proj\.", r"blocks.\1.attn.\2."),
            (_HF_LAYER + r"attention\.o_proj\.", r"blocks.\1.attn.proj."),
            (_HF_LAYER + r"layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
            (_HF_LAYER + r"(norm[12])\.", r"blocks.\1.\2."),
            (_HF_LAYER + r"mlp\.gate_proj\.", r"blocks.\1.mlp.fc1_g."),
            (_HF_LAYER + r"mlp\.up_proj\.", r"blocks.\1.mlp.fc1."),  # the other half of the gated one, see _gated
            (_HF_LAYER + r"mlp\.down_proj\.", r"blocks.\1.mlp.fc2."),
        ),
        unused=(r"rope_embeddings\..*",),
    ),
    Naming(
        "Hugging Face CLIP",  # and SigLIP's, SigLIP2's
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
            (r"transformer\.resblocks\.(\d+)\.ls_([12])\.gamma", r"blocks.\1.ls\2.gamma"),
        ),
        unused=(r"attn_pool\..*",),  # the Perception Encoder's
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
        weights: as :func:`hgkd.weights.files.read_weights` gives them.
        source: name of the file, for messages.

    Raises:
        WeightsError: no ViT in a naming that is known, or one of another build; the message says what it looks like.
    """
    naming, place = _recognise(weights, source)
    inside = {key.removeprefix(place): value for key, value in weights.items() if key.startswith(place)}
    inside.update({key: value for key, value in weights.items() if key.startswith(naming.beside or "\0")})
    inside = {key: value for key, value in inside.items() if not _fits(_unused(naming), key)}
    if naming.kind != "timm" or len(inside) < len(weights):
        aside = f"; {len(weights) - len(inside)} entries are left aside" if len(inside) < len(weights) else ""
        at = f", network at {place!r}" if place else ""
        equal = [key for key in weights if key.endswith(naming.anchor) and len(key) == len(place + naming.anchor)]
        at += f", the teacher's of {len(equal)} equal ones" if len(equal) > 1 else ""
        print_log(f"{source}: {naming.kind} naming{at}{aside}", "current")
    renamed = {_rename(naming, key): value for key, value in inside.items()}
    family = looks_like(weights)
    if family is not None:
        raise WeightsError(
            "vit-family-not-usable",
            f"{source} looks like {family}; {_NO_VIDEO if family == _VIDEO else BY_NAME}; otherwise {KNOWN_FILES}",
        )
    found = _reshape(_gated(_fuse(renamed)), naming.positions_of_class)
    if naming.keys_without_bias:
        found = _keys_without_bias(found)
    if "patch_embed.proj.weight" not in found or count_blocks(found) == 0:
        raise WeightsError(
            "vit-without-blocks",
            f"{source} has names of {naming.kind}, but no row of blocks (blocks.0, blocks.1, ...) behind its patches; its "
            f"entries: {_some(weights)}; {KNOWN_FILES}",
        )
    return naming.kind, found


def in_dialect(network: nn.Module, weights: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """A file's weights as the network at hand calls them: timm's ViT and its Eva differ in names of layer scales and biases.

    Args:
        network: timm's.
        weights: of :func:`to_timm_names`.

    Raises:
        WeightsError: its rotary positions have other wave lengths than the network's.
    """
    own = network.state_dict()
    _check_periods(network, weights, source)
    found = {key: value for key, value in weights.items() if key != _PERIODS}
    for theirs, ours in _LAYER_SCALES:
        found = {_if_known(own, re.sub(theirs, ours, key), key): value for key, value in found.items()}
    biases = [key for key in found if re.fullmatch(r"blocks\.\d+\.attn\.[qv]_bias", key)]
    if biases and not any(key in own for key in biases):
        if "blocks.0.attn.q_proj.weight" in own:
            found = {re.sub(r"(\.attn\.[qv])_bias$", r"\1_proj.bias", key): value for key, value in found.items()}
        elif not any(bool(found[key].any()) for key in biases if found[key].device.type != "meta"):
            print_log(f"{source}: its biases of queries and values are all 0 and left aside", "current")
            found = {key: value for key, value in found.items() if key not in biases}
    return found


def _if_known(own: Mapping[str, Tensor], name: str, otherwise: str) -> str:
    return name if name in own else otherwise


def _check_periods(network: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Refuse rotary positions of other wave lengths than the network's, which no shape of a weight would show."""
    theirs, ours = weights.get(_PERIODS), getattr(getattr(network, "rope", None), "periods", None)
    if theirs is None or ours is None or "meta" in (ours.device.type, theirs.device.type):
        return
    theirs, ours = theirs.float().flatten(), ours.float().flatten()
    if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=0.02):  # files round them to bfloat16
        raise WeightsError(
            "other-rotary-positions",
            f"{source} has rotary positions of {len(theirs)} periods from {theirs.min():.3g} to {theirs.max():.3g}, the "
            f"network {len(ours)} from {ours.min():.3g} to {ours.max():.3g}: they would turn everything wrongly; set "
            "model.teacher.name to the file's own network",
        )


def _unused(naming: Naming) -> tuple[str, ...]:
    # timm's own head is judged by the loader, which knows the network
    return _UNUSED[1:2] if naming.kind == "timm" else (*_UNUSED, *naming.unused)


def find_naming(weights: Mapping[str, Tensor]) -> tuple[Naming, list[str]] | None:
    """The naming of a ViT's weights and what stands before their names; None: no ViT in a known naming.

    Several places: the file holds as many networks, and does not say which is meant.
    """
    for naming in NAMINGS:
        if f"visual.{naming.anchor}" in weights:  # CLIP: the text tower has the anchor's name too
            return naming, ["visual."]
        places = shortest_places(weights, naming.anchor)
        if places:
            return naming, places
    return None


def _recognise(weights: Mapping[str, Tensor], source: str) -> tuple[Naming, str]:
    found = find_naming(weights)
    if found is not None:
        naming, places = found
        if len(places) > 1:
            raise WeightsError(
                "network-found-several-times",
                f"{source} holds the network {len(places)} times, under {', '.join(map(repr, places))}; write the entries of "
                f"one to a file of their own: torch.save({{k: v for k, v in weights.items() if k.startswith({places[0]!r})}}, "
                "FILE)",
            )
        return naming, places[0]
    family = looks_like(weights)
    looks = "" if family is None else f"; it looks like {family}"
    known = ", ".join(naming.kind for naming in NAMINGS)
    raise WeightsError(
        "vit-naming-unknown", f"{source} is no ViT in a known naming ({known}){looks}; its first entries: {_some(weights)}"
    )


def _some(weights: Mapping[str, Tensor]) -> str:
    return ", ".join(list(weights)[:4])


def looks_like(weights: Mapping[str, Tensor]) -> str | None:
    """Kind of a file that is no ViT of equal blocks, by its entries; None where nothing tells."""
    for pattern, family in _FAMILIES:
        if any(re.search(pattern, key) for key in weights):
            return family
    patches = next((value for key, value in weights.items() if key.endswith("patch_embed.proj.weight")), None)
    if patches is not None and patches.ndim == 5:
        return _VIDEO
    return None


def family_of(weights: Mapping[str, Tensor]) -> str:
    """Which family of ViTs that are read a file's entries point to; '' where nothing tells."""
    return next((family for pattern, family in _READ_FAMILIES if any(re.search(pattern, key) for key in weights)), "")


def count_blocks(weights: Mapping[str, Tensor], prefix: str = "blocks.") -> int:
    """How many blocks a file has under timm's names; 0 without any."""
    numbers = [key.removeprefix(prefix).split(".")[0] for key in weights if key.startswith(prefix)]
    return 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)


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


def _gated(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A gated layer's second half called ``fc1_x`` where the file calls it as it calls the only half of plain ones."""
    out = {}
    for key, value in weights.items():
        gate = key.replace(".mlp.fc1.", ".mlp.fc1_g.")
        out[key.replace(".mlp.fc1.", ".mlp.fc1_x.") if gate != key and gate in weights else key] = value
    return out


def _keys_without_bias(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """``qkv.bias`` as ``q_bias`` and ``v_bias``."""
    out = {}
    for key, value in weights.items():
        if not key.endswith(".attn.qkv.bias"):
            out[key] = value
            continue
        query, _, values = value.chunk(3)
        place = key.removesuffix("qkv.bias")
        out[f"{place}q_bias"], out[f"{place}v_bias"] = query.contiguous(), values.contiguous()
    return out


def _reshape(weights: dict[str, Tensor], positions_of_class: bool) -> dict[str, Tensor]:
    for name in ("cls_token", "pos_embed", "reg_token"):
        if name in weights:
            value = weights[name]
            weights[name] = value.reshape((1,) * (3 - value.ndim) + tuple(value.shape))
    patches = weights.get("patch_embed.proj.weight")
    if patches is not None and patches.ndim == 2:  # a linear layer over (row, column, channel)
        side = math.isqrt(patches.shape[1] // 3)
        if 3 * side * side == patches.shape[1]:
            weights["patch_embed.proj.weight"] = patches.reshape(-1, side, side, 3).permute(0, 3, 1, 2).contiguous()
    if positions_of_class and {"reg_token", "pos_embed", "cls_token"} <= set(weights):
        positions = weights["pos_embed"]
        weights["cls_token"] = weights["cls_token"] + positions[:, :1]
        weights["pos_embed"] = positions[:, 1:]
    return weights
