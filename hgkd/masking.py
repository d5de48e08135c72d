"""Generators of visible cells. One polarity: True = visible.

Number of visible cells an image: ``round(h * w * (1 - mask_ratio))`` as SparK (arXiv 2301.03580) keeps them; the MAE family
truncates instead (``rounding='floor'``): 20 against 19 of 49 at ratio 0.6.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from hgkd.registry import MODELS


def visible_count(h: int, w: int, mask_ratio: float, rounding: str = "round") -> int:
    """Number of visible cells on an (h, w) grid.

    Args:
        mask_ratio: share of hidden cells, in [0, 1).
        rounding: 'round' (SparK; halves go up) or 'floor' (MAE, DMAE, G2SD).

    Raises:
        ValueError: ratio outside [0, 1), or no cell would stay visible.
    """
    if not 0.0 <= mask_ratio < 1.0:
        raise ValueError(
            f"mask_ratio must be in [0, 1), got {mask_ratio}; it is the share of hidden cells, "
            "0 hides nothing (the dense-distillation control), 0.6 hides 60 %"
        )
    if rounding not in ("round", "floor"):
        raise ValueError(f"rounding must be 'round' (SparK) or 'floor' (MAE), got {rounding!r}")
    # 1e-6: 25 * (1 - 0.8) is 4.999..., which must count as 5
    keep = h * w * (1.0 - mask_ratio)
    count = math.floor(keep + 0.5 + 1e-6) if rounding == "round" else math.floor(keep + 1e-6)
    if count < 1:
        largest = 1.0 - 1.0 / (h * w)
        raise ValueError(
            f"mask_ratio {mask_ratio} leaves no visible cell on a {h} x {w} grid; use at most {largest:.3f}, "
            "a larger image or smaller cells"
        )
    return count


class MaskGenerator(Protocol):
    """Draws the visible cells of a batch.

    Attributes:
        progress: share of the training that is done, in [0, 1]; the runner keeps it up to date for ratios that change.
    """

    progress: float

    @property
    def current_ratio(self) -> float:
        """Share of hidden cells at this moment of the training."""
        ...

    def __call__(
        self, batch: int, grid: tuple[int, int], *, device: torch.device | str, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return a bool tensor (batch, h, w), True = visible."""
        ...

    def check(self, grid: tuple[int, int]) -> None:
        """Raise ValueError when this generator cannot serve the grid."""
        ...


@MODELS.register_module()
class RandomMask:
    """Uniformly random visible cells, the same number in every image.

    Args:
        mask_ratio: share of hidden cells in [0, 1); 0 keeps everything visible.
        rounding: see :func:`visible_count`.
        final_mask_ratio: the share at the end of training, reached linearly over the steps; None: the same throughout.
    """

    def __init__(self, mask_ratio: float = 0.6, rounding: str = "round", final_mask_ratio: float | None = None) -> None:
        self.mask_ratio = mask_ratio
        self.final_mask_ratio = mask_ratio if final_mask_ratio is None else final_mask_ratio
        self.rounding = rounding
        self.progress = 0.0
        for ratio in (self.mask_ratio, self.final_mask_ratio):
            visible_count(1000, 1000, ratio, rounding)  # refuses a ratio that no grid can serve, before training

    @property
    def current_ratio(self) -> float:
        """The share of hidden cells at this moment of the training."""
        return self.mask_ratio + (self.final_mask_ratio - self.mask_ratio) * self.progress

    def check(self, grid: tuple[int, int]) -> None:
        for ratio in (self.mask_ratio, self.final_mask_ratio):
            visible_count(*grid, ratio, self.rounding)

    def __call__(
        self, batch: int, grid: tuple[int, int], *, device: torch.device | str, generator: torch.Generator | None = None
    ) -> Tensor:
        h, w = grid
        count = visible_count(h, w, self.current_ratio, self.rounding)
        noise = torch.rand(batch, h * w, generator=generator, device=device)
        keep = noise.argsort(dim=1)[:, :count]
        visible = torch.zeros(batch, h * w, dtype=torch.bool, device=device)
        visible.scatter_(1, keep, True)
        return visible.view(batch, h, w)


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
        raise ValueError(
            f"image size {image_size[0]} x {image_size[1]} is not divided by the {cell}-pixel mask cells; "
            f"nearest sizes that are: {near}"
        )
    return image_size[0] // cell, image_size[1] // cell
