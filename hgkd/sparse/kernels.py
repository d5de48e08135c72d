"""Convolution on packed cells: exact, and at the cost of the visible positions only.

A packed map (T, C, s, s) in channels_last memory *is* the matrix of its rows (T*s*s, C). Four kernels cover every layer;
:func:`choose_kernel` picks one from the layer's shape:

- ``matmul``: kernel 1, no neighbours: one matrix product on the rows.
- ``im2col``: the k*k neighbour rows side by side, in slices that stay in cache, and one product a slice. Its input gradient
  is a gather as well, before or after the product, so no scatter and no atomic addition occurs anywhere.
- ``halo``: every cell with its border of neighbour positions as a small image, then an ordinary convolution without padding.
  The choice for grouped layers and for very few channels.
- ``map``: the whole image with zeros at hidden positions, of whose result the visible positions are kept. The choice for
  depthwise layers where cells are so small that their tiles together are larger than the whole.

On a GPU with Triton, ``im2col`` runs as one fused kernel instead, without the columns in memory (:mod:`hgkd.sparse.fused`);
``columns`` is ``im2col`` that never does.

Nothing here knows of masks: hidden positions are the index one past the last row, where a row of zeros is appended.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hgkd.sparse.choice import kernels_mode
from hgkd.sparse.hardware import is_capturing, tf32_allowed
from hgkd.sparse.layout import NOTHING, CellLayout, Stencil, cell_number, cells_reached, made_once

Regrouping = Callable[[Tensor, CellLayout], Tensor]

# rows * k * k * C of one im2col slice, elements: 4 MB in fp32, about what a core's share of the cache holds
_SLICE_ELEMENTS = 1 << 20
# of a GPU, where a slice more is a launch more, and what limits is memory: 256 MB in fp32
_SLICE_ELEMENTS_GPU = 1 << 26


@dataclass(frozen=True)
class ConvGeometry:
    """Geometry of a convolution that keeps to the cell grid; pairs are (vertical, horizontal).

    Attributes:
        s_in: positions along a cell's side before the convolution.
        pad: positions padded on (top, left); what is padded below and right follows from the output size.
        border: what lies outside the image: 'constant', or 'reflect' as in ``torch.nn.functional.pad``.
    """

    s_in: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    pad: tuple[int, int]
    dilation: tuple[int, int]
    border: str = "constant"

    @property
    def s_out(self) -> int:
        return self.s_in // self.stride[0]

    @property
    def is_pointwise(self) -> bool:
        return self.kernel == (1, 1) and self.pad == (0, 0)

    @property
    def stays_in_cells(self) -> bool:
        """Whether windows lie side by side, so that none reads beyond its own cell."""
        return self.kernel == self.stride and self.pad == (0, 0) and self.dilation == (1, 1)

    def offsets(self, axis: int) -> tuple[int, ...]:
        """Input offset of each tap along an axis (0 vertical, 1 horizontal)."""
        return tuple(k * self.dilation[axis] - self.pad[axis] for k in range(self.kernel[axis]))

    def transposed_offsets(self, axis: int) -> tuple[int, ...]:
        """Output offset of each tap from an input, stride 1."""
        return tuple(-offset for offset in self.offsets(axis))

    def most_taps(self, axis: int) -> int:
        """With how many outputs along an axis an input can have to do."""
        stride = self.stride[axis]
        found = [k * self.dilation[axis] % stride for k in range(self.kernel[axis])]
        return max(found.count(phase) for phase in found)


def rows_of(packed: Tensor) -> Tensor:
    """(T, C, s, s) -> its rows (T*s*s, C): a view when the memory is channels_last."""
    return packed.permute(0, 2, 3, 1).reshape(-1, packed.shape[1])


def packed_of(rows: Tensor, s: int) -> Tensor:
    """Inverse of :func:`rows_of`; a view."""
    return rows.view(-1, s, s, rows.shape[1]).permute(0, 3, 1, 2)


def with_zero_row(rows: Tensor) -> Tensor:
    """Rows with one row of zeros appended, where the indices of hidden positions point."""
    out = rows.new_empty(rows.shape[0] + 1, rows.shape[1])
    out[:-1] = rows
    out[-1] = 0
    return out


def gathers(weight: Tensor, groups: int) -> bool:
    """Whether neighbours are gathered row by row, rather than as haloed tiles."""
    # few channels make short rows; 64 was measured on a CPU, 16 is a guess for the fused kernel of a GPU
    return groups == 1 and weight.shape[2:].numel() > 1 and weight.shape[1] >= (16 if weight.is_cuda else 64)


def choose_kernel(weight: Tensor, groups: int, geometry: ConvGeometry, layout: CellLayout) -> str:
    """Name of the kernel for a layer, by rule (see ``docs/background/performance.md`` for the measurements behind it)."""
    if geometry.border != "constant":
        return "halo"
    if groups > 1:
        # a cell of one position in tiles of 49 reads far more than the whole map holds; depthwise products cost next to nothing
        tile = _halo_size(geometry, 0) * _halo_size(geometry, 1) / geometry.s_in**2
        return "map" if weight.shape[1] == 1 and tile > 3 * layout.visible.numel() / layout.num_cells else "halo"
    if geometry.is_pointwise:
        return "matmul"
    return "im2col" if gathers(weight, groups) and not _follows_cudnn(weight) else "halo"


def _follows_cudnn(x: Tensor) -> bool:
    """Whether torch would round fp32 convolutions to TF32 and matrix products not, as is its default on CUDA.

    A convolution must then be computed as one, or it would be slower, and more exact, than the ordinary network's.
    """
    return x.is_cuda and x.dtype == torch.float32 and tf32_allowed("conv") and not tf32_allowed("matmul")


def layer_key(weight: Tensor, groups: int, geometry: ConvGeometry) -> str:
    """Names a layer's shape, for what was measured of it."""
    (out_channels, in_channels, kh, kw), (pad_y, pad_x) = weight.shape, geometry.pad
    rest = f", dilation {geometry.dilation}" if geometry.dilation != (1, 1) else ""
    rest += f", {groups} groups" if groups > 1 else ""
    stride = geometry.stride[0]
    return f"{in_channels * groups} -> {out_channels}, {kh}x{kw}/{stride} pad {pad_y},{pad_x}{rest}, {geometry.s_in} a side"


