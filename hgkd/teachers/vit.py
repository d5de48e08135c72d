"""Any network of timm that gives tokens on a grid as a teacher, from a local file in any naming of :mod:`hgkd.weights`.

Tokens are the raw output of a block, before the final norm. For DINOv2 (arXiv 2304.07193) and other self-supervised ViTs an
intermediate block is often the better target. What the families of networks can and cannot do: :mod:`hgkd.teachers.families`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import timm
from torch import Tensor

from hgkd.errors import InvalidValueError, WeightsError
from hgkd.networks.vit import check_timm_name
from hgkd.pixels import check_channels, check_normalize
from hgkd.registry import MODELS
from hgkd.structures import Capabilities, TeacherInfo, TeacherNeeds, TeacherOutput
from hgkd.teachers.base import Teacher
from hgkd.teachers.families import Family, Levels, family_for
from hgkd.weights.identify import WeightFile, chosen_entry
from hgkd.weights.importing import import_weights
from hgkd.weights.loading import LoadReport, load_strict, match
from hgkd.weights.sizes import other_sizes
from hgkd.weights.vit_names import count_blocks, in_dialect, to_timm_names

_AFTER = ("norm.", "fc_norm.", "attn_pool.", "head.norm.", "norms.", "projectors.", "neck.")
"""No feature comes from what follows the blocks: norms, which some files call otherwise, and pooling."""


def build_network(name: str, pretrained: bool = False, **kwargs: Any) -> Any:
    """timm's network of that name without its classifier.

    Raises:
        ValueError: unknown name or tag (the nearest are named), or no RGB images.
    """
    check_timm_name("teacher", name)
    check_channels(kwargs.get("in_chans", 3), "model.teacher.in_chans")
    return timm.create_model(name, pretrained=pretrained, num_classes=0, **kwargs)


def family_of(network: Any, name: str, level: int | None = None, image_size: tuple[int, int] | None = None) -> Family:
    """What serves a network of :func:`build_network`; it takes out of the network what no token depends on.

    Args:
        level: of a network with several; None: the last.
        image_size: that it was built for, where that was asked; else None.

    Raises:
        ValueError: no tokens on a grid, or no such level.
    """
    kind = family_for(network)
    if kind is Levels:
        return Levels(network, -1 if level is None else level, image_size)
    if level not in (None, 0, -1):
        raise InvalidValueError(
            "no-such-level",
            f"level={level}: teacher {name!r} is a ViT whose blocks all have one grid; choose a block of it instead, by "
            "the objective's key (block=...), and leave level out",
        )
    return kind(network)


def load_network(network: Any, file: WeightFile, entry: str | None = None, dry: bool = False) -> LoadReport:
    """Load a file into a network of :func:`build_network`, strictly, whatever its naming.

    Args:
        entry: see :func:`hgkd.weights.files.tensors_of`.
        dry: only look whether a ViT's file fits, as networks on the meta device need.

    Raises:
        WeightsError: it does not fit; the message says what the difference means, where it is a known one.
    """
    if family_for(network) is Levels:
        return import_weights(network, file, entry=entry, allow=_AFTER, dry=dry).loaded
    weights = to_timm_names(file.tensors(entry), str(file))[1]
    if "decoder_embed.weight" in weights:
        raise WeightsError("mae-with-decoder", f"{file} is an MAE file with its decoder; load it with type='MAETeacher'")
    return load_vit(network, weights, str(file), dry)


def load_vit(network: Any, weights: Mapping[str, Tensor], source: str, dry: bool = False) -> LoadReport:
    """Load a file's weights, under timm's names, into a ViT of equal blocks, strictly.

    Args:
        dry: only look whether they fit, as networks on the meta device need.

    Raises:
        WeightsError: they do not fit; the message says what the difference means, where it is a known one.
    """
    own = network.state_dict()
    weights = in_dialect(network, weights, source)
    parts = ("head", "head_dist", "fc_norm", "norm", "lm_head", "attn_pool")
    unused = ("mask_token", *(f"{part}." for part in parts if not any(k.startswith(f"{part}.") for k in own)))
    load = match if dry else load_strict
    try:
        return load(network, weights, source=source, ignore_missing=_AFTER, ignore_unexpected=unused)
    except WeightsError as error:
        sizes = other_sizes(weights, own)
        if sizes is not None:
            remedy = "set model.teacher.name (the short option teacher) to the file's own network"
            if count_blocks(weights) < len(network.blocks):
                remedy += ", unless the file was cut"
            raise WeightsError("weights-of-other-sizes", f"{source} is of another network: {sizes}; {remedy}") from error
        meaning = _meaning(network, own, weights)
        raise WeightsError("weights-of-another-network", f"{error}{'. ' if meaning else ''}{'; '.join(meaning)}") from error


def _meaning(network: Any, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    """What the differences between a network and a file mean, and what to do about each."""
    found = []
    scaled, wanted = (any(re.match(r"blocks\.0\.(ls1\.|gamma_1)", key) for key in keys) for keys in (weights, own))
    if scaled and not wanted:
        found.append("Entries ls1.gamma and ls2.gamma are layer scales: set model.teacher.init_values=1e-5")
    if wanted and not scaled:
        found.append("The file has no layer scales (ls1.gamma): set model.teacher.init_values=None")
    size = _size_of_positions(network, own, weights)
    if size is not None:
        found.append(f"The file's positions are for images of {size} x {size} px: set model.teacher.img_size={size}")
    name = str((getattr(network, "pretrained_cfg", None) or {}).get("architecture", ""))
    biased, wants = ("blocks.0.attn.q_bias" in keys for keys in (weights, own))
    if biased != wants and "dinov3" in name:
        other = f"{name}_qkvb" if biased else name.removesuffix("_qkvb")
        has = "biases" if biased else "no biases"
        found.append(f"The file has {has} of queries and values: set model.teacher.name={other}")
    return found


def _size_of_positions(network: Any, own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> int | None:
    """The side in pixels that a file's positions are for, where it is not the network's."""
    there, here = weights.get("pos_embed"), own.get("pos_embed")
    if there is None or here is None or there.shape == here.shape or there.ndim != 3:
        return None
    prefix = here.shape[1] - network.patch_embed.num_patches
    side = math.isqrt(max(there.shape[1] - prefix, 0))
    return side * int(network.patch_embed.patch_size[0]) if side * side == there.shape[1] - prefix else None


@MODELS.register_module()
class TimmTeacher(Teacher):
    """A frozen network of timm: a ViT of any kind, a hierarchical transformer or a CNN; see docs/reference/teachers.md.

    Args:
        name: timm's name, e.g. 'vit_small_patch16_dinov3'.
        checkpoint: local weight file (.safetensors or .pth, or the index of one in several files) in timm's or another known
            naming.
        pretrained: take timm's own weights, which may download them; the only way to any download.
        dtype: 'float32', 'float16' or 'bfloat16'; None: bfloat16 on GPUs that compute in it, else float32.
        normalize: (mean, std) of the pixels in [0, 1] that the network was trained with, three numbers each, RGB; None
            takes what timm notes for the name.
        allow_random: accept a network without weights, or with some that look random (tests and baselines).
        entry: which entry of a file that holds several sets of weights, e.g. 'state_dict_ema'; None takes the usual one
            (see :func:`hgkd.weights.files.tensors_of`) and logs which others there are.
        level: of a network with maps of several strides, which one: 0 is the finest, negative counts from the end; None is the
            last. A recipe's ``block`` counts the maps of that stride (a hierarchical network has one).
        ema: take the moving average of a file that holds one beside its weights ('state_dict_ema', 'model_ema', ...).
        kwargs: further arguments of ``timm.create_model``.

    Raises:
        ValueError: unknown name (the nearest are named), no tokens on a grid, no such level, or no weights at all.
        FileNotFoundError, WeightsError: see :func:`hgkd.weights.loading.load_strict`.
    """

    def __init__(
        self,
        name: str,
        checkpoint: str | os.PathLike[str] | None = None,
        pretrained: bool = False,
        dtype: str | None = None,
        normalize: Sequence[Sequence[float]] | None = None,
        allow_random: bool = False,
        entry: str | None = None,
        level: int | None = None,
        ema: bool = False,
        **kwargs: Any,
    ) -> None:
        if checkpoint is None and not pretrained and not allow_random:
            raise InvalidValueError(
                "teacher-without-weights",
                f"teacher {name!r} has no weights: set checkpoint (teacher_checkpoint in our configs) to a local file, or "
                "pretrained=True to let timm download them (to try a command: model.teacher.allow_random=True)",
            )
        if checkpoint is not None and pretrained:
            raise InvalidValueError(
                "weights-named-twice", "checkpoint and pretrained both name weights for the teacher; give one of them"
            )
        network = build_network(name, pretrained=pretrained, **kwargs)
        cfg: Any = network.pretrained_cfg
        if normalize is None:
            mean, std = cfg["mean"], cfg["std"]
        else:
            mean, std = check_normalize(normalize, "model.teacher.normalize")
        super().__init__(dtype, mean, std)
        if checkpoint is not None:
            file, entry = chosen_entry(checkpoint, entry, ema)
            load_network(network, file, entry)
        self.source, self.allow_random = str(checkpoint or name), allow_random
        size = kwargs.get("img_size")
        image_size = (size, size) if isinstance(size, int) else None if size is None else tuple(size)
        self.family = family_of(network, name, level, image_size)
        self.network = network
        self.info = TeacherInfo(
            kind="timm", width=self.family.width, depth=self.family.depth, patch_size=self.family.patch_size
        )
        self.has_class_token = self.family.has_class_token
        self.freeze()

    @property
    def capabilities(self) -> Capabilities:
        family = self.family
        return Capabilities(
            class_token=family.has_class_token,
            registers=family.prefix - family.has_class_token,
            no_dropping=family.no_dropping,
            no_attention=family.no_attention,
            no_decoder=self._no_decoder(),
        )

    def _set_grid(self, grid: tuple[int, int]) -> None:
        self.family.set_grid(grid)

    def _patch_attention(self, images: Tensor, block: int) -> Tensor:
        return self.family.attention(images, block)

    def _forward(self, images: Tensor, ids_keep: Tensor | None, needs: TeacherNeeds) -> TeacherOutput:
        tokens, cls = self.family.tokens(images, ids_keep, needs.blocks)
        assert self.grid is not None
        return TeacherOutput(
            tokens={block: self.on_grid(value, ids_keep) for block, value in tokens.items()},
            grid=self.grid,
            cls=None if cls is None else cls.float(),
        )
