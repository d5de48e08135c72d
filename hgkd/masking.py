"""Generators of visible cells. One polarity: True = visible.

Number of visible cells an image: ``round(h * w * (1 - mask_ratio))`` as SparK (arXiv 2301.03580) keeps them; the MAE family
truncates instead (``rounding='floor'``): 20 against 19 of 49 at ratio 0.6. Halves go up here; in SparK's code they go to the
even number, as Python's ``round`` does: of 49 cells at ratio 0.5 it keeps 24, here 25 stay visible.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hgkd.errors import InvalidValueError
from hgkd.registry import MODELS


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


class MaskGenerator(Protocol):
    """Draws the visible cells of a batch.

    Attributes:
        progress: share of the training that is done, in [0, 1]; the runner keeps it up to date for ratios that change.
        guided: it needs ``scores``, the teacher's attention.
    """

    progress: float
    guided: bool

    @property
    def current_ratio(self) -> float:
        """Share of hidden cells at this moment of the training."""
        ...

    def __call__(
        self,
        batch: int,
        grid: tuple[int, int],
        *,
        device: torch.device | str,
        generator: torch.Generator | None = None,
        scores: Tensor | None = None,
    ) -> Tensor:
        """Return a bool tensor (batch, h, w), True = visible.

        Args:
            scores: how much the teacher attends to each cell (batch, h, w), for guided generators.
        """
        ...

    def check(self, grid: tuple[int, int]) -> None:
        """Raise ValueError when this generator cannot serve the grid."""
        ...


@dataclass(frozen=True)
class Randomness:
    """Where random numbers come from, and where they go.

    Attributes:
        device: of the result.
        generator: None: torch's own.
    """

    device: torch.device | str
    generator: torch.Generator | None = None

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1)."""
        return torch.rand(*shape, generator=self.generator, device=self.device)


class CountedMask:
    """Base of generators that show the same number of cells in every image; a subclass gives :meth:`draw`.

    Args:
        mask_ratio: share of hidden cells in [0, 1); 0 keeps everything visible.
        rounding: see :func:`visible_count`.
        final_mask_ratio: the share at the end of training, reached linearly over the steps; None: the same throughout.
    """

    guided = False

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
        """Raise ValueError when no cell of the grid would stay visible."""
        for ratio in (self.mask_ratio, self.final_mask_ratio):
            visible_count(*grid, ratio, self.rounding)

    def count(self, grid: tuple[int, int]) -> int:
        """Number of visible cells at this moment of the training."""
        return visible_count(*grid, self.current_ratio, self.rounding)

    def __call__(
        self,
        batch: int,
        grid: tuple[int, int],
        *,
        device: torch.device | str,
        generator: torch.Generator | None = None,
        scores: Tensor | None = None,
    ) -> Tensor:
        """See :class:`MaskGenerator`."""
        return self.draw(batch, grid, Randomness(device, generator), scores)

    def draw(self, batch: int, grid: tuple[int, int], at: Randomness, scores: Tensor | None) -> Tensor:
        """What a subclass gives: bool (batch, h, w), True = visible, with :meth:`count` cells visible in every image."""
        raise NotImplementedError


@MODELS.register_module()
class RandomMask(CountedMask):
    """Uniformly random visible cells; arguments: see :class:`CountedMask`."""

    def draw(self, batch: int, grid: tuple[int, int], at: Randomness, scores: Tensor | None) -> Tensor:
        return highest(at.uniform(batch, *grid), self.count(grid))


