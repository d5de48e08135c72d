"""Base class of masked students: what model, objectives, hooks and reports ask of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hgkd.errors import InvalidValueError
from hgkd.masking import grid_of
from hgkd.pixels import PixelNormalisation, PixelStatistics, pixels_noted_by
from hgkd.structures import StudentOutput

DECODED = ("all", "visible")


def check_decode(decode: str) -> str:
    """Return ``decode``, or raise ValueError when there are no such places to decode."""
    if decode not in DECODED:
        raise InvalidValueError("decode-unknown", f"decode must be one of {', '.join(map(repr, DECODED))}, got {decode!r}")
    return decode


class Student(PixelNormalisation):
    """Base of students; subclasses set the attributes and give :meth:`forward` and :meth:`dense_features`.

    Attributes:
        cell, out_stride: pixels a mask cell, and a position of the decoder's output.
        decoded_channels: channels of the decoder's output.
        pyramid_channels: stride -> channels, of every scale of the decoder.
        feature_channels, feature_strides: of the encoder's levels, finest first, or of a ViT's blocks.
        mean, std: of the pixels in [0, 1] that :meth:`normalise` takes away, (1, 3, 1, 1); see :meth:`set_pixels`.
        encoder_spec: {'name', 'stem', 'kwargs'} of a timm network that lies in the attribute ``encoder``: with it checkpoints
            can be exported and evaluated; None: they cannot.
        equal_counts: all images of a batch must show the same number of cells.
        takes_count: :meth:`forward` has an argument ``num_cells``: how many cells ``visible`` shows, or None.
        takes_rectangle: :meth:`forward` has an argument ``rectangle``: the (rows, columns) that every image shows, or None
            (:class:`hgkd.sparse.CellLayout`).
        decodes_rectangles: :meth:`forward` has an argument ``decode``: with 'visible' the decoder computes the visible
            rectangles alone.
    """

    cell: int
    out_stride: int
    decoded_channels: int
    pyramid_channels: dict[int, int]
    feature_channels: tuple[int, ...]
    feature_strides: tuple[int, ...]
    encoder_spec: dict[str, Any] | None = None
    equal_counts = False
    takes_count = False
    takes_rectangle = False
    decodes_rectangles = False

    def prepare(self, image_size: int | Sequence[int]) -> tuple[int, int]:
        """The mask grid (h, w) of images of this size, (H, W) or one side of a square.

        Raises:
            ValueError: the mask cells do not divide the size; the message names the nearest sizes that they do.
        """
        sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(sides) != 2:
            raise InvalidValueError(
                "image-size-not-a-pair", f"image_size must be one side or (height, width), got {image_size!r}"
            )
        return grid_of((sides[0], sides[1]), self.cell)

    def visible_of(self, images: Tensor, visible: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """The visible cells of images on a grid, bool (B, h, w): as given, or everything where None is given.

        Raises:
            ValueError: a mask of another shape.
        """
        shape = (len(images), *grid)
        if visible is None:
            return torch.ones(shape, dtype=torch.bool, device=images.device)
        if tuple(visible.shape) != shape:
            raise InvalidValueError(
                "visible-shape",
                f"visible has shape {tuple(visible.shape)}, but images of {tuple(images.shape)} with {self.cell}-pixel "
                f"cells need {shape}",
            )
        return visible

    def give_pixels(self) -> bool:
        """Predict pixels from now on (``StudentOutput.pixels``); False: this student has no head for it."""
        return False

    def forward(self, images: Tensor, visible: Tensor | None = None) -> StudentOutput:
        """Encode the visible cells and decode the whole image.

        Args:
            images: (B, 3, H, W) in [0, 1], RGB.
            visible: bool (B, H/cell, W/cell), True = visible; None: everything.
        """
        raise NotImplementedError

    def dense_features(self, images: Tensor) -> list[Tensor]:
        """Features of whole images (B, 3, H, W) in [0, 1] by the ordinary dense network, finest first."""
        raise NotImplementedError

    def pooled(self, images: Tensor) -> Tensor:
        """Mean of the last features over the whole image: (B, 3, H, W) in [0, 1] -> (B, C)."""
        return self.dense_features(images)[-1].mean(dim=(2, 3))

    def pixels_of(self, description: Mapping[str, Any]) -> PixelStatistics | None:
        """Mean and std that a student of this :meth:`description` normalises pixels with; None: it does not say."""
        return pixels_noted_by(description.get("pixels"))

    def description(self) -> dict[str, Any]:
        """Description of this student for checkpoints."""
        return {} if self.encoder_spec is None else {"encoder": self.encoder_spec}
