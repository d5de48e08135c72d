"""Pictures of what a student has learnt: token maps as colours, and grids of labelled columns.

A map of D channels becomes colours by its three main directions of variation (principal components), as in the figures of
DINOv2 (arXiv 2304.07193). The directions are found on the teacher's tokens and used for the student's too, so that equal
colours mean equal features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from hgkd.errors import InvalidValueError

_GAP = 2  # pixels between tiles
_TITLE = 14  # height of the strip with the column names


@dataclass(frozen=True)
class ColourBasis:
    """Directions and ranges that turn D channels into three colours.

    Attributes:
        mean: (D,).
        directions: (D, 3), orthonormal, most varied first; zero where the tokens vary in fewer directions.
        low: (3,) values shown as 0, the 1 % quantile of the tokens that the basis was made from.
        high: (3,) values shown as 1, the 99 % quantile.
    """

    mean: Tensor
    directions: Tensor
    low: Tensor
    high: Tensor


def colour_basis(tokens: Tensor) -> ColourBasis:
    """The basis of token maps (B, D, h, w), in fp32.

    The sign of a direction is fixed (its largest entry is positive), so the same tokens always get the same colours.

    Raises:
        ValueError: not a batch of maps.
    """
    rows = _rows(tokens).float()
    mean = rows.mean(dim=0)
    centred = rows - mean
    # eigenvectors of the covariance: D x D, whatever the number of tokens
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    count = min(3, len(values))
    directions = rows.new_zeros(rows.shape[1], 3)
    directions[:, :count] = vectors.flip(1)[:, :count]
    kept = values.flip(0)[:count] > 1e-6 * values[-1].clamp_min(1e-12)
    directions[:, :count] *= kept
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    directions = directions * torch.where(largest < 0, -1.0, 1.0)
    projected = centred @ directions
    quantiles = torch.quantile(projected, torch.tensor([0.01, 0.99], device=rows.device), dim=0)
    return ColourBasis(mean, directions, quantiles[0], quantiles[1])


def token_colours(tokens: Tensor, basis: ColourBasis) -> Tensor:
    """Token maps (B, D, h, w) -> RGB (B, 3, h, w) in [0, 1]; a direction without variation is 0.5."""
    projected = (_rows(tokens).float() - basis.mean) @ basis.directions
    span = basis.high - basis.low
    flat = span <= 1e-12
    colours = ((projected - basis.low) / torch.where(flat, torch.ones_like(span), span)).clamp(0.0, 1.0)
    colours = torch.where(flat, torch.full_like(colours, 0.5), colours)
    batch, _, h, w = tokens.shape
    return colours.reshape(batch, h, w, 3).permute(0, 3, 1, 2)


def hide_cells(images: Tensor, visible: Tensor, fill: float = 0.5) -> Tensor:
    """Images (B, 3, H, W) with the hidden cells of ``visible`` (B, h, w), True = visible, painted grey."""
    seen = F.interpolate(visible[:, None].float(), size=images.shape[-2:], mode="nearest") > 0.5
    return torch.where(seen, images, torch.full_like(images, fill))


def picture_grid(columns: Mapping[str, Tensor]) -> np.ndarray:
    """One picture: a row an image, a titled column an entry.

    Args:
        columns: title -> (B, 3, h, w) in [0, 1], of other numbers of channels see :func:`as_rgb`; smaller maps are enlarged
            to the largest without smoothing.

    Returns:
        uint8 array (height, width, 3), RGB.

    Raises:
        ValueError: no columns, or columns with different numbers of images.
    """
    counts = {len(maps) for maps in columns.values()}
    if len(counts) != 1:
        raise InvalidValueError(
            "picture-counts-differ", f"every column needs the same number of images, got {[len(m) for m in columns.values()]}"
        )
    rows = counts.pop()
    height = max(maps.shape[-2] for maps in columns.values())
    width = max(maps.shape[-1] for maps in columns.values())
    canvas = np.full((_TITLE + rows * (height + _GAP), len(columns) * (width + _GAP), 3), 255, dtype=np.uint8)
    for c, maps in enumerate(columns.values()):
        maps = maps if maps.shape[1] == 3 else as_rgb(maps)
        tiles = F.interpolate(maps.detach().float().cpu(), size=(height, width), mode="nearest")
        pixels = tiles.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
        left = c * (width + _GAP)
        for r in range(rows):
            top = _TITLE + r * (height + _GAP)
            canvas[top : top + height, left : left + width] = pixels[r]
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for c, title in enumerate(columns):
        draw.text((c * (width + _GAP) + 1, 1), title, fill="black")
    return np.asarray(picture)


def _rows(tokens: Tensor) -> Tensor:
    if tokens.ndim != 4:
        raise InvalidValueError("token-maps-shape", f"expected token maps (B, D, h, w), got shape {tuple(tokens.shape)}")
    return tokens.permute(0, 2, 3, 1).reshape(-1, tokens.shape[1])


def as_rgb(images: Tensor, chosen: Sequence[int] | None = None) -> Tensor:
    """Three channels of images (B, C, H, W) for a picture: the chosen ones as red, green and blue, else the first three.

    One channel is shown as grey; of two the third colour is black.
    """
    known = list(range(images.shape[1]))[:3] if chosen is None else list(chosen)
    if len(known) == 2:
        return torch.cat([images[:, known], torch.zeros_like(images[:, :1])], dim=1)
    return images[:, known * 3 if len(known) == 1 else known]


Columns = dict[str, Tensor]
