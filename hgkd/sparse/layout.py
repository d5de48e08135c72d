"""Which cells of a batch are visible, and the gather indices that follow from it.

A layout is built once a step from a mask and lives as long as the tensors that carry it; every index is made when a layer
first asks for it and kept, so that all layers with the same geometry share one. Everything is made on the mask's own
device; counting the visible cells is the only step that waits for it, and none does where their number is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, wraps
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hgkd.errors import InvalidTypeError, InvalidValueError
from hgkd.sparse.hardware import is_capturing, require

T = TypeVar("T")


class CellLayout:
    """The visible cells of a batch of equally large images.

    Args:
        visible: bool (B, h, w), True = visible. Images may have different numbers of visible cells, at least one each.
        cell: side of a square cell, pixels.
        renormalize: scale what convolutions and average pooling give next to hidden cells; see :mod:`hgkd.sparse.taps`.
        num_cells: True entries of ``visible``, where known: the host then waits for nothing, and a CUDA graph may hold the
            layout. A mask with another number ends the process on a GPU (a device-side assertion).
        rectangle: (rows, columns) in cells of the one rectangle that each image shows, where that is known: a GPU then takes
            the visible part as crops (:mod:`hgkd.sparse.rectangle`). A mask with others ends the process on a GPU.

    Attributes:
        batch: B.
        grid: (h, w).
        image_size: (h * cell, w * cell) in pixels.
        num_cells: T, visible cells in the whole batch; packed tensors have this length.
        chosen: layer -> kernel, where it is not the rule's; see :mod:`hgkd.sparse.measured`.

    Raises:
        TypeError: ``visible`` is not a bool tensor.
        ValueError: wrong shape, ``cell`` < 1, an image without any visible cell, or (on a CPU) a mask that is not as it was
            said to be.
    """

    chosen: Mapping[str, str] = {}

    def __init__(
        self,
        visible: Tensor,
        cell: int,
        renormalize: bool = False,
        num_cells: int | None = None,
        rectangle: tuple[int, int] | None = None,
    ) -> None:
        if not isinstance(visible, Tensor) or visible.dtype != torch.bool:
            kind = visible.dtype if isinstance(visible, Tensor) else type(visible).__name__
            raise InvalidTypeError("visible-dtype", f"visible must be a bool tensor with True = visible, got {kind}")
        if visible.dim() != 3:
            raise InvalidValueError("visible-shape", f"visible must have shape (B, h, w), got {tuple(visible.shape)}")
        if cell < 1:
            raise InvalidValueError("cell-not-positive", f"cell must be a positive number of pixels, got {cell}")
        self.visible = visible
        self.cell = cell
        self.renormalize = renormalize
        self.batch, h, w = visible.shape
        self.grid = (h, w)
        self.image_size = (h * cell, w * cell)
        with torch.inference_mode(False):  # a layout may serve an evaluation first and a training later
            if rectangle is not None:
                self._positions = self._expected_rectangles(rectangle)
            else:
                self._positions = self._counted() if num_cells is None else self._expected(num_cells)
        self.num_cells = len(self._positions)
        self._cache: dict[tuple[object, ...], Any] = {}

    def _counted(self) -> Tensor:
        """Places of the visible cells, ascending, int64 (T,)."""
        counts = _sent_to_host(self.visible.flatten(1).sum(1))
        positions = self.visible.flatten().nonzero().flatten()  # the one wait for the device, after which counts are here too
        if 0 in (counted := counts.tolist()):
            empty = [image for image, count in enumerate(counted) if not count]
            raise InvalidValueError(
                "image-without-visible-cell",
                f"images {empty[:5]} of the batch have no visible cell; keep at least one cell an image",
            )
        return positions

    def _expected(self, num_cells: int) -> Tensor:
        """The same where their number is known."""
        counts = self.visible.flatten(1).sum(1)
        require(
            (counts.sum() == num_cells) & counts.all(),
            lambda: InvalidValueError(
                "visible-cells-miscounted",
                f"the mask was said to show {num_cells} cells, at least one an image, and shows {counts.tolist()[:8]}: a mask "
                "generator's count(grid) must be the number of cells that its draw() shows",
            ),
        )
        return torch.nonzero_static(self.visible.flatten(), size=num_cells).flatten()

    def _expected_rectangles(self, sides: tuple[int, int]) -> Tensor:
        """The same where each image shows one rectangle of this size."""
        require(
            _show_rectangles(self.visible, sides),
            lambda: InvalidValueError(
                "visible-rectangles-differ",
                f"the mask was said to show one rectangle of {sides[0]} x {sides[1]} cells in each image, and shows others: a "
                "mask generator's rectangle(grid) must be what its last draw() shows",
            ),
        )
        self.rectangle = sides
        return torch.nonzero_static(self.visible.flatten(), size=self.batch * sides[0] * sides[1]).flatten()

    def __repr__(self) -> str:
        total = self.batch * self.grid[0] * self.grid[1]
        return f"CellLayout(batch={self.batch}, grid={self.grid}, cell={self.cell}, visible={self.num_cells}/{total})"

    @property
    def device(self) -> torch.device:
        """Device of the mask and of every index."""
        return self.visible.device

    @cached_property
    def image_of_cell(self) -> Tensor:
        """Image index of each visible cell, int64 (T,)."""
        return self._positions // (self.grid[0] * self.grid[1])

    @cached_property
    def cell_in_image(self) -> Tensor:
        """Place of each visible cell in its image's grid, row by row, int64 (T,)."""
        return self._positions % (self.grid[0] * self.grid[1])

    @cached_property
    def _cell_y(self) -> Tensor:
        return self._positions // self.grid[1] % self.grid[0]

    @cached_property
    def _cell_x(self) -> Tensor:
        return self._positions % self.grid[1]

    @cached_property
    def cells_per_image(self) -> Tensor:
        """Number of visible cells of each image, int64 (B,)."""
        return self.visible.flatten(1).sum(1)

    @cached_property
    def all_visible(self) -> bool:
        """Whether no cell is hidden; known from shapes alone."""
        return self.num_cells == self.batch * self.grid[0] * self.grid[1]

    @cached_property
    def rectangle(self) -> tuple[int, int] | None:
        """(rows, columns) in cells where each image shows one rectangle, all of this size; else None.

        On other devices than the CPU, whose host would have to wait for the answer, None unless it was given.
        """
        if self.device.type != "cpu":
            return None
        first = self.visible[0].numpy()
        sides = (int(first.any(1).sum()), int(first.any(0).sum()))
        return sides if _show_rectangles(self.visible, sides).numpy() else None

    @cached_property
    def _slot(self) -> Tensor:
        """Packed index of each cell, int32 (B, h, w); ``num_cells`` at hidden ones."""
        kind: dict[str, Any] = {"dtype": torch.int32, "device": self.device}
        slot = torch.full((self.batch * self.grid[0] * self.grid[1],), self.num_cells, **kind)
        slot[self._positions] = torch.arange(self.num_cells, **kind)
        return slot.view(self.batch, *self.grid)

    def _index_dtype(self, size: int) -> torch.dtype:
        """Of the indices of values, ``size`` a visible cell: half as much memory to read, unless there are too many for it."""
        return torch.int32 if (self.num_cells + 2) * size <= NOTHING else torch.int64

    def side(self, stride: int) -> int:
        """Positions along a cell's side in a feature map of the given stride.

        Raises:
            ValueError: the stride does not divide the cell.
        """
        if stride < 1 or self.cell % stride:
            raise InvalidValueError(
                "stride-does-not-fit-cells",
                f"a feature map of stride {stride} does not fit cells of {self.cell} px; "
                f"use cells that are a multiple of the network's total stride",
            )
        return self.cell // stride

    def keep(self, key: tuple[object, ...], make: Callable[[], T]) -> T:
        """Result of ``make()`` when ``key`` was first asked for: everything that follows from the mask is made once."""
        if key not in self._cache:
            with torch.inference_mode(False):  # as above: autograd saves no tensor that was made in inference mode
                self._cache[key] = make()
        return self._cache[key]

    def mask(self, stride: int) -> Tensor:
        """Visible positions of a feature map, bool (B, 1, H/stride, W/stride)."""
        s = self.side(stride)
        return self.keep(("mask", s), lambda: self.visible.repeat_interleave(s, 1).repeat_interleave(s, 2).unsqueeze(1))

    def mask_as(self, stride: int, dtype: torch.dtype) -> Tensor:
        """:meth:`mask` as numbers 1 and 0, (B, 1, H/stride, W/stride)."""
        return self.keep(("mask", self.side(stride), dtype), lambda: self.mask(stride).to(dtype))

    def row_map(self, s: int) -> Tensor:
        """Packed row of every position, (B, h*s, w*s), with ``T*s*s`` (one past the last row) at hidden positions.

        Like all indices of rows int32, or int64 where there are too many rows.
        """

        def make() -> Tensor:
            dtype = self._index_dtype(s * s)
            inside = torch.arange(s * s, dtype=dtype, device=self.device).view(s, s).repeat(*self.grid)
            slot = self._slot.to(dtype).repeat_interleave(s, 1).repeat_interleave(s, 2)
            return torch.where(slot < self.num_cells, slot * (s * s) + inside, self.num_cells * s * s)

        return self.keep(("rows", s), make)

    def positions(self, s: int) -> Tensor:
        """Place of every packed row in the flattened map (B, h*s, w*s), (T*s*s,): inverse of :meth:`row_map`."""

        def make() -> Tensor:
            # hidden places are counted as well here
            dtype = torch.int32 if self.visible.numel() * s * s <= NOTHING else torch.int64
            image, y, x = self.coordinates(s).to(dtype).unbind(1)
            return (image * (self.grid[0] * s) + y) * (self.grid[1] * s) + x

        return self.keep(("positions", s), make)

    def coordinates(self, s: int) -> Tensor:
        """(image, y, x) of every visible position in packed row order, int32 (T*s*s, 3), contiguous."""

        def make() -> Tensor:
            inside = torch.arange(s * s, device=self.device)
            y = (self._cell_y * s)[:, None] + inside // s
            x = (self._cell_x * s)[:, None] + inside % s
            return torch.stack([self.image_of_cell[:, None].expand_as(y), y, x], 2).view(-1, 3).int().contiguous()

        return self.keep(("coordinates", s), make)

    def neighbours(
        self,
        s: int,
        count: int,
        step: int,
        offsets_y: tuple[int, ...],
        offsets_x: tuple[int, ...],
        outside: int = 0,
        border: str = "constant",
    ) -> Tensor:
        """Rows of a packed map that lie at given offsets from a regular set of points in every visible cell.

        Point (i, j) of a cell whose first place is (y0, x0) reads the positions ``y0 + i*step + offset_y`` and
        ``x0 + j*step + offset_x``.

        Args:
            s: positions along a cell's side in the map that is read.
            count: points along a cell's side.
            step: positions between two points.
            offsets_y, offsets_x: offsets in positions, equally spaced, may be negative.
            outside: the index given to positions outside the image is ``T*s*s + outside``; hidden positions inside it always
                have ``T*s*s``. So one zero row appended to the map serves both, and a second row tells them apart.
            border: 'reflect' gives positions outside the image the index of their mirror image inside it.

        Returns:
            (T * count * count, len(offsets_y) * len(offsets_x)), points in packed row order; int32, or int64 where there are
            too many rows.
        """
        key = ("neighbours", s, count, step, offsets_y, offsets_x, outside, border)
        if border == "reflect":
            return self.keep(key, lambda: self._find_mirrored(s, count, step, offsets_y, offsets_x))
        taps = len(offsets_y) * len(offsets_x)
        return self.look_up(
            key, lambda: regular_stencil(s, count, step, offsets_y, offsets_x, self.device), s * s, taps, outside
        )

    def look_up(self, key: tuple[object, ...], make: Callable[[], Stencil], size: int, taps: int, outside: int = 0) -> Tensor:
        """Indices that the points of a stencil read in every visible cell: ``packed index of the cell * size + value``.

        Args:
            key, make: see :meth:`keep`.
            size: values a cell.
            taps: columns of the result.
            outside: what is added to ``T * size`` outside the image; hidden cells have ``T * size``.

        Returns:
            (T * P / taps, taps), int32 or int64 as :meth:`neighbours`.
        """

        def find() -> Tensor:
            stencil, none, dtype = make(), self.num_cells * size, self._index_dtype(size)
            value = stencil.value
            if dtype != value.dtype:
                value = value.to(dtype).masked_fill(value == NOTHING, none)
            index = self.cells_around(stencil.reach).index_select(1, stencil.cell).to(dtype).mul_(size).add_(value)
            beyond = index >= none + size if outside else None
            index.clamp_(max=none)
            if beyond is not None:
                index += outside * beyond
            return index.view(-1, taps)

        return self.keep(key, find)

    def _find_mirrored(self, s: int, count: int, step: int, offsets_y: tuple[int, ...], offsets_x: tuple[int, ...]) -> Tensor:
        points = torch.arange(count, device=self.device)[:, None] * step
        h, w = self.grid
        y, x = self._cell_y[:, None] * s, self._cell_x[:, None] * s
        y = _mirrored(y + (points + spaced(offsets_y, self.device)).flatten(), h * s).view(-1, count, 1, len(offsets_y), 1)
        x = _mirrored(x + (points + spaced(offsets_x, self.device)).flatten(), w * s).view(-1, 1, count, 1, len(offsets_x))
        cell = self._slot[self.image_of_cell.view(-1, 1, 1, 1, 1), y // s, x // s]
        index = (cell * (s * s) + (y % s) * s + x % s).clamp_(max=self.num_cells * s * s)
        return index.view(-1, len(offsets_y) * len(offsets_x)).to(self._index_dtype(s * s))

    def cells_around(self, reach: int) -> Tensor:
        """Packed index of the (2*reach+1)**2 cells up to ``reach`` away from each visible one, row by row.

        Returns:
            int32 (T, (2*reach+1)**2), ``num_cells`` at hidden cells, ``num_cells + 1`` outside the image.
        """

        def make() -> Tensor:
            slot = F.pad(self._slot, (reach, reach, reach, reach), value=self.num_cells + 1)
            height, width = slot.shape[1:]
            start = (self.image_of_cell * height + self._cell_y) * width + self._cell_x
            along = torch.arange(2 * reach + 1, device=self.device)
            return slot.flatten()[start[:, None] + (along[:, None] * width + along).flatten()]

        return self.keep(("cells", reach), make)

    def gather_cells(self, dense: Tensor, s: int) -> Tensor:
        """Visible cells of a dense map (B, C, h*s, w*s) as (T, C, s, s), channels_last; differentiable."""
        if not self.all_visible:
            return _SelectCells.apply(dense, self, s)
        return self._split(dense, s).reshape(self.num_cells, s, s, -1).permute(0, 3, 1, 2)

    def _split(self, dense: Tensor, s: int) -> Tensor:
        """View of a dense map by cells, (B, h, w, s, s, C)."""
        h, w = self.grid
        return dense.view(self.batch, -1, h, s, w, s).permute(0, 2, 4, 3, 5, 1)

    def select_cells(self, dense: Tensor, s: int) -> Tensor:
        """:meth:`gather_cells` of a map that hides something, in one pass over its visible cells alone."""
        found = self._split(dense, s)[self.image_of_cell, self._cell_y, self._cell_x]
        return found.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)

    def scatter_cells(self, packed: Tensor, fill: float | Tensor = 0.0) -> Tensor:
        """Inverse of :meth:`gather_cells`: (T, C, s, s) to (B, C, h*s, w*s), channels_last, with ``fill`` at hidden positions.

        Differentiable.

        Args:
            packed: (T, C, s, s).
            fill: number, or tensor (C,), which receives the gradient of all hidden positions.
        """
        (h, w), (_, channels, s, _) = self.grid, packed.shape
        rows = packed.permute(0, 2, 3, 1).reshape(self.num_cells, s * s * channels)
        if not self.all_visible:
            rows = _PlaceRows.apply(rows, self._positions, self.batch * h * w)
        cells = rows.view(self.batch, h, w, s, s, channels)
        dense = cells.permute(0, 1, 3, 2, 4, 5).reshape(self.batch, h * s, w * s, channels).permute(0, 3, 1, 2)
        if isinstance(fill, Tensor):
            dense = torch.where(self.mask(self.cell // s), dense, fill.to(dense.dtype).view(1, channels, 1, 1))
        elif fill != 0.0:
            dense = dense.masked_fill(~self.mask(self.cell // s), fill)
        return dense


def _show_rectangles(visible: Tensor, sides: tuple[int, int]) -> Tensor:
    """Whether every mask of (B, h, w) shows one rectangle of (rows, columns) cells: a flag on the masks' device."""
    height, width = sides
    one_block = _one_stretch(visible.any(2), height) & _one_stretch(visible.any(1), width)
    return (one_block & (visible.sum((1, 2)) == height * width)).all()


def _one_stretch(lines: Tensor, length: int) -> Tensor:
    """Whether the True entries of each row of (B, n) are ``length`` ones side by side: bool (B,)."""
    begins = lines[:, 1:] & ~lines[:, :-1]
    return (lines.sum(1) == length) & (lines[:, 0] + begins.sum(1) == 1)


def _sent_to_host(values: Tensor) -> Tensor:
    """A copy on the host. From a CUDA device it is there after the next wait for the stream, and brings no wait of its own."""
    if not values.is_cuda:
        return values.cpu()
    return torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)


def made_once(make: Callable[..., Stencil]) -> Callable[..., Stencil]:
    """Cache of what depends on its arguments alone, of which the last is the device.

    Not while a CUDA graph is recorded: what is made then holds nothing until the graph runs, and lies in the graph's memory.
    """
    kept = cache(make)

    @wraps(make)
    def find(*arguments: object) -> Stencil:
        device = cast(torch.device, arguments[-1])
        return make(*arguments) if is_capturing(device) else kept(*arguments)

    find.cache_clear = kept.cache_clear  # type: ignore[attr-defined]
    return find


@dataclass(frozen=True)
class Stencil:
    """Neighbours that the points of a cell read: equal for every cell and mask, so made once a process.

    Attributes:
        reach: how many cells away at most.
        cell: int64 (P,), which of the (2*reach+1)**2 cells around.
        value: int32 (P,), which value of that cell; ``NOTHING``: reads as hidden.
    """

    reach: int
    cell: Tensor
    value: Tensor


NOTHING = 1 << 30  # more than any map that int32 indexes has values, and the sum of the two is an int32 still


@made_once
def regular_stencil(
    s: int, count: int, step: int, offsets_y: tuple[int, ...], offsets_x: tuple[int, ...], device: torch.device
) -> Stencil:
    """Points ``count`` x ``count``, ``step`` positions apart, each with its neighbours at the given offsets."""
    with torch.inference_mode(False):  # it may be kept for a training to come
        points = torch.arange(count, device=device)[:, None] * step
        y = (points + spaced(offsets_y, device)).view(count, 1, -1, 1)
        x = (points + spaced(offsets_x, device)).view(1, count, 1, -1)
        last = (count - 1) * step
        reach = cells_reached(s, min(*offsets_y, *offsets_x), last + max(*offsets_y, *offsets_x))
        return Stencil(reach, cell_number(y // s, x // s, reach), ((y % s) * s + x % s).flatten().int())


def cells_reached(s: int, first: int, last: int) -> int:
    """How many cells away the positions ``first`` to ``last`` lie at most, counted from a cell's own first place."""
    return max(-(first // s), last // s, 0)


def cell_number(y: Tensor, x: Tensor, reach: int) -> Tensor:
    """Column of :meth:`CellLayout.cells_around` for the cell (y, x) away, flattened."""
    return ((y + reach) * (2 * reach + 1) + x + reach).flatten()


def spaced(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Equally spaced numbers, made on the device: a copy of them from the host would wait for it."""
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 0
    return torch.arange(len(numbers), device=device) * step + numbers[0]


def _mirrored(positions: Tensor, size: int) -> Tensor:
    """Positions beyond either end of an axis, folded back into 0 ... size - 1."""
    return size - 1 - (size - 1 - positions.abs()).abs()


class RepeatImages(torch.autograd.Function):
    """(B, ...) -> (T, ...), for each visible cell what its image has; the gradient is a sum in a fixed order, no atomics."""

    @staticmethod
    def forward(ctx, values: Tensor, cells: CellLayout) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.cells = cells
        return values.index_select(0, cells.image_of_cell)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def, override]
        return SumImages.apply(grad, ctx.cells), None


class SumImages(torch.autograd.Function):
    """(T, ...) -> (B, ...), the sum over each image's visible cells; the inverse direction of :class:`RepeatImages`."""

    @staticmethod
    def forward(ctx, values: Tensor, cells: CellLayout) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.cells = cells
        places = cells.visible[0].numel()
        placed = values.new_zeros(cells.batch * places, *values.shape[1:]).index_copy_(0, cells._positions, values)
        return placed.view(cells.batch, places, *values.shape[1:]).sum(1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def, override]
        return RepeatImages.apply(grad, ctx.cells), None


class _SelectCells(torch.autograd.Function):
    """Visible cells of a dense map; the gradient puts each back to its place, which is no accumulation."""

    @staticmethod
    def forward(ctx, dense: Tensor, cells: CellLayout, s: int) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.cells = cells
        return cells.select_cells(dense, s)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def, override]
        return ctx.cells.scatter_cells(grad), None, None


class _SelectRows(torch.autograd.Function):
    """``rows[index]`` for an index without repeats: the gradient is a plain copy, not an accumulation."""

    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(index)
        ctx.length = rows.shape[0]
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def, override]
        (index,) = ctx.saved_tensors
        return _PlaceRows.apply(grad, index, ctx.length), None


class _PlaceRows(torch.autograd.Function):
    """Rows put at the positions ``index`` (no repeats) of a zero matrix."""

    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor, length: int) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(index)
        return rows.new_zeros(length, rows.shape[1]).index_copy_(0, index, rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def, override]
        (index,) = ctx.saved_tensors
        return _SelectRows.apply(grad, index), None, None
