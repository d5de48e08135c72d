"""Dataclasses that students, teachers and objectives exchange. Masks: True = visible, everywhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hgkd.sparse import CellLayout, SparseTensor


@dataclass(frozen=True)
class TeacherNeeds:
    """Outputs that objectives want from a teacher, which computes nothing else.

    Attributes:
        blocks: indices (0 = first) of the encoder blocks whose output tokens are wanted.
        decoder_block: index of the decoder block whose hidden state is wanted, or None for no decoder pass.
        visible_only: the teacher sees the visible cells only (masked patches are dropped before the encoder).
    """

    blocks: tuple[int, ...] = ()
    decoder_block: int | None = None
    visible_only: bool = False


@dataclass(frozen=True)
class TeacherInfo:
    """Static facts of a teacher, found when it is built.

    Attributes:
        kind: e.g. ``'timm'``, ``'mae-encoder'``, ``'mae'``.
        width: channels D of an encoder token.
        depth: number of encoder blocks.
        patch_size: pixels of a patch side in the teacher's own input.
        decoder_width: channels of a decoder hidden state, None without decoder.
        decoder_depth: number of decoder blocks, 0 without decoder.
    """

    kind: str
    width: int
    depth: int
    patch_size: int
    decoder_width: int | None = None
    decoder_depth: int = 0


@dataclass(frozen=True)
class Capabilities:
    """What a teacher can be asked for. A reason is '' where it can, else it says in words why it cannot.

    Attributes:
        class_token: it gives one (:attr:`TeacherOutput.cls`).
        registers: tokens besides that are no patches.
        no_dropping: why it cannot see the visible patches alone, as DMAE and the target 'inferred' ask.
        no_attention: why its attention cannot guide masks.
        no_decoder: why it cannot infer hidden positions, as the target 'inferred' and G2SD ask.
    """

    class_token: bool
    registers: int
    no_dropping: str = ""
    no_attention: str = ""
    no_decoder: str = ""


@dataclass
class TeacherOutput:
    """Result of ``teacher(images, visible, needs)``.

    Attributes:
        tokens: block index -> raw block output (B, D, gh, gw). With ``visible_only``, places in masked cells are 0.
        cls: class token after the deepest block asked for (B, D), or None when the network has none.
        decoded: hidden state after ``decoder_block`` (B, D', gh, gw), no final norm; None when not asked for.
        grid: (gh, gw), an integer multiple of the mask grid.
        views: how many times each image stands in it, see :meth:`repeat`.
    """

    tokens: dict[int, Tensor]
    grid: tuple[int, int]
    cls: Tensor | None = None
    decoded: Tensor | None = None
    views: int = 1

    def repeat(self, views: int) -> TeacherOutput:
        """The output for several views of the same whole images, view after view: (views * B, ...) each."""
        if views == 1:
            return self

        def repeated(value: Tensor | None) -> Tensor | None:
            return None if value is None else torch.cat([value] * views)  # keeps the memory format

        tokens = {block: torch.cat([value] * views) for block, value in self.tokens.items()}
        return TeacherOutput(tokens, self.grid, repeated(self.cls), repeated(self.decoded), self.views * views)


@dataclass
class StudentOutput:
    """Result of ``student(images, visible)``.

    Attributes:
        decoded: decoder output (B, C, H/out_stride, W/out_stride), dense.
        features: encoder features, finest first; sparse tensors carrying their layout. Of a ViT: the raw output of every
            block, all of one stride.
        layout: the visible cells, shared by all features.
        images: the images that the student was given, (B, 3, H, W) in [0, 1], RGB; pixel targets are made from them.
        pyramid: stride -> decoder map (B, C, H/stride, W/stride), of every scale that the decoder passes; the finest is
            ``decoded``.
        pixels: standardised pixels (B, 3, H, W) that the student itself predicts; None when it leaves that to an objective.
    """

    decoded: Tensor
    features: list[SparseTensor] = field(default_factory=list)
    layout: CellLayout | None = None
    images: Tensor | None = None
    pyramid: dict[int, Tensor] = field(default_factory=dict)
    pixels: Tensor | None = None


@dataclass
class FeatureSample:
    """The whole-image feature of one image.

    Attributes:
        features: pooled encoder feature (C,), any float dtype, any device.
        label: class index of the image (-1: none known).
        index: place of the image in its data set.
        split: which part of an evaluation the image belongs to, 'bank' (neighbours are sought here) or 'query'.
    """

    features: Tensor
    label: int
    index: int
    split: str


@dataclass
class ClassSample:
    """Scores of a classifier for one image.

    Attributes:
        scores: one number a class (K,), the highest is its prediction; any float dtype, any device.
        label: index of the right class.
        index: place of the image in its data set; twice the same index is an image in place of an unreadable one.
    """

    scores: Tensor
    label: int
    index: int
