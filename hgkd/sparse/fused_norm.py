"""Triton kernels for batch normalisation with ReLU, and an addition before it, in training: forward and backward.

torch's kernels read and write a map some ten times between two convolutions (statistics, normalisation, addition, ReLU, and
back); here statistics are one pass, the rest a second one, in both directions. What they compute is torch's: the mean and the
biased variance of every channel over all rows, in fp32 whatever the rows are kept in. The variance is put together from the
means and squared deviations of blocks (Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
Sample Variances", 1979), so a mean that is large against the deviation costs no digits. Sums of slices are added in a fixed
order; there is no atomic addition.

Tested in Triton's interpreter against torch; tile sizes are guesses, not measured on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hgkd.sparse.fused import launch

_BLOCK_ROWS = 64
_SLICES = 256  # programs over the rows: enough for a large GPU, few enough that adding them up costs nothing


@triton.jit(do_not_specialize=["rows", "slice_rows"])
def _statistics(  # type: ignore[no-untyped-def]
    source, means, squares, rows, slice_rows, channels, BLOCK_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr
):
    """Mean, and sum of squared deviations from it, of a slice of the rows, for a block of channels."""
    c = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    first = tl.program_id(1) * slice_rows
    last = tl.minimum(first + slice_rows, rows)
    mean = tl.zeros((BLOCK_CHANNELS,), dtype=tl.float32)
    square = tl.zeros((BLOCK_CHANNELS,), dtype=tl.float32)
    for start in range(first, last, BLOCK_ROWS):
        r = start + tl.arange(0, BLOCK_ROWS)
        inside = (r < last)[:, None] & (c < channels)[None, :]
        values = tl.load(source + r.to(tl.int64)[:, None] * channels + c[None, :], mask=inside, other=0.0).to(tl.float32)
        seen = (start - first).to(tl.float32)
        count = tl.minimum(last - start, BLOCK_ROWS).to(tl.float32)
        block_mean = tl.sum(values, 0) / count
        deviation = tl.where(inside, values - block_mean[None, :], 0.0)
        apart = block_mean - mean
        mean += apart * (count / (seen + count))
        square += tl.sum(deviation * deviation, 0) + apart * apart * (seen * count / (seen + count))
    place = tl.program_id(1) * channels + c
    tl.store(means + place, mean, mask=c < channels)
    tl.store(squares + place, square, mask=c < channels)


@triton.jit(do_not_specialize=["rows"])
def _normalise(  # type: ignore[no-untyped-def]
    source,
    residual,
    out,
    mean,
    scale,
    bias,
    rows,
    channels,
    ADD: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """``relu((source - mean) * scale + bias + residual)`` for a tile."""
    r = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    c = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = (r < rows)[:, None] & (c < channels)[None, :]
    place = r.to(tl.int64)[:, None] * channels + c[None, :]
    values = tl.load(source + place, mask=inside, other=0.0).to(tl.float32)
    centre = tl.load(mean + c, mask=c < channels, other=0.0)
    factor = tl.load(scale + c, mask=c < channels, other=0.0)
    shift = tl.load(bias + c, mask=c < channels, other=0.0)
    values = (values - centre[None, :]) * factor[None, :] + shift[None, :]
    if ADD:
        values += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        values = tl.where(values < 0.0, 0.0, values)  # NaN stays NaN
    tl.store(out + place, values.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "slice_rows"])
def _slopes(  # type: ignore[no-untyped-def]
    source,
    out,
    grad,
    mean,
    sums,
    products,
    rows,
    slice_rows,
    channels,
    RELU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Sums of the gradient, and of its product with ``source - mean``, of a slice of the rows, for a block of channels."""
    c = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    first = tl.program_id(1) * slice_rows
    last = tl.minimum(first + slice_rows, rows)
    centre = tl.load(mean + c, mask=c < channels, other=0.0)
    total = tl.zeros((BLOCK_CHANNELS,), dtype=tl.float32)
    product = tl.zeros((BLOCK_CHANNELS,), dtype=tl.float32)
    for start in range(first, last, BLOCK_ROWS):
        r = start + tl.arange(0, BLOCK_ROWS)
        inside = (r < last)[:, None] & (c < channels)[None, :]
        place = r.to(tl.int64)[:, None] * channels + c[None, :]
        slope = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            slope = tl.where(tl.load(out + place, mask=inside, other=0.0) <= 0.0, 0.0, slope)
        values = tl.load(source + place, mask=inside, other=0.0).to(tl.float32) - centre[None, :]
        total += tl.sum(slope, 0)
        product += tl.sum(slope * values, 0)  # beyond the rows the gradient is 0
    place = tl.program_id(1) * channels + c
    tl.store(sums + place, total, mask=c < channels)
    tl.store(products + place, product, mask=c < channels)


