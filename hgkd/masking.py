"""Generators of visible cells. One polarity: True = visible.

Number of visible cells an image: ``round(h * w * (1 - mask_ratio))`` as SparK (arXiv 2301.03580) keeps them; the MAE family
truncates instead (``rounding='floor'``): 20 against 19 of 49 at ratio 0.6. Halves go up here; in SparK's code they go to the
even number, as Python's ``round`` does: of 49 cells at ratio 0.5 it keeps 24, here 25 stay visible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hgkd.cells import grid_of as grid_of
from hgkd.cells import highest as highest
from hgkd.cells import visible_count as visible_count
from hgkd.errors import InvalidValueError
from hgkd.registry import MODELS
from hgkd.sparse.hardware import require


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
    """Source of random numbers, and the device that they are for.

    Attributes:
        device: of the result.
        generator: None: torch's own.
    """

    device: torch.device | str
    generator: torch.Generator | None = None

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1)."""
        return torch.rand(*shape, generator=self.generator, device=self.device)


class UniformNumbers:
    """Context that gives the numbers that many calls of ``torch.rand`` would give, from a few.

    After it the generator has advanced by as many as were taken.

    Args:
        generator: None: torch's own of the CPU. One on a GPU numbers its calls, so it is asked for each.
    """

    def __init__(self, generator: torch.Generator | None) -> None:
        self._generator = torch.default_generator if generator is None else generator
        self._ahead = self._generator.device.type == "cpu"
        self._drawn: list[float] = []
        self._taken = 0

    def __enter__(self) -> UniformNumbers:
        self._before = self._generator.get_state()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._ahead:
            self._generator.set_state(self._before)
            self._draw(self._taken)

    def _draw(self, count: int) -> list[float]:
        numbers: list[float] = torch.rand(count, generator=self._generator, device=self._generator.device).tolist()
        return numbers

    def take(self, count: int) -> list[float]:
        """The next numbers in [0, 1)."""
        if not self._ahead:
            return self._draw(count)
        if self._taken + count > len(self._drawn):
            self._drawn += self._draw(4096)
        first, self._taken = self._taken, self._taken + count
        return self._drawn[first : self._taken]