_watchers: list[Callable[[str, Tensor, Tensor, int, ConvGeometry, CellLayout], None]] = []


@contextmanager
def watched(watch: Callable[[str, Tensor, Tensor, int, ConvGeometry, CellLayout], None]) -> Iterator[None]:
    """Context in which every convolution whose kernel is chosen is told: the rule's kernel, and what it is called with."""
    _watchers.append(watch)
    try:
        yield
    finally:
        _watchers.remove(watch)


def _kernel_for(packed: Tensor, weight: Tensor, groups: int, geometry: ConvGeometry, layout: CellLayout) -> str:
    """The kernel that was measured to be the fastest for this layer, where one was, else the rule's."""
    rule = choose_kernel(weight, groups, geometry, layout)
    for watch in _watchers:
        watch(rule, packed, weight, groups, geometry, layout)
    if geometry.border != "constant":
        return rule  # no other kernel reflects, and the key is also that of a layer that pads with zeros
    return layout.chosen.get(layer_key(weight, groups, geometry), rule) if layout.chosen else rule


def convolve(
    packed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    geometry: ConvGeometry,
    layout: CellLayout,
    kernel: str | None = None,
) -> Tensor:
    """Convolution of a packed map.

    Args:
        packed: (T, C, s_in, s_in).
        weight: (O, C/groups, kh, kw) as in ``torch.nn.functional.conv2d``.
        kernel: 'matmul', 'im2col', 'columns', 'halo' or 'map'; when None the layout's choice, else :func:`choose_kernel`'s.

    Returns:
        (T, O, s_out, s_out), channels_last.
    """
    device_type = packed.device.type
    if torch.is_autocast_enabled(device_type):
        # the matrix products below are inside autograd functions, which autocast does not reach
        dtype = torch.get_autocast_dtype(device_type)
        packed, weight = packed.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    kernel = kernel or _kernel_for(packed, weight, groups, geometry, layout)
    if kernel == "matmul":
        if _follows_cudnn(packed):
            return F.conv2d(packed, weight, bias, geometry.stride)
        stride_y, stride_x = geometry.stride
        if (stride_y, stride_x) != (1, 1):
            packed = packed[:, :, ::stride_y, ::stride_x]
        rows = rows_of(packed)
        return packed_of(F.linear(rows, weight.view(weight.shape[0], -1), bias), geometry.s_out)
    if kernel in ("im2col", "columns"):
        rows = _GatherConvolution.apply(rows_of(packed), weight, geometry, layout, kernel == "im2col")
        return packed_of(rows if bias is None else rows + bias, geometry.s_out)
    if kernel == "map":
        whole, excess = _Regroup.apply(packed, layout, _spread, _collect), _excess_padding(geometry, layout)
        if any(excess):
            whole = F.pad(whole, excess)
        out = F.conv2d(whole, weight, bias, geometry.stride, geometry.pad, geometry.dilation, groups)
        height, width = (cells * geometry.s_out for cells in layout.grid)
        return _Regroup.apply(out[:, :, :height, :width], layout, _collect, _spread)
    tiles = halo_tiles(packed, geometry, layout)
    out = F.conv2d(tiles, weight, bias, geometry.stride, 0, geometry.dilation, groups)
    return out.contiguous(memory_format=torch.channels_last)


