"""Any plain ViT of timm, or BEiT, as a teacher, from a local file in any naming of :mod:`hgkd.weights.vit_names`.

Tokens are the raw output of a block, before the final norm. For DINOv2 (arXiv 2304.07193) and other self-supervised ViTs an
intermediate block is often the better target.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed, SwiGLUPacked
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from hgkd.errors import InvalidValueError, WeightsError, unknown_name_message
from hgkd.networks.positions import positions_for
from hgkd.pixels import check_channels, check_normalize
from hgkd.registry import MODELS
from hgkd.structures import TeacherInfo, TeacherNeeds, TeacherOutput
from hgkd.teachers.base import Teacher
from hgkd.weights.files import part_of_several
from hgkd.weights.identify import identify
from hgkd.weights.loading import LoadReport, load_strict, match
from hgkd.weights.vit_names import count_blocks, to_timm_names

BEIT_SEES_WHOLE_IMAGES = (
    "a BEiT teacher adds position biases for its whole grid to its attention and cannot drop hidden patches, as "
    "DMAE needs; use an objective on whole images (HGKD target='full', MGD), or another ViT"
)
_SERVE = (
    "a TimmTeacher is a ViT with absolute positions and equal tokens in all blocks, or BEiT, e.g. vit_small_patch14_dinov2, "
    "vit_base_patch16_224.mae, deit3_small_patch16_224 or beit_base_patch16_224"
)
_WHY_NOT = {  # timm's class -> what is different about it
    "Eva": "every block turns its queries and keys by rotary positions (RoPE), as DINOv3, EVA02 and the Perception Encoder do",
    "VisionTransformerRelPos": "its positions are relative ones, computed in every block",
    "VisionTransformerSAM": "most of its blocks see windows of the image, with relative positions",
    "VisionTransformer": "its patches come out of a CNN",
    "NaFlexVit": "it takes lists of patches rather than images",
    "SwinTransformer": "its blocks see shifted windows, and its tokens become fewer and wider from stage to stage",
    "SwinTransformerV2": "its blocks see shifted windows, and its tokens become fewer and wider from stage to stage",
    "Hiera": "its tokens become fewer and wider from stage to stage",
}


def build_vit(name: str, pretrained: bool = False, **kwargs: Any) -> Any:
    """timm's network of that name without its classifier, when it can be a :class:`TimmTeacher`.

    Raises:
        ValueError: unknown name (the nearest are named), another kind of network (and in what it differs), or no RGB images.
    """
    if not timm.is_model(name.partition(".")[0]):
        raise InvalidValueError("teacher-unknown", unknown_name_message("teacher", name, timm.list_models("*vit*")))
    check_channels(kwargs.get("in_chans", 3), "model.teacher.in_chans")
    network: Any = timm.create_model(name, pretrained=pretrained, num_classes=0, **kwargs)
    plain = isinstance(network, (VisionTransformer, Beit)) and type(network.patch_embed) is PatchEmbed
    if not plain:
        kind = type(network).__name__
        why = _WHY_NOT.get(kind, "its tokens are not patches in a row of equal blocks, or its positions are not absolute ones")
        raise InvalidValueError(
            "teacher-not-usable", f"teacher {name!r} is timm's {kind}, which cannot be a teacher here: {why}; {_SERVE}"
        )
    if network.pos_embed is None and not isinstance(network, Beit):
        raise InvalidValueError("teacher-without-positions", f"teacher {name!r} has no absolute position embedding; {_SERVE}")
    return network


def load_vit(network: Any, weights: Mapping[str, Tensor], source: str, dry: bool = False) -> LoadReport:
    """Load a file's weights, under timm's names, into a network of :func:`build_vit`, strictly.

    Args:
        dry: only look whether they fit, as networks on the meta device need.

    Raises:
        WeightsError: they do not fit; the message says what the difference means, where it is a known one.
    """
    own = network.state_dict()
    parts = ("head", "head_dist", "fc_norm", "norm", "lm_head", "attn_pool")
    unused = ("mask_token", *(f"{part}." for part in parts if not any(key.startswith(f"{part}.") for key in own)))
    # no feature comes from what follows the blocks: a norm, which some files call otherwise, or SigLIP's attention pooling
    load = match if dry else load_strict
    try:
        return load(
            network,
            weights,
            source=source,
            ignore_missing=("norm.", "fc_norm.", "attn_pool."),
            ignore_unexpected=unused,
        )
    except WeightsError as error:
        meaning = _meaning(network, own, weights, source)
        raise WeightsError("weights-of-another-network", f"{error}{'. ' if meaning else ''}{'; '.join(meaning)}") from error


def _meaning(network: Any, own: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str) -> list[str]:
    """What the differences between a network and a file mean, and what to do about each."""
    found = []
    patches, expected = weights["patch_embed.proj.weight"], own["patch_embed.proj.weight"]
    blocks, own_blocks = count_blocks(weights), len(network.blocks)
    if patches.shape[0] != expected.shape[0] or patches.shape[-1] != expected.shape[-1] or blocks > own_blocks:
        return [
            f"The file is of a ViT with {blocks} blocks of width {patches.shape[0]} and {patches.shape[-1]}-pixel patches, the "
            f"network has {own_blocks} of width {expected.shape[0]} and {expected.shape[-1]}-pixel patches: set "
            "model.teacher.name (teacher) to the file's own"
        ]
    if blocks < own_blocks:
        found.append(f"The file holds {blocks} of the network's {own_blocks} blocks: {part_of_several(source) or 'it is cut'}")
    scaled, wanted = (any(re.match(r"blocks\.0\.ls1\.", key) for key in keys) for keys in (weights, own))
    if scaled and not wanted:
        found.append("Entries ls1.gamma and ls2.gamma are layer scales: set model.teacher.init_values=1e-5")
    if wanted and not scaled:
        found.append("The file has no layer scales (ls1.gamma): set model.teacher.init_values=None")
    size = _size_of_positions(network, own, weights)
    if size is not None:
        found.append(f"The file's positions are for images of {size} x {size} px: set model.teacher.img_size={size}")
    return found


def _size_of_positions(network: Any, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> int | None:
    """The side in pixels that a file's positions are for, where it is not the network's."""
    there, here = weights.get("pos_embed"), own.get("pos_embed")
    if there is None or here is None or there.shape == here.shape or there.ndim != 3:
        return None
    prefix = here.shape[1] - network.patch_embed.num_patches
    side = math.isqrt(max(there.shape[1] - prefix, 0))
    return side * int(network.patch_embed.patch_size[0]) if side * side == there.shape[1] - prefix else None


def vit_of(weights: Mapping[str, Tensor], source: str) -> Any:
    """The network that a file's own shapes describe, on the meta device: without weights and without a name.

    Args:
        weights: of a ViT or BEiT, under timm's names.

    Raises:
        WeightsError: they are of no such network.
    """
    patches = weights["patch_embed.proj.weight"]
    width, patch = patches.shape[0], patches.shape[-1]
    fc1, fc2 = weights.get("blocks.0.mlp.fc1.weight"), weights.get("blocks.0.mlp.fc2.weight")
    if patches.ndim != 4 or patches.shape[-2] != patch or fc1 is None or fc2 is None:
        shapes = f"patches {tuple(patches.shape)}" + ("" if fc1 is not None else ", blocks without mlp.fc1")
        raise WeightsError("file-not-plain-vit", f"{source} is of no plain ViT: {shapes}; {_SERVE}")
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
    if fc1.shape[0] == 2 * fc2.shape[1]:
        sizes["mlp_layer"] = SwiGLUPacked
    with torch.device("meta"):
        tables = [key for key in weights if key.endswith("relative_position_bias_table")]
        return _beit(weights, tables, sizes) if tables else _vit(weights, sizes, source)


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


def _vit(weights: Mapping[str, Tensor], sizes: dict[str, Any], source: str) -> VisionTransformer:
    if "pos_embed" not in weights:
        raise WeightsError(
            "file-without-positions",
            f"{source} has no absolute positions (pos_embed): DINOv3, EVA and others have rotary or relative ones; {_SERVE}",
        )
    width, patch = sizes["embed_dim"], sizes["patch_size"]
    class_token, registers = "cls_token" in weights, weights["reg_token"].shape[1] if "reg_token" in weights else 0
    distilled = "dist_token" in weights
    prefix, positions = class_token + registers + distilled, weights["pos_embed"].shape[1]
    outside = math.isqrt(positions) ** 2 == positions and prefix > 0  # the prefix has no positions
    patches = positions if outside else positions - prefix
    side = math.isqrt(max(patches, 1))
    key_norm = weights.get("blocks.0.attn.q_norm.weight")
    heads = 1 if key_norm is None else width // key_norm.shape[0]  # no other shape depends on their number
    kind: type[VisionTransformer] = VisionTransformerDistilled if distilled else VisionTransformer
    shape = (side * patch, side * patch) if side * side == patches else (patches * patch, patch)
    if not distilled:
        sizes = {**sizes, "class_token": class_token, "reg_tokens": registers, "no_embed_class": outside}
        sizes["global_pool"] = "token" if class_token else "avg"
    return kind(
        img_size=shape,
        num_heads=heads,
        qkv_bias="blocks.0.attn.qkv.bias" in weights,
        qk_norm=key_norm is not None,
        init_values=1e-5 if "blocks.0.ls1.gamma" in weights else None,
        pre_norm="norm_pre.weight" in weights,
        **sizes,
    )


@MODELS.register_module()
class TimmTeacher(Teacher):
    """A frozen timm ViT.

    Args:
        name: timm's name, e.g. 'vit_small_patch14_dinov2'.
        checkpoint: local weight file (.safetensors or .pth) in timm's or another known naming.
        pretrained: take timm's own weights, which may download them; the only way to any download.
        dtype: 'float32', 'float16' or 'bfloat16'.
        normalize: (mean, std) of the pixels in [0, 1] that the network was trained with, three numbers each, RGB; None
            takes what timm notes for the name.
        allow_random: accept a network without weights, or with some that look random (tests and baselines).
        entry: which entry of a file that holds several sets of weights, e.g. 'state_dict_ema'; None takes the usual one
            (see :func:`hgkd.weights.files.tensors_of`) and logs which others there are.
        kwargs: further arguments of ``timm.create_model``.

    Raises:
        ValueError: unknown name (the nearest are named), no plain ViT, or no weights at all.
        FileNotFoundError, WeightsError: see :func:`hgkd.weights.loading.load_strict`.
    """

    def __init__(
        self,
        name: str,
        checkpoint: str | os.PathLike[str] | None = None,
        pretrained: bool = False,
        dtype: str = "float32",
        normalize: Sequence[Sequence[float]] | None = None,
        allow_random: bool = False,
        entry: str | None = None,
        **kwargs: Any,
    ) -> None:
        if checkpoint is None and not pretrained and not allow_random:
            raise InvalidValueError(
                "teacher-without-weights",
                f"teacher {name!r} has no weights: set checkpoint (teacher_checkpoint in our configs) to a local file, or "
                "pretrained=True to let timm download them",
            )
        if checkpoint is not None and pretrained:
            raise InvalidValueError(
                "weights-named-twice", "checkpoint and pretrained both name weights for the teacher; give one of them"
            )
        network = build_vit(name, pretrained=pretrained, **kwargs)
        cfg: Any = network.pretrained_cfg
        if normalize is None:
            mean, std = cfg["mean"], cfg["std"]
        else:
            mean, std = check_normalize(normalize, "model.teacher.normalize")
        super().__init__(dtype, mean, std)
        if checkpoint is not None:
            _, weights = to_timm_names(identify(checkpoint, entry).tensors(entry), str(checkpoint))
            if "decoder_embed.weight" in weights:
                raise WeightsError(
                    "mae-with-decoder", f"{checkpoint} is an MAE file with its decoder; load it with type='MAETeacher'"
                )
            load_vit(network, weights, str(checkpoint))
        self.source, self.allow_random = str(checkpoint or name), allow_random
        self._is_beit = isinstance(network, Beit)
        network.norm, network.head = nn.Identity(), nn.Identity()  # never run
        network.patch_embed.strict_img_size = False
        network.dynamic_img_size = False  # positions are fitted here
        self.network = network
        self.info = TeacherInfo(
            kind="timm",
            width=network.embed_dim,
            depth=len(network.blocks),
            patch_size=network.patch_embed.patch_size[0],
        )
        self.has_class_token = bool(getattr(network, "has_class_token", True))  # BEiT always has one
        self._prefix_tokens = int(network.num_prefix_tokens)
        self._prefix_positions = 0 if getattr(network, "no_embed_class", False) else self._prefix_tokens
        self._native_grid = tuple(network.patch_embed.grid_size)
        self._native_positions = None if network.pos_embed is None else network.pos_embed.detach().clone().float()
        self._native_biases = {
            name: parameter.detach().clone().float()
            for name, parameter in network.named_parameters()
            if name.endswith("relative_position_bias_table")
        }
        self.freeze()

    def check(self, needs: TeacherNeeds) -> None:
        super().check(needs)
        if self._is_beit and needs.visible_only:
            raise InvalidValueError("beit-sees-whole-images", BEIT_SEES_WHOLE_IMAGES)

    def check_attention(self, block: int = -1) -> None:
        if self._is_beit:
            raise InvalidValueError(
                "beit-attention-not-read",
                "the attention of a BEiT teacher cannot guide masks (its biases are inside timm's layer)",
            )
        super().check_attention(block)

    def _set_grid(self, grid: tuple[int, int]) -> None:
        current = next(self.network.blocks.parameters())
        if self._native_positions is not None:
            native, prefix = self._native_grid, self._prefix_positions
            positions = positions_for(grid, self._native_positions, native, prefix, "the teacher's pos_embed")
            self.network.pos_embed = nn.Parameter(positions.to(current.device, current.dtype), requires_grad=False)
        if self._native_biases:
            self._set_biases(grid, current)

    def _set_biases(self, grid: tuple[int, int], like: Tensor) -> None:
        """BEiT's relative position biases for another grid, by timm's own interpolation of the file's."""
        for name, table in self._native_biases.items():
            layer: Any = self.network.get_submodule(name.removesuffix(".relative_position_bias_table"))
            layer.set_window_size(self._native_grid)
            layer.relative_position_bias_table = nn.Parameter(table.to(like.device), requires_grad=False)
            layer.set_window_size(grid)
            layer.to(like.dtype)

    def _embed(self, images: Tensor) -> Tensor:
        """Class and register tokens and all patches, as they enter the first block, (B, prefix + N, D)."""
        network: Any = self.network
        x = network.patch_embed(images)
        if x.dim() == 4:
            x = x.flatten(1, 2)
        if self._is_beit:
            x = torch.cat([network.cls_token.expand(len(x), -1, -1), x], 1)
            return x if network.pos_embed is None else x + network.pos_embed
        embedded: Tensor = network.norm_pre(network._pos_embed(x))
        return embedded

    def _before_block(self, images: Tensor, block: int) -> tuple[Tensor, nn.Module, int]:
        network: Any = self.network
        return network.blocks[:block](self._embed(images)), network.blocks[block], self._prefix_tokens

    def _forward(self, images: Tensor, ids_keep: Tensor | None, needs: TeacherNeeds) -> TeacherOutput:
        network: Any = self.network
        x = self._embed(images)
        prefix = self._prefix_tokens
        if ids_keep is not None:
            patches = x[:, prefix:].gather(1, ids_keep[:, :, None].expand(-1, -1, x.shape[2]))
            x = torch.cat([x[:, :prefix], patches], 1)
        tokens = {}
        shared = {"shared_rel_pos_bias": network.rel_pos_bias()} if self._is_beit and network.rel_pos_bias is not None else {}
        for i, block in enumerate(network.blocks[: max(needs.blocks, default=-1) + 1]):
            x = block(x, **shared)
            if i in needs.blocks:
                tokens[i] = self.on_grid(x[:, prefix:], ids_keep)
        assert self.grid is not None
        return TeacherOutput(tokens=tokens, grid=self.grid, cls=x[:, 0].float() if self.has_class_token else None)
