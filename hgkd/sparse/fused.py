"""Triton kernels for convolutions larger than 1x1 on a GPU: gather and product in one pass (implicit GEMM).

The pure torch kernel ``im2col`` writes the k*k neighbour rows side by side to memory and reads them again; here each program
loads the rows that it needs straight into its tile of the product. A hidden position is an index past the last row and loads
zeros, so no zero row is appended either. The input gradient is the forward kernel with the transposed index; the weight
gradient sums over slices of the points and adds the partial sums in a fixed order, so no atomic addition occurs.

The idea is that of implicit GEMM for sparse convolution (traveller59/spconv 2.x; TorchSparse++, arXiv 2311.12862), written
from scratch for a dense index. The products run on tensor cores, so fp32 takes part only where torch's convolutions may use
TF32; exact fp32, and GPUs before compute capability 8.0, stay with torch's kernels. The tile sizes are a guess, not measured
on a GPU. Tested are the arithmetic, in Triton's interpreter, and that the kernels compile for sm_90; on a GPU
:mod:`hgkd.sparse.self_check` compares their numbers before they are first used.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hgkd.sparse.hardware import has_tensor_cores, tf32_allowed


def serves(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels compute in a type on a GPU as torch's convolution would be allowed to, and by tensor cores."""
    fits = dtype in (torch.float16, torch.bfloat16) or (dtype == torch.float32 and tf32_allowed("conv"))
    return fits and has_tensor_cores(device)


def launch(device: torch.device, kernel: Any, grid: tuple[int, ...], *arguments: object, **constants: object) -> None:
    """Start a kernel on the device of its tensors; Triton by itself takes the current one (triton issue 2441)."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **constants)


# sizes that differ from step to step: without it, one that 16 divides would be compiled for anew in mid-training
@triton.jit(do_not_specialize=["rows", "points"])
def _gather_multiply(  # type: ignore[no-untyped-def]
    source,
    index,
    matrix,
    out,
    rows,
    points,
    taps,
    channels,
    width,
    BLOCK_POINTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A (BLOCK_POINTS, BLOCK_WIDTH) tile of ``concat_k(source[index[:, k]]) @ matrix``."""
    n = (tl.program_id(0) * BLOCK_POINTS + tl.arange(0, BLOCK_POINTS)).to(tl.int64)
    o = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    total = tl.zeros((BLOCK_POINTS, BLOCK_WIDTH), dtype=tl.float32)
    for k in range(taps):
        row = tl.load(index + n * taps + k, mask=n < points, other=rows).to(tl.int64)  # int32: a row's place may be more
        for first in range(0, channels, BLOCK_CHANNELS):
            c = first + tl.arange(0, BLOCK_CHANNELS)
            seen = (row < rows)[:, None] & (c < channels)[None, :]
            values = tl.load(source + row[:, None] * channels + c[None, :], mask=seen, other=0.0)
            inside = (c < channels)[:, None] & (o < width)[None, :]
            weights = tl.load(matrix + (k * channels + c)[:, None] * width + o[None, :], mask=inside, other=0.0)
            total = tl.dot(values, weights, total, input_precision=PRECISION)
    inside = (n < points)[:, None] & (o < width)[None, :]
    tl.store(out + n[:, None] * width + o[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "points", "slices"])
def _weight_gradient(  # type: ignore[no-untyped-def]
    source,
    index,
    grad,
    partial,
    rows,
    points,
    taps,
    channels,
    width,
    slices,
    BLOCK_POINTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One slice's share of ``grad.T @ source[index[:, k]]`` for one tap and a tile of (width, channels)."""
    blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    k = tl.program_id(0) // blocks
    c = (tl.program_id(0) % blocks) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    o = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    slice_ = tl.program_id(2)
    total = tl.zeros((BLOCK_WIDTH, BLOCK_CHANNELS), dtype=tl.float32)
    for first in range(slice_ * BLOCK_POINTS, points, slices * BLOCK_POINTS):
        n = (first + tl.arange(0, BLOCK_POINTS)).to(tl.int64)
        row = tl.load(index + n * taps + k, mask=n < points, other=rows).to(tl.int64)  # int32: a row's place may be more
        seen = (row < rows)[:, None] & (c < channels)[None, :]
        values = tl.load(source + row[:, None] * channels + c[None, :], mask=seen, other=0.0)
        inside = (n < points)[:, None] & (o < width)[None, :]
        slopes = tl.load(grad + n[:, None] * width + o[None, :], mask=inside, other=0.0)
        total = tl.dot(tl.trans(slopes), values, total, input_precision=PRECISION)
    inside = (o < width)[:, None] & (c < channels)[None, :]
    line = (slice_ * width + o).to(tl.int64) * taps + k
    tl.store(partial + line[:, None] * channels + c[None, :], total, mask=inside)


def gather_multiply(source: Tensor, index: Tensor, matrix: Tensor) -> Tensor:
    """``concat_k(source[index[:, k]]) @ matrix``, with zeros for an index of M.

    Args:
        source: (M, C), fp16, bf16 or fp32 (computed as TF32 on a GPU).
        index: int32 or int64 (N, K), 0 ... M.
        matrix: (K*C, O).

    Returns:
        (N, O), the products summed in fp32.
    """
    source, index, matrix = source.contiguous(), index.contiguous(), matrix.contiguous()
    (points, taps), (rows, channels), width = index.shape, source.shape, matrix.shape[1]
    out = source.new_empty(points, width)
    blocks = {"BLOCK_POINTS": 128, "BLOCK_CHANNELS": _block(channels, 32), "BLOCK_WIDTH": _block(width, 128)}
    grid = (triton.cdiv(points, 128), triton.cdiv(width, blocks["BLOCK_WIDTH"]))
    sizes = (rows, points, taps, channels, width)
    launch(source.device, _gather_multiply, grid, source, index, matrix, out, *sizes, **blocks, PRECISION=_precision(source))
    return out


def weight_gradient(source: Tensor, index: Tensor, grad: Tensor) -> Tensor:
    """Gradient of :func:`gather_multiply` in its matrix, transposed: fp32 (O, K*C), from the gradient (N, O) of its result."""
    source, index, grad = source.contiguous(), index.contiguous(), grad.contiguous()
    (points, taps), (rows, channels), width = index.shape, source.shape, grad.shape[1]
    blocks = {"BLOCK_POINTS": 32, "BLOCK_CHANNELS": _block(channels, 64), "BLOCK_WIDTH": _block(width, 128)}
    tiles = (taps * triton.cdiv(channels, blocks["BLOCK_CHANNELS"]), triton.cdiv(width, blocks["BLOCK_WIDTH"]))
    # enough programs for a large GPU, each with at least a few blocks of points
    slices = max(1, min(triton.cdiv(points, 4 * 32), 512 // (tiles[0] * tiles[1])))
    partial = source.new_empty(slices, width, taps * channels, dtype=torch.float32)
    sizes = (rows, points, taps, channels, width, slices)
    grid = (*tiles, slices)
    launch(source.device, _weight_gradient, grid, source, index, grad, partial, *sizes, **blocks, PRECISION=_precision(source))
    return partial.sum(0)


def _block(size: int, largest: int) -> int:
    """A power of two, at least 16 as ``tl.dot`` wants."""
    return max(16, min(largest, triton.next_power_of_2(size)))


def _precision(operand: Tensor) -> str:
    """How ``tl.dot`` rounds fp32 factors; AMD's GPUs without TF32 refuse its name, even for half types."""
    return "tf32" if operand.dtype == torch.float32 and torch.version.hip is None else "ieee"