class CountedMask:
    """Base of generators that show as many cells of an image as its ratio asks for; a subclass gives :meth:`draw`.

    Args:
        mask_ratio: share of hidden cells in [0, 1); 0 keeps everything visible. A pair (low, high) draws a ratio for each
            image, evenly between the two: with ``(0.0, 0.75)`` a batch holds whole images and images of which a quarter is
            left, each at the cost of its own cells.
        rounding: see :func:`visible_count`.
        final_mask_ratio: the share at the end of training, reached linearly over the steps; None: the same throughout. With
            one ``mask_ratio`` only.
        unmasked_share: share of the training steps, the last ones, in which nothing is hidden, in [0, 1); after the unmasked
            tuning of FLIP (arXiv 2212.00794, section 3). An unmasked step costs what a dense one costs.
    """

    guided = False

    def __init__(
        self,
        mask_ratio: float | Sequence[float] = 0.6,
        rounding: str = "round",
        final_mask_ratio: float | None = None,
        unmasked_share: float = 0.0,
    ) -> None:
        if isinstance(mask_ratio, Sequence) and not isinstance(mask_ratio, str):
            self.mask_ratio: float | tuple[float, float] = self._checked_pair(mask_ratio, final_mask_ratio)
            self.final_mask_ratio: float | tuple[float, float] = self.mask_ratio
        else:
            self.mask_ratio = mask_ratio
            self.final_mask_ratio = mask_ratio if final_mask_ratio is None else final_mask_ratio
        self.rounding = rounding
        self.unmasked_share = _checked_share(unmasked_share)
        self.progress = 0.0
        for ratio in self._extremes():
            visible_count(1000, 1000, ratio, rounding)  # refuses a ratio that no grid can serve, before training

    @staticmethod
    def _checked_pair(given: Sequence[float], final: float | None) -> tuple[float, float]:
        if len(given) != 2:
            raise InvalidValueError(
                "mask-ratio-pair", f"mask_ratio is one number or a pair (low, high), got {len(given)} numbers: {list(given)}"
            )
        if final is not None:
            raise InvalidValueError(
                "mask-ratio-pair",
                f"final_mask_ratio={final} changes one mask_ratio over the training, but mask_ratio={list(given)} "
                "draws one for each image; leave out one of the two",
            )
        low, high = given
        for ratio in given:
            visible_count(1000, 1000, ratio)  # refuses what is no ratio, before the two are compared
        if low > high:
            raise InvalidValueError("mask-ratio-pair", f"mask_ratio is (low, high), got {list(given)}; write [{high}, {low}]")
        return float(low), float(high)

    def _extremes(self) -> tuple[float, ...]:
        """The smallest and largest ratios of the masked part of the training."""
        if isinstance(self.mask_ratio, tuple):
            return self.mask_ratio
        assert not isinstance(self.final_mask_ratio, tuple)
        return (self.mask_ratio, self.final_mask_ratio)

    @property
    def counts_differ(self) -> bool:
        """Whether images of one batch may show different numbers of cells."""
        return isinstance(self.mask_ratio, tuple) and self.mask_ratio[0] != self.mask_ratio[1]

    def hides_nothing(self, grid: tuple[int, int]) -> bool:
        """Whether all cells are visible throughout the training."""
        return min(self.count_at(grid, ratio) for ratio in self._extremes()) == grid[0] * grid[1]

    def why_masks_are_equal(self, grid: tuple[int, int]) -> str | None:
        """Why all masks that are drawn for one image are the same throughout the training; None: they differ."""
        return "nothing is hidden" if self.hides_nothing(grid) else None

    def shows_whole_images(self, grid: tuple[int, int]) -> bool:
        """Whether there are steps in which no image of the batch hides anything, or of a pair of ratios may be by chance."""
        ratios = self._extremes()[:1] if isinstance(self.mask_ratio, tuple) else self._extremes()
        return self.unmasked_share > 0.0 or any(self.count_at(grid, ratio) == grid[0] * grid[1] for ratio in ratios)

    @property
    def in_unmasked_end(self) -> bool:
        """Whether nothing is hidden any more at this moment of the training."""
        return self.unmasked_share > 0.0 and self.progress > 1.0 - self.unmasked_share

    @property
    def current_ratio(self) -> float:
        """The share of hidden cells at this moment of the training; of a pair its mean."""
        if self.in_unmasked_end:
            return 0.0
        first, last = self._extremes()
        if isinstance(self.mask_ratio, tuple):
            return (first + last) / 2
        return first + (last - first) * self.progress

    def check(self, grid: tuple[int, int]) -> None:
        """Raise ValueError when no cell of the grid would stay visible."""
        for ratio in self._extremes():
            visible_count(*grid, ratio, self.rounding)

    def count(self, grid: tuple[int, int]) -> int:
        """Number of visible cells of every image at this moment of the training.

        Raises:
            ValueError: each image has a ratio of its own, see :meth:`counts`.
        """
        if self.counts_differ and not self.in_unmasked_end:
            raise InvalidValueError(
                "one-mask-ratio-needed",
                f"{type(self).__name__} shows the same number of cells in every image, but "
                f"mask_ratio={list(self._extremes())} draws one for each; give one number",
            )
        return self.count_at(grid, self.current_ratio)

    def count_at(self, grid: tuple[int, int], ratio: float) -> int:
        """Number of visible cells of an image of which this share is to be hidden."""
        return visible_count(*grid, ratio, self.rounding)

    def counts(self, batch: int, grid: tuple[int, int], at: Randomness) -> Tensor:
        """Number of visible cells of each image at this moment of the training: int64 (batch,)."""
        if not self.counts_differ or self.in_unmasked_end:
            return torch.full((batch,), self.count(grid), device=at.device)
        low, high = self._extremes()
        keep = grid[0] * grid[1] * (1.0 - (low + (high - low) * at.uniform(batch).double()))
        # the arithmetic of `visible_count`
        counts = (keep + (0.5 if self.rounding == "round" else 0.0) + 1e-6).floor().long()
        return counts.clamp(visible_count(*grid, high, self.rounding), visible_count(*grid, low, self.rounding))

    @property
    def shows_rectangles(self) -> bool:
        """Whether every draw shows one rectangle in each image, all of one size."""
        return False

    def rectangle(self, grid: tuple[int, int]) -> tuple[int, int] | None:
        """(rows, columns) of the rectangle that every image of the last draw shows, where each shows one, all of one size."""
        return None

    def describe(self, grid: tuple[int, int]) -> str:
        """The cells that an image shows over the training, as a text for logs: '20 of 49 visible (mask_ratio 0.6)'."""
        first, last = self._extremes()
        cells = grid[0] * grid[1]
        seen = [self.count_at(grid, ratio) for ratio in (first, last)]
        if isinstance(self.mask_ratio, tuple):
            text = f"{seen[1]} to {seen[0]} of {cells} visible, drawn for each image (mask_ratio {first:g} to {last:g})"
        else:
            text = f"{seen[0]} of {cells} visible (mask_ratio {first:g})"
            if last != first:
                text += f" at the beginning, {seen[1]} ({last:g}) at the end"
        if self.unmasked_share:
            text += f"; all in the last {100 * self.unmasked_share:g} % of the steps"
        return text

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
        if self.in_unmasked_end:
            return torch.ones(batch, *grid, dtype=torch.bool, device=device)
        return self.draw(batch, grid, Randomness(device, generator), scores)

    def draw_views(self, views: int, batch: int, grid: tuple[int, int], at: Randomness, scores: Tensor | None = None) -> Tensor:
        """Several masks of each image: bool (views * batch, h, w), the first view of all images, then the second, and so on.

        Here one independent of the other; a subclass may see to it that views of an image show different cells.
        """
        return torch.cat([self.draw(batch, grid, at, scores) for _ in range(views)])

    def draw(self, batch: int, grid: tuple[int, int], at: Randomness, scores: Tensor | None) -> Tensor:
        """Draw a mask, by the subclass: bool (batch, h, w), True = visible.

        With :meth:`count` cells visible in every image, or, where the generator serves a pair of ratios, :meth:`counts`.
        """
        raise NotImplementedError


