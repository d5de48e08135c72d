"""Grids of mask cells and how many of them are visible: what masks and benchmarks count by, without any registry."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hgkd.errors import InvalidValueError


def visible_count(h: int, w: int, mask_ratio: float, rounding: str = "round") -> int:
    """Number of visible cells on an (h, w) grid.

    Args:
        mask_ratio: share of hidden cells, in [0, 1).
        rounding: 'round' (SparK; halves go up) or 'floor' (MAE, DMAE, G2SD).

    Raises:
        ValueError: ratio that is no number in [0, 1), or no cell would stay visible.
    """
    if isinstance(mask_ratio, bool) or not isinstance(mask_ratio, (int, float)):
        raise InvalidValueError(
            "mask-ratio-not-a-number",
            f"mask_ratio is the share of hidden cells, a number in [0, 1), got {mask_ratio!r}; write e.g. 0.6",
        )
    if not 0.0 <= mask_ratio < 1.0:
        raise InvalidValueError(
            "mask-ratio-out-of-range",
            f"mask_ratio must be in [0, 1), got {mask_ratio!r}; it is the share of hidden cells, "
            "0 hides nothing (the dense-distillation control), 0.6 hides 60 %",
        )
    if rounding not in ("round", "floor"):
        raise InvalidValueError("rounding-unknown", f"rounding must be 'round' (SparK) or 'floor' (MAE), got {rounding!r}")
    # 1e-6: 25 * (1 - 0.8) is 4.999..., which must count as 5
    keep = h * w * (1.0 - mask_ratio)
    count = math.floor(keep + 0.5 + 1e-6) if rounding == "round" else math.floor(keep + 1e-6)
    if count < 1:
        largest = math.floor((1.0 - 1.0 / (h * w)) * 1e4) / 1e4  # rounded down: it must work when it is typed
        raise InvalidValueError(
            "mask-ratio-too-high",
            f"mask_ratio {mask_ratio:g} leaves no visible cell on a {h} x {w} grid; use at most {largest:.4f}, "
            "a larger image or smaller cells",
        )
    return count


def highest(values: Tensor, count: int | Tensor) -> Tensor:
    """True at the ``count`` highest values of each image: (B, h, w) -> bool (B, h, w); a tensor (B,) counts for each image."""
    flat = values.flatten(1)
    if isinstance(count, Tensor):
        rank = flat.argsort(dim=1, descending=True).argsort(dim=1)
        return (rank < count[:, None]).view_as(values)
    visible = torch.zeros_like(flat, dtype=torch.bool)
    visible.scatter_(1, flat.argsort(dim=1, descending=True)[:, :count], True)
    return visible.view_as(values)


def grid_of(image_size: tuple[int, int], cell: int) -> tuple[int, int]:
    """The mask grid (h, w) of an image of (H, W) pixels with square cells of ``cell`` pixels.

    Raises:
        ValueError: H or W is no multiple of ``cell``; the message names the nearest sizes that are.
    """
    sides = []
    for side in image_size:
        low = max(cell, side // cell * cell)
        high = low if side == low else low + cell if side > low else cell
        sides.append((side, low, high))
    if any(side % cell or side < cell for side, _, _ in sides):
        near = " or ".join(dict.fromkeys((f"{sides[0][1]} x {sides[1][1]}", f"{sides[0][2]} x {sides[1][2]}")))
        raise InvalidValueError(
            "image-size-not-divided",
            f"image size {image_size[0]} x {image_size[1]} is not divided by the {cell}-pixel mask cells; "
            f"nearest sizes that are: {near}",
        )
    return image_size[0] // cell, image_size[1] // cell