@MODELS.register_module()
class BlockMask(CountedMask):
    """Hidden rectangles, after BEiT (arXiv 2106.08254, algorithm 1), but always exactly the asked number of cells.

    Rectangles of random place, area and shape are hidden one after the other, no larger than what is still to be hidden.

    Args:
        mask_ratio, rounding, final_mask_ratio: see :class:`CountedMask`.
        min_cells: smallest rectangle, in cells, while so many are left; BEiT's is 16 on a 14 x 14 grid.
        min_aspect: height / width lies between this and its inverse, evenly on a logarithmic scale; BEiT's is 0.3.
    """

    def __init__(
        self,
        mask_ratio: float = 0.6,
        rounding: str = "round",
        final_mask_ratio: float | None = None,
        min_cells: int = 4,
        min_aspect: float = 0.3,
    ) -> None:
        super().__init__(mask_ratio, rounding, final_mask_ratio)
        if min_cells < 1:
            raise InvalidValueError("min-cells-not-positive", f"min_cells must be 1 or more, got {min_cells}")
        if not 0.0 < min_aspect <= 1.0:
            raise InvalidValueError("min-aspect-out-of-range", f"min_aspect must be in (0, 1], got {min_aspect}; BEiT uses 0.3")
        self.min_cells = min_cells
        self.min_aspect = min_aspect

    def draw(self, batch: int, grid: tuple[int, int], at: Randomness, scores: Tensor | None) -> Tensor:
        hidden = grid[0] * grid[1] - self.count(grid)
        return torch.stack([self._one(grid, hidden, at.generator) for _ in range(batch)]).to(at.device)

    def _one(self, grid: tuple[int, int], hidden: int, generator: torch.Generator | None) -> Tensor:
        visible = torch.ones(grid, dtype=torch.bool)
        while hidden:
            where = None if generator is None else generator.device
            area, shape, top, left = torch.rand(4, generator=generator, device=where).tolist()
            low = min(self.min_cells, hidden)
            cells = low + area * (hidden - low)
            aspect = self.min_aspect ** (2.0 * shape - 1.0)
            height = min(grid[0], max(1, math.floor(math.sqrt(cells * aspect))))
            width = min(grid[1], max(1, math.floor(cells / height)))
            row, column = math.floor(top * (grid[0] - height + 1)), math.floor(left * (grid[1] - width + 1))
            block = visible[row : row + height, column : column + width]
            hidden -= int(block.sum())
            block[:] = False
        return visible


@MODELS.register_module()
class AttentionMask(CountedMask):
    """Cells hidden by how much the teacher attends to them, after AttMask (arXiv 2203.12719).

    Cells are drawn one by one without replacement, each with a probability that grows with its score to the power
    1 / ``temperature``; 0 hides exactly the highest (or lowest) ones. The teacher sees every whole image for it.

    Args:
        mask_ratio, rounding, final_mask_ratio: see :class:`CountedMask`.
        hide: 'high' (AttMask: hide what matters, which is hard to guess) or 'low' attention (show what matters).
        temperature: 0 or more.
    """

    guided = True

    def __init__(
        self,
        mask_ratio: float = 0.6,
        rounding: str = "round",
        final_mask_ratio: float | None = None,
        hide: str = "high",
        temperature: float = 0.5,
    ) -> None:
        super().__init__(mask_ratio, rounding, final_mask_ratio)
        if hide not in ("high", "low"):
            raise InvalidValueError("hide-unknown", f"hide must be 'high' or 'low' (attention), got {hide!r}")
        if temperature < 0:
            raise InvalidValueError(
                "temperature-negative",
                f"temperature must not be negative, got {temperature}; 0 hides exactly the extreme cells",
            )
        self.hide = hide
        self.temperature = temperature

    def draw(self, batch: int, grid: tuple[int, int], at: Randomness, scores: Tensor | None) -> Tensor:
        if scores is None or tuple(scores.shape) != (batch, *grid):
            found = None if scores is None else tuple(scores.shape)
            raise InvalidValueError(
                "attention-scores-shape", f"AttentionMask needs the teacher's attention {(batch, *grid)} as scores, got {found}"
            )
        # the logarithm of a probability plus Gumbel noise: the largest ones are a draw without replacement
        noise = -at.uniform(batch, *grid).clamp_min(1e-20).log()
        gumbel = -noise.clamp_min(1e-20).log()
        logits = scores.to(at.device).float().clamp_min(1e-20).log()
        to_hide = logits if self.hide == "high" else -logits
        return highest(-(to_hide + self.temperature * gumbel), self.count(grid))


def highest(values: Tensor, count: int) -> Tensor:
    """True at the ``count`` highest values of each image: (B, h, w) -> bool (B, h, w)."""
    flat = values.flatten(1)
    visible = torch.zeros_like(flat, dtype=torch.bool)
    visible.scatter_(1, flat.argsort(dim=1, descending=True)[:, :count], True)
    return visible.view_as(values)


def expand(visible: Tensor, ratio: int | tuple[int, int]) -> Tensor:
    """Every cell repeated on a finer grid, (B, h, w) -> (B, h * r, w * s); ``ratio`` is r = s, or (r, s)."""
    rows, columns = (ratio, ratio) if isinstance(ratio, int) else ratio
    return visible.repeat_interleave(rows, -2).repeat_interleave(columns, -1)


def ids_keep_of(patches: Tensor) -> Tensor:
    """bool (B, N) with equally many True in each row -> their indices, ascending, int64 (B, n)."""
    return patches.nonzero()[:, 1].view(len(patches), -1)


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