def _checked_share(share: float) -> float:
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0.0 <= share < 1.0:
        raise InvalidValueError(
            "unmasked-share-out-of-range",
            f"unmasked_share is a share of the training steps in [0, 1), got {share!r}; write e.g. 0.2",
        )
    return float(share)


@MODELS.register_module()
class RandomMask(CountedMask):
    """Uniformly random visible cells; arguments: see :class:`CountedMask`.

    Several views of an image show different cells, as long as there are any that none has shown; then they begin anew. So
    four views at ratio 0.75 show every cell once.
    """

    def draw_views(self, views: int, batch: int, grid: tuple[int, int], at: Randomness, scores: Tensor | None = None) -> Tensor:
        """See :meth:`CountedMask.draw_views`."""
        order = at.uniform(batch, *grid).flatten(1).argsort(dim=1).argsort(dim=1)
        drawn, before = [], torch.zeros(batch, dtype=torch.long, device=order.device)
        for _ in range(views):
            counts = self.counts(batch, grid, at)
            drawn.append((order - before[:, None]) % order.shape[1] < counts[:, None])
            before = before + counts
        return torch.cat(drawn).view(views * batch, *grid)

    def draw(self, batch: int, grid: tuple[int, int], at: Randomness, scores: Tensor | None) -> Tensor:
        if not self.counts_differ:
            return highest(at.uniform(batch, *grid), self.count(grid))
        return highest(at.uniform(batch, *grid), self.counts(batch, grid, at))


@MODELS.register_module()
class BlockMask(CountedMask):
    """Hidden rectangles, after BEiT (arXiv 2106.08254, algorithm 1), but always exactly the asked number of cells.

    Rectangles of random place, area and shape are hidden one after the other, no larger than what is still to be hidden.

    Args:
        mask_ratio, rounding, final_mask_ratio, unmasked_share: see :class:`CountedMask`.
        min_cells: smallest rectangle, in cells, while that many are left; BEiT's is 16 on a 14 x 14 grid.
        min_aspect: height / width lies between this and its inverse, evenly on a logarithmic scale; BEiT's is 0.3.
    """

    def __init__(
        self,
        mask_ratio: float | Sequence[float] = 0.6,
        rounding: str = "round",
        final_mask_ratio: float | None = None,
        unmasked_share: float = 0.0,
        min_cells: int = 4,
        min_aspect: float = 0.3,
    ) -> None:
        super().__init__(mask_ratio, rounding, final_mask_ratio, unmasked_share)
        if min_cells < 1:
            raise InvalidValueError("min-cells-not-positive", f"min_cells must be 1 or more, got {min_cells}")
        if not 0.0 < min_aspect <= 1.0:
            raise InvalidValueError("min-aspect-out-of-range", f"min_aspect must be in (0, 1], got {min_aspect}; BEiT uses 0.3")
        self.min_cells = min_cells
        self.min_aspect = min_aspect

    def draw(self, batch: int, grid: tuple[int, int], at: Randomness, scores: Tensor | None) -> Tensor:
        cells = grid[0] * grid[1]
        counts = self.counts(batch, grid, at).tolist() if self.counts_differ else [self.count(grid)] * batch
        visible = np.ones((batch, *grid), dtype=bool)
        with UniformNumbers(at.generator) as numbers:
            for image, count in zip(visible, counts, strict=True):
                self._hide(image, cells - count, numbers)
        return torch.from_numpy(visible).to(at.device)

    def _hide(self, visible: NDArray[np.bool_], hidden: int, numbers: UniformNumbers) -> None:
        grid = visible.shape
        while hidden:
            area, shape, top, left = numbers.take(4)
            low = min(self.min_cells, hidden)
            cells = low + area * (hidden - low)
            aspect = self.min_aspect ** (2.0 * shape - 1.0)
            height = min(grid[0], max(1, math.floor(math.sqrt(cells * aspect))), math.floor(cells))
            width = min(grid[1], max(1, math.floor(cells / height)))
            row, column = math.floor(top * (grid[0] - height + 1)), math.floor(left * (grid[1] - width + 1))
            block = visible[row : row + height, column : column + width]
            hidden -= int(block.sum())
            block[:] = False