@triton.jit(do_not_specialize=["rows"])
def _input_gradient(  # type: ignore[no-untyped-def]
    source,
    out,
    grad,
    to_source,
    to_residual,
    mean,
    scale,
    constant,
    slant,
    rows,
    channels,
    ADD: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """``(g - constant - (source - mean) * slant) * scale``, and g itself for the residual; g: the gradient behind the ReLU."""
    r = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    c = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = (r < rows)[:, None] & (c < channels)[None, :]
    place = r.to(tl.int64)[:, None] * channels + c[None, :]
    slope = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        slope = tl.where(tl.load(out + place, mask=inside, other=0.0) <= 0.0, 0.0, slope)
    if ADD:
        tl.store(to_residual + place, slope.to(to_residual.dtype.element_ty), mask=inside)
    centre = tl.load(mean + c, mask=c < channels, other=0.0)
    factor = tl.load(scale + c, mask=c < channels, other=0.0)
    level = tl.load(constant + c, mask=c < channels, other=0.0)
    tilt = tl.load(slant + c, mask=c < channels, other=0.0)
    values = tl.load(source + place, mask=inside, other=0.0).to(tl.float32) - centre[None, :]
    slope = (slope - level[None, :] - values * tilt[None, :]) * factor[None, :]
    tl.store(to_source + place, slope.to(to_source.dtype.element_ty), mask=inside)


def _channel_block(channels: int) -> int:
    return max(16, min(64, triton.next_power_of_2(channels)))


def _over_slices(source: Tensor) -> tuple[int, int, tuple[int, int], dict[str, int]]:
    """Rows a slice, number of slices, grid and tile of the kernels that go over slices of the rows."""
    rows, channels = source.shape
    slice_rows = _BLOCK_ROWS * max(1, triton.cdiv(rows, _BLOCK_ROWS * _SLICES))
    slices, block = triton.cdiv(rows, slice_rows), _channel_block(channels)
    tile = {"BLOCK_ROWS": _BLOCK_ROWS, "BLOCK_CHANNELS": block}
    return slice_rows, slices, (triton.cdiv(channels, block), slices), tile


def _over_tiles(source: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    rows, channels = source.shape
    block = _channel_block(channels)
    tile = {"BLOCK_ROWS": _BLOCK_ROWS, "BLOCK_CHANNELS": block}
    return (triton.cdiv(rows, _BLOCK_ROWS), triton.cdiv(channels, block)), tile


def statistics(source: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of rows (N, C): fp32 (C,) each."""
    (rows, channels), (slice_rows, slices, grid, tile) = source.shape, _over_slices(source)
    means, squares = source.new_empty(2, slices, channels, dtype=torch.float32).unbind()
    launch(source.device, _statistics, grid, source, means, squares, rows, slice_rows, channels, **tile)
    first = torch.arange(slices, device=source.device)[:, None] * slice_rows
    counts = (rows - first).clamp_(max=slice_rows).float()
    mean = (means * counts).sum(0) / rows
    return mean, (squares + counts * (means - mean).square()).sum(0) / rows


class NormAct(torch.autograd.Function):
    """``act(batch_norm(rows) + residual)`` of rows (N, C) in training, and the statistics it was done with.

    Arguments: rows, weight (C,), bias (C,), residual (N, C) or None, whether ``act`` is ReLU or nothing, eps. Gives
    (N, C) in the rows' type, and mean and biased variance, fp32 (C,), which have no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, relu: bool, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows = rows.contiguous()
        mean, variance = statistics(rows)
        rstd = (variance + eps).rsqrt()
        out = torch.empty_like(rows)
        grid, tile = _over_tiles(rows)
        added = rows if residual is None else residual.contiguous()
        options = {"ADD": residual is not None, "RELU": relu, **tile}
        launch(
            rows.device, _normalise, grid, rows, added, out, mean, rstd * weight.float(), bias.float(), *rows.shape, **options
        )
        ctx.save_for_backward(rows, out, weight, mean, rstd)
        ctx.relu, ctx.residual = relu, None if residual is None else residual.dtype
        ctx.mark_non_differentiable(mean, variance)
        return out, mean, variance

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[no-untyped-call, untyped-decorator]
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        rows, out, weight, mean, rstd = ctx.saved_tensors
        grad, (count, channels) = grad.contiguous(), rows.shape
        slice_rows, slices, grid, tile = _over_slices(rows)
        sums, products = rows.new_empty(2, slices, channels, dtype=torch.float32).unbind()
        sizes = (count, slice_rows, channels)
        launch(rows.device, _slopes, grid, rows, out, grad, mean, sums, products, *sizes, RELU=ctx.relu, **tile)
        total, product = sums.sum(0), products.sum(0)
        grid, tile = _over_tiles(rows)
        to_rows = torch.empty_like(rows)
        to_residual = to_rows if ctx.residual is None else torch.empty_like(rows, dtype=ctx.residual)
        values = (mean, rstd * weight.float(), total / count, product * rstd.square() / count)
        options = {"ADD": ctx.residual is not None, "RELU": ctx.relu, **tile}
        launch(rows.device, _input_gradient, grid, rows, out, grad, to_rows, to_residual, *values, count, channels, **options)
        residual = None if ctx.residual is None else to_residual
        return to_rows, (product * rstd).to(weight.dtype), total.to(weight.dtype), residual, None, None