def _slice_elements(device: torch.device) -> int:
    return _SLICE_ELEMENTS if device.type == "cpu" else _SLICE_ELEMENTS_GPU


def _slices(rows: int, width: int, elements: int) -> list[slice]:
    size = max(64, elements // max(1, width))
    return [slice(a, min(a + size, rows)) for a in range(0, rows, size)]


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _fused(rows: Tensor) -> ModuleType | None:
    """The module of Triton kernels where they serve these rows, else None."""
    if not rows.is_cuda or kernels_mode() == "torch" or not _has_triton():
        return None
    from hgkd.sparse import fused, self_check  # import Triton

    serves = fused.serves(rows.dtype, rows.device) and self_check.passed(rows.device, rows.dtype)
    return fused if serves else None


# specialisations of the fused kernels that have run on a device, and those that failed when they first did
_started: set[tuple[object, ...]] = set()
_failed: set[tuple[object, ...]] = set()


def _attempt(what: str, rows: Tensor, taps: int, width: int, compute: Callable[[ModuleType], Tensor]) -> Tensor | None:
    """The result of a fused kernel; None where none serves, or where this one has failed at its first launch.

    Only the first is watched: that is when a kernel is compiled and its memory asked for. A later error is not the kernel's.
    """
    key = (what, rows.device, rows.dtype, rows.shape[1], taps, width)
    module = None if key in _failed else _fused(rows)
    if module is None or key in _started:
        return None if module is None else compute(module)
    try:
        out = compute(module)
        if rows.is_cuda and not is_capturing(rows.device):
            torch.cuda.synchronize(rows.device)  # once: errors of a launch appear at the next wait
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # memory is the user's matter, and after a fault the device computes nothing more
    except Exception as error:
        _failed.add(key)
        warnings.warn(
            f"the fused kernel {what} of {rows.shape[1]} -> {width} channels, {taps} taps in {rows.dtype} does not run on "
            f"{rows.device} ({error}); torch's kernels serve this layer",
            stacklevel=2,
        )
        return None
    _started.add(key)
    return out


def _gather_multiply(source: Tensor, index: Tensor, matrix: Tensor, fuse: bool) -> Tensor:
    """``concat_k(source[index[:, k]]) @ matrix``: index (N, K) to 0 ... M, source (M, C), matrix (K*C, O) -> (N, O)."""
    if fuse:
        taps, width = index.shape[1], matrix.shape[1]
        found = _attempt("gather_multiply", source, taps, width, lambda m: m.gather_multiply(source, index, matrix))
        if found is not None:
            return found
    source = with_zero_row(source)
    out = source.new_empty(index.shape[0], matrix.shape[1])
    for part, columns in _columns(source, index):
        torch.mm(columns, matrix, out=out[part])
    return out


def _columns(source: Tensor, index: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """``source[index]`` as (rows, K*C) in slices that stay in cache; each takes the place of the one before."""
    taps, channels = index.shape[1], source.shape[1]
    parts = _slices(index.shape[0], taps * channels, _slice_elements(source.device))
    buffer = source.new_empty(parts[0].stop * taps, channels)
    for part in parts:
        found = buffer[: (part.stop - part.start) * taps]
        torch.index_select(source, 0, index[part].flatten(), out=found)
        yield part, found.view(-1, taps * channels)


class _GatherConvolution(torch.autograd.Function):
    """Dense (groups = 1) convolution of rows by gathering neighbours; saves the rows, not the columns."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, geometry: ConvGeometry, layout: CellLayout, fuse: bool) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.save_for_backward(rows, weight)
        ctx.geometry, ctx.layout, ctx.fuse = geometry, layout, fuse
        # a view when the weights are channels_last: the product reads it transposed, nothing is copied
        matrix = weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1).t()
        return _gather_multiply(rows, _forward_index(geometry, layout), matrix, fuse)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:  # type: ignore[no-untyped-def, override]
        rows, weight = ctx.saved_tensors
        grad, how = grad.contiguous(), (ctx.geometry, ctx.layout, ctx.fuse)
        grad_rows = _input_gradient(grad, weight, *how) if ctx.needs_input_grad[0] else None
        grad_weight = _weight_gradient(rows, grad, weight, *how) if ctx.needs_input_grad[1] else None
        return grad_rows, grad_weight, None, None, None


def _forward_index(geometry: ConvGeometry, layout: CellLayout) -> Tensor:
    """(T*s_out*s_out, kh*kw) input rows of each output row."""
    return layout.neighbours(geometry.s_in, geometry.s_out, geometry.stride[0], geometry.offsets(0), geometry.offsets(1))


def _weight_gradient(
    rows: Tensor, grad: Tensor, weight: Tensor, geometry: ConvGeometry, layout: CellLayout, fuse: bool
) -> Tensor:
    out_channels, in_channels, kh, kw = weight.shape
    index, total = _forward_index(geometry, layout), None
    if fuse:
        total = _attempt(
            "weight_gradient", rows, kh * kw, out_channels, lambda m: m.weight_gradient(rows, index, grad).to(weight.dtype)
        )
    if total is None:
        total = grad.new_empty(out_channels, kh * kw * in_channels)
        for part, columns in _columns(with_zero_row(rows), index):
            # beta=0 for the first: what memory holds before is not read, so it need not be filled with zeros
            total.addmm_(grad[part].t(), columns, beta=0 if part.start == 0 else 1)
    return total.view(out_channels, kh, kw, in_channels).permute(0, 3, 1, 2)  # channels_last, as such weights are


def _input_gradient(grad: Tensor, weight: Tensor, geometry: ConvGeometry, layout: CellLayout, fuse: bool) -> Tensor:
    """Gather, then multiply, as forward; but the other way round for strides and for weights larger than the map.

    The product with the weights as they lie has one row an output and tap. Every input then sums the few that it was part of.
    That copies no weight, and leaves a stride nothing to split into phases; a large map would leave the cache between the two.
    """
    out_channels, in_channels, kh, kw = weight.shape
    large = grad.shape[0] * kh * kw * in_channels > _slice_elements(grad.device)
    if geometry.stride[0] == 1 and (large or (fuse and _fused(grad) is not None)):
        s = geometry.s_out
        index = layout.neighbours(s, s, 1, geometry.transposed_offsets(0), geometry.transposed_offsets(1))
        return _gather_multiply(grad, index, weight.permute(2, 3, 0, 1).reshape(-1, in_channels), fuse)
    matrix = weight.permute(0, 2, 3, 1).reshape(out_channels, -1)
    products = grad.new_empty(grad.shape[0] + 1, matrix.shape[1])
    torch.mm(grad, matrix, out=products[:-1])
    products[-1, :in_channels] = 0  # what an index without a product reads
    return F.embedding_bag(_transposed_index(geometry, layout), products.view(-1, in_channels), mode="sum")


def _transposed_index(geometry: ConvGeometry, layout: CellLayout) -> Tensor:
    """(T*s_in*s_in, taps) numbers ``output row * kh*kw + tap`` of the products that each input row is part of."""
    s_out, area = geometry.s_out, geometry.kernel[0] * geometry.kernel[1]
    key, taps = ("transposed", geometry), geometry.most_taps(0) * geometry.most_taps(1)
    return layout.look_up(key, lambda: _transposed_stencil(geometry, layout.device), s_out * s_out * area, taps)


@made_once
def _transposed_stencil(geometry: ConvGeometry, device: torch.device) -> Stencil:
    s_in, s_out, (kh, kw) = geometry.s_in, geometry.s_out, geometry.kernel
    with torch.inference_mode(False):  # it may be kept for a training to come
        (y, tap_y, fits_y), (x, tap_x, fits_x) = (_outputs_of(geometry, axis, device) for axis in (0, 1))
        y, tap_y, fits_y = (v.view(s_in, 1, -1, 1) for v in (y, tap_y, fits_y))
        x, tap_x, fits_x = (v.view(1, s_in, 1, -1) for v in (x, tap_x, fits_x))
        value = ((y % s_out) * s_out + x % s_out) * (kh * kw) + tap_y * kw + tap_x
        first = min(geometry.pad[a] - (geometry.kernel[a] - 1) * geometry.dilation[a] for a in (0, 1))
        stride = geometry.stride[0]
        reach = cells_reached(s_out, first // stride, (s_in - 1 + max(geometry.pad)) // stride)
        value = torch.where(fits_y & fits_x, value, NOTHING).flatten().int()
        return Stencil(reach, cell_number(y // s_out, x // s_out, reach), value)


def _outputs_of(geometry: ConvGeometry, axis: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(s_in, taps) of every input place along an axis: an output that it is part of, by which tap, and whether there is one."""
    place = torch.arange(geometry.s_in, device=device)[:, None]
    tap = torch.arange(geometry.kernel[axis], device=device).expand(geometry.s_in, -1)
    distance = place + geometry.pad[axis] - tap * geometry.dilation[axis]
    misses = distance % geometry.stride[axis] != 0
    order = misses.byte().argsort(stable=True, dim=1)[:, : geometry.most_taps(axis)]
    output, tap, misses = (v.gather(1, order) for v in (distance // geometry.stride[axis], tap, misses))
    return output, tap, ~misses


def _excess_padding(geometry: ConvGeometry, layout: CellLayout) -> list[int]:
    """Positions that a whole map lacks on its (left, right, top, bottom) when ``geometry.pad`` is on every side."""
    out = []
    for axis in (1, 0):
        cells = layout.grid[axis]
        out += [0, max(0, _halo_size(geometry, axis, cells) - 2 * geometry.pad[axis] - cells * geometry.s_in)]
    return out


def _spread(packed: Tensor, layout: CellLayout) -> Tensor:
    """(T, C, s, s) -> (B, C, h*s, w*s), channels_last, 0 at hidden positions."""
    index = layout.row_map(packed.shape[2])
    found = with_zero_row(rows_of(packed)).index_select(0, index.flatten())
    return found.view(*index.shape, -1).permute(0, 3, 1, 2)


def _collect(dense: Tensor, layout: CellLayout) -> Tensor:
    """Inverse of :func:`_spread`."""
    s = dense.shape[2] // layout.grid[0]
    return packed_of(dense.permute(0, 2, 3, 1).reshape(-1, dense.shape[1]).index_select(0, layout.positions(s)), s)


class _Regroup(torch.autograd.Function):
    """``_spread`` or ``_collect``; the gradient of either is the other, so both directions are gathers."""

    @staticmethod
    def forward(ctx, x: Tensor, layout: CellLayout, there: Regrouping, back: Regrouping) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.layout, ctx.back = layout, back
        return there(x, layout)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[no-untyped-def, override]
        return ctx.back(grad, ctx.layout), None, None, None


def halo_tiles(packed: Tensor, geometry: ConvGeometry, layout: CellLayout, outside: float = 0.0) -> Tensor:
    """Every cell with the neighbour positions that its outputs read, as a small image.

    Args:
        packed: (T, C, s_in, s_in).
        outside: value of positions outside the image (hidden positions are always 0).

    Returns:
        (T, C, n, m), channels_last, with n = (s_out-1)*stride + (kh-1)*dilation + 1.
    """
    return _HaloTiles.apply(packed, geometry, layout, outside)


def _halo_size(geometry: ConvGeometry, axis: int, cells: int = 1) -> int:
    """Positions along an axis that the outputs of several cells in a row read."""
    return (cells * geometry.s_out - 1) * geometry.stride[axis] + (geometry.kernel[axis] - 1) * geometry.dilation[axis] + 1


class _HaloTiles(torch.autograd.Function):
    """Gather of tiles with borders. The gradient adds each border strip to its owner: slices only, a fixed order."""

    @staticmethod
    def forward(ctx, packed: Tensor, geometry: ConvGeometry, layout: CellLayout, outside: float) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.geometry, ctx.layout = geometry, layout
        height, width = _halo_size(geometry, 0), _halo_size(geometry, 1)
        offsets_y = tuple(range(-geometry.pad[0], height - geometry.pad[0]))
        offsets_x = tuple(range(-geometry.pad[1], width - geometry.pad[1]))
        rows = with_zero_row(rows_of(packed))
        if outside != 0.0:
            rows = torch.cat([rows, rows.new_full((1, rows.shape[1]), outside)])
        second_row = int(outside != 0.0)
        index = layout.neighbours(geometry.s_in, 1, 1, offsets_y, offsets_x, second_row, geometry.border)
        if geometry.border != "constant":
            ctx.save_for_backward(index)
        tiles = rows.index_select(0, index.flatten())
        return tiles.view(layout.num_cells, height, width, -1).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[no-untyped-def, override]
        geometry, layout = ctx.geometry, ctx.layout
        s = geometry.s_in
        tiles = grad.permute(0, 2, 3, 1)
        if geometry.border != "constant":  # a place may occur several times in one tile
            (index,) = ctx.saved_tensors
            rows = grad.new_zeros(layout.num_cells * s * s + 1, grad.shape[1])
            _add_rows(rows, index.flatten(), tiles.reshape(-1, grad.shape[1]))
            return packed_of(rows[:-1], s), None, None, None
        spans_y = _spans(s, geometry.pad[0], tiles.shape[1])
        spans_x = _spans(s, geometry.pad[1], tiles.shape[2])
        reach = max(map(abs, (*spans_y, *spans_x)))
        cells = layout.cells_around(reach).clamp(max=layout.num_cells).view(-1, 2 * reach + 1, 2 * reach + 1)
        (in_y, at_y), (in_x, at_x) = spans_y[0], spans_x[0]
        own = tiles[:, at_y, at_x]
        if own.shape[1:3] == (s, s):
            out = own.clone(memory_format=torch.contiguous_format)
        else:  # some positions are read by no output
            out = grad.new_zeros(layout.num_cells, s, s, grad.shape[1])
            out[:, in_y, in_x] = own
        for dy, (in_y, at_y) in spans_y.items():
            for dx, (in_x, at_x) in spans_x.items():
                if dy or dx:
                    strip = tiles[:, at_y, at_x]
                    strip = torch.cat([strip, strip.new_zeros(1, *strip.shape[1:])])
                    out[:, in_y, in_x] += strip.index_select(0, cells[:, dy + reach, dx + reach])
        return out.permute(0, 3, 1, 2), None, None, None


def _add_rows(rows: Tensor, index: Tensor, values: Tensor) -> None:
    """Add values to the rows of an index with repeats, in a fixed order on every device."""
    index = index.long()  # torch widens it for itself in one of these, and in the other its CPU kernel is slow without
    if values.is_cuda:  # there ``index_add_`` is atomic, while this sorts
        rows.index_put_((index,), values, accumulate=True)
    else:
        rows.index_add_(0, index, values)


def _spans(s: int, pad: int, size: int) -> dict[int, tuple[slice, slice]]:
    """For each neighbour cell at distance d along one axis: which of our positions its halo tile covers, and where in the tile.

    The tile of the cell at distance d covers our positions ``d*s - pad ... d*s - pad + size - 1``.
    """
    spans = {}
    for d in range(-((size - pad - 1) // s), (pad + s - 1) // s + 1):
        first, last = max(0, d * s - pad), min(s, d * s - pad + size)
        if first < last:
            spans[d] = (slice(first, last), slice(first - d * s + pad, last - d * s + pad))
    return spans