@MODELS.register_module()
class RectangleMask(CountedMask):
    """One visible rectangle of cells an image, everything around it hidden: no torn regions, and four borders at most.

    A rectangle has the area that a whole number of rows and columns can give nearest to the asked number of cells; of the
    shapes with that area each batch draws one, and each image its position, evenly. So every image shows the same number of
    cells, which may differ from the other generators' (:meth:`count` says it): of 4 x 4 cells at ratio 0.6 all show 6, of
    7 x 7 all show 20. Rectangles of one shape need no sparse arithmetic (:mod:`hgkd.sparse.rectangle`): they are the cheapest
    masks.

    Args:
        mask_ratio, rounding, final_mask_ratio, unmasked_share: see :class:`CountedMask`. With a pair of ratios each image has
            the area nearest to its own, and a shape.
        min_aspect: rows / columns of a rectangle lies between this and its inverse; slivers hold little of an object.
    """

    def __init__(
        self,
        mask_ratio: float | Sequence[float] = 0.6,
        rounding: str = "round",
        final_mask_ratio: float | None = None,
        unmasked_share: float = 0.0,
        min_aspect: float = 0.3,
    ) -> None:
        super().__init__(mask_ratio, rounding, final_mask_ratio, unmasked_share)
        if not 0.0 < min_aspect <= 1.0:
            raise InvalidValueError(
                "min-aspect-out-of-range",
                f"min_aspect must be in (0, 1], got {min_aspect}; 0.3 allows rectangles of 1 x 3 cells, 1 squares only",
            )
        self.min_aspect = min_aspect
        self._drawn: tuple[int, int] | None = None

    @property
    def shows_rectangles(self) -> bool:
        """See :attr:`CountedMask.shows_rectangles`; not where each image has a ratio of its own."""
        return not self.counts_differ

    def rectangle(self, grid: tuple[int, int]) -> tuple[int, int] | None:
        """See :meth:`CountedMask.rectangle`; None where each image has a ratio of its own, and before the first draw."""
        return grid if self.in_unmasked_end else self._drawn

    def check(self, grid: tuple[int, int]) -> None:
        """Raise ValueError when no cell would stay visible, or no rectangle has about the area that is asked for."""
        super().check(grid)
        for ratio in self._extremes():
            asked = visible_count(*grid, ratio, self.rounding)
            rows, columns = self.shapes(grid, asked)[0]
            if abs(rows * columns - asked) > max(1.0, 0.15 * asked) and ratio > 0.0:
                raise InvalidValueError(
                    "no-such-rectangle",
                    f"no rectangle on a {grid[0]} x {grid[1]} grid shows about {asked} cells (mask_ratio {ratio:g}, "
                    f"min_aspect {self.min_aspect:g}); the nearest shows {rows} x {columns}. Use another mask_ratio, a "
                    "smaller min_aspect or smaller cells",
                )

    def shapes(self, grid: tuple[int, int], count: int) -> list[tuple[int, int]]:
        """(rows, columns) of the rectangles whose area is nearest to ``count``; of two areas as near, the larger."""
        sides = [(rows, columns) for rows in range(1, grid[0] + 1) for columns in range(1, grid[1] + 1)]
        allowed = [side for side in sides if min(side) >= self.min_aspect * max(side) or side == grid]
        area = min((rows * columns for rows, columns in allowed), key=lambda found: (abs(found - count), -found))
        return [(rows, columns) for rows, columns in allowed if rows * columns == area]

    def count_at(self, grid: tuple[int, int], ratio: float) -> int:
        """See :meth:`CountedMask.count_at`: the area of the rectangles."""
        rows, columns = self.shapes(grid, super().count_at(grid, ratio))[0]
        return rows * columns

    def draw_views(self, views: int, batch: int, grid: tuple[int, int], at: Randomness, scores: Tensor | None = None) -> Tensor:
        """See :meth:`CountedMask.draw_views`; all views have one shape."""
        return self.draw(views * batch, grid, at, scores)

    def draw(self, batch: int, grid: tuple[int, int], at: Randomness, scores: Tensor | None) -> Tensor:
        counts = self.counts(batch, grid, at).tolist() if self.counts_differ else [self.count(grid)]
        possible = {count: self.shapes(grid, count) for count in set(counts)}
        visible = np.zeros((batch, *grid), dtype=bool)
        with UniformNumbers(at.generator) as numbers:
            shapes = [possible[count][int(numbers.take(1)[0] * len(possible[count]))] for count in counts]
            self._drawn = None if self.counts_differ else shapes[0]
            shapes = shapes if self.counts_differ else shapes * batch
            for image, (rows, columns) in zip(visible, shapes, strict=True):
                top, left = numbers.take(2)
                row, column = int(top * (grid[0] - rows + 1)), int(left * (grid[1] - columns + 1))
                image[row : row + rows, column : column + columns] = True
        return torch.from_numpy(visible).to(at.device)


@MODELS.register_module()
class AttentionMask(CountedMask):
    """Cells hidden by how much the teacher attends to them, after AttMask (arXiv 2203.12719).

    Cells are drawn one by one without replacement, each with a probability that grows with its score to the power
    1 / ``temperature``; 0 hides exactly the highest (or lowest) ones. The teacher sees every whole image for it.

    Args:
        mask_ratio, rounding, final_mask_ratio, unmasked_share: see :class:`CountedMask`.
        hide: 'high' (AttMask: hide what matters, which is hard to guess) or 'low' attention (show what matters).
        temperature: 0 or more.
    """

    guided = True

    def __init__(
        self,
        mask_ratio: float | Sequence[float] = 0.6,
        rounding: str = "round",
        final_mask_ratio: float | None = None,
        unmasked_share: float = 0.0,
        hide: str = "high",
        temperature: float = 0.5,
    ) -> None:
        super().__init__(mask_ratio, rounding, final_mask_ratio, unmasked_share)
        if hide not in ("high", "low"):
            raise InvalidValueError("hide-unknown", f"hide must be 'high' or 'low' (attention), got {hide!r}")
        if not 0 <= temperature < math.inf:  # NaN is neither
            raise InvalidValueError(
                "temperature-negative",
                f"temperature must be 0 or more and finite, got {temperature}; 0 hides exactly the extreme cells",
            )
        self.hide = hide
        self.temperature = temperature

    def why_masks_are_equal(self, grid: tuple[int, int]) -> str | None:
        """See :meth:`CountedMask.why_masks_are_equal`."""
        if self.temperature == 0 and not self.counts_differ:
            return "temperature=0 always hides the extreme cells"
        return super().why_masks_are_equal(grid)

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
        show = -(to_hide + self.temperature * gumbel)
        return highest(show, self.counts(batch, grid, at) if self.counts_differ else self.count(grid))


def expand(visible: Tensor, ratio: int | tuple[int, int]) -> Tensor:
    """Every cell repeated on a finer grid, (B, h, w) -> (B, h * r, w * s); ``ratio`` is r = s, or (r, s)."""
    rows, columns = (ratio, ratio) if isinstance(ratio, int) else ratio
    return visible.repeat_interleave(rows, -2).repeat_interleave(columns, -1)


def ids_keep_of(patches: Tensor, count: int | None = None) -> Tensor:
    """Indices of the True entries of each row, ascending.

    Args:
        patches: bool (B, N), equally many True in each row.
        count: of them in a row, where known: the host then waits for nothing. Another number ends the process on a GPU.

    Returns:
        int64 (B, n).

    Raises:
        ValueError: another number, on the CPU.
    """
    if count is None:
        return patches.nonzero()[:, 1].view(len(patches), -1)
    counts = patches.sum(1)
    require(
        (counts == count).all(),
        lambda: InvalidValueError(
            "visible-cells-miscounted",
            f"the mask was said to show {count} patches of every image, and shows {counts.tolist()[:8]}: a mask generator's "
            "count(grid) must be the number of cells that its draw() shows",
        ),
    )
    return torch.nonzero_static(patches, size=len(patches) * count)[:, 1].view(len(patches), count)
