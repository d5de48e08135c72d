"""Backend ``masked``: dense compute, hidden positions multiplied by zero before anything that reads neighbours.

This is what SparK (arXiv 2301.03580) and its descendants do; here it is the reference that the other backends are tested
against, the baseline of the benchmarks, and what :mod:`hgkd.sparse.choice` falls back to where it is the fastest. With nothing
hidden it multiplies nothing and is the dense network itself, so the other backends hand over to it then.

Nothing here waits for the device: positions are never picked by a mask, statistics are sums of products with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hgkd.errors import NoSparseRuleError
from hgkd.sparse.convolution import avg_pool_arguments, conv_arguments, max_pool_arguments, window_geometry
from hgkd.sparse.kernels import ConvGeometry
from hgkd.sparse.layout import CellLayout
from hgkd.sparse.packed import _side_of
from hgkd.sparse.taps import renormalised, tap_factor
from hgkd.sparse.tensor import Arguments, Function, Options, Rule, SparseTensor, function_rule, plain_torch, wide

_BATCH_NORM_NAMES = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_POSITIONS = (0, 2, 3)


class MaskedTensor(SparseTensor):
    """All positions, dense (B, C, H, W) or (B, H, W, C); values at hidden positions mean nothing."""

    rules: ClassVar[dict[Any, Rule]] = {}

    @classmethod
    def pack(cls, dense: Tensor, cells: CellLayout) -> MaskedTensor:
        if cells.all_visible:
            return cls.wrap(dense.view_as(dense), cells)
        return cls.wrap(dense * cells.mask_as(cells.cell // _side_of(dense, cells), dense.dtype), cells)

    def to_dense(self, fill: float | Tensor = 0.0) -> Tensor:  # type: ignore[override]
        self.check_complete()
        if self.cells.all_visible:
            return self.plain
        if isinstance(fill, Tensor):
            fill = fill.to(self.dtype).view(1, -1, 1, 1)
            return torch.where(self.visible_mask, self.plain, fill)
        return self.plain.masked_fill(~self.visible_mask, fill)

    @property
    def stride(self) -> int:  # type: ignore[override]
        with plain_torch():
            return int(self.cells.image_size[0] // self.shape[self.spatial_dims[0]])

    @property
    def visible_mask(self) -> Tensor:
        """Visible positions, bool (B, 1, H, W) or (B, H, W, 1)."""
        mask = self.cells.mask(self.stride)
        return mask if self.channel_dim == 1 else mask.permute(0, 2, 3, 1)

    @property
    def zeroed(self) -> Tensor:
        """The values as an ordinary tensor with 0 at hidden positions, and padded if it was to be."""
        values = self.plain
        if not self.cells.all_visible:
            mask = self.cells.mask_as(self.stride, values.dtype)
            values = values * (mask if self.channel_dim == 1 else mask.permute(0, 2, 3, 1))
        if self.pending is not None:
            fill = self.pending.value if self.pending.mode == "constant" else None
            values = F.pad(values, self.pending.sides, self.pending.mode, fill)
        return values

    def per_image(self, value: Tensor) -> Tensor:
        """(B, ...) operands broadcast without reshaping."""
        self.check_per_image(value)
        return value

    def image_sum(self, values: Tensor) -> Tensor:
        """Sum of (B, C, H, W) values over visible positions: (B, C), fp32 or wider."""
        hidden = ~self.visible_mask
        return values.masked_fill(hidden, 0.0).sum(self.spatial_dims, dtype=wide(values.dtype))

    def image_max(self) -> Tensor:
        """Maximum over visible positions: (B, C)."""
        return self.plain.masked_fill(~self.visible_mask, float("-inf")).amax(self.spatial_dims)


@function_rule("batch_norm", on=(MaskedTensor,))
def _batch_norm(func: Function, owner: MaskedTensor, args: Arguments, kwargs: Options) -> SparseTensor:
    if owner.channel_dim != 1:
        raise NoSparseRuleError(
            "channels-last-order", "batch_norm on a sparse feature map in channels-last order; permute first"
        )
    given: dict[str, Any] = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}
    given |= dict(zip(_BATCH_NORM_NAMES, args, strict=False)) | kwargs
    x = given.pop("input")
    if x.cells.all_visible or not given["training"]:  # with given statistics each position is normed by itself
        with plain_torch():
            return x.like(F.batch_norm(x, **given))
    return x.like(_normed(x, **given))


def _normed(
    x: MaskedTensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Batch normalisation by the statistics of the visible positions, which update the running ones."""
    count = x.cells.num_cells * x.cells.side(x.stride) ** 2
    F._verify_batch_size([count, x.shape[1]])  # type: ignore[attr-defined]  # torch's own error for one value a channel
    mask = x.cells.mask_as(x.stride, x.dtype)
    out, mean, variance = _MaskedBatchNorm.apply(x.plain, mask, weight, bias, count, eps)
    with torch.no_grad():
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        if running_var is not None:
            running_var.lerp_((variance * (count / (count - 1))).to(running_var.dtype), momentum)
    return out


class _MaskedBatchNorm(torch.autograd.Function):
    """Batch normalisation over the positions where a mask is 1; like torch's it saves its input, and adds in fp32 or wider.

    The variance is that of the differences from the mean: in one pass, as sum(x*x*m)/n - mean**2, it would lose the digits that
    both have in common. Outputs at hidden positions mean nothing, and their gradients are not read.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def, override]
        ctx, x: Tensor, mask: Tensor, weight: Tensor | None, bias: Tensor | None, count: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        seen, dtype = x * mask, wide(x.dtype)
        mean = seen.sum(_POSITIONS, dtype=dtype) / count
        centred = torch.addcmul(seen.to(dtype), mean.view(1, -1, 1, 1), mask.to(dtype), value=-1)
        variance = torch.linalg.vector_norm(centred, dim=_POSITIONS).square() / count
        # torch's own kernels, told these statistics: one pass each; they take scale and shift in the statistics' type
        scale, shift = (None if given is None else given.to(dtype) for given in (weight, bias))
        out = torch.native_batch_norm(x, scale, shift, mean, variance, False, 0.0, eps)[0]
        ctx.save_for_backward(x, mask, scale, mean, variance)
        ctx.count, ctx.eps = count, eps
        ctx.dtypes = [None if given is None else given.dtype for given in (weight, bias)]
        ctx.mark_non_differentiable(mean, variance)
        return out, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def, override]
        x, mask, scale, mean, variance = ctx.saved_tensors
        factor = torch.ones_like(mean) if scale is None else scale
        passed, slope, total = torch.ops.aten.native_batch_norm_backward(
            grad * mask, x, factor, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        deviation = torch.rsqrt(variance + ctx.eps)
        scale = deviation * factor
        # what the statistics take back: (total + (x - mean) * deviation * slope) * scale / count
        along = scale * deviation * slope / ctx.count
        back = torch.native_batch_norm(x, along, scale * total / ctx.count, mean, torch.ones_like(mean), False, 0.0, 0.0)[0]
        grad_weight, grad_bias = (
            None if dtype is None else value.to(dtype) for dtype, value in zip(ctx.dtypes, (slope, total), strict=True)
        )
        return passed.addcmul_(back, mask, value=-1), None, grad_weight, grad_bias, None, None


@function_rule("conv2d", on=(MaskedTensor,))
def _conv2d(func: Function, owner: MaskedTensor, args: Arguments, kwargs: Options) -> SparseTensor:
    given = conv_arguments(args, kwargs)
    x = given.pop("input")
    geometry = _check(x, "conv2d", given["weight"].shape[2:], given)
    factor, bias = tap_factor(x.cells, geometry, x.dtype), given.pop("bias")
    # where each output reads its own position alone, hidden ones stay among themselves
    values = x.plain if geometry.is_pointwise and x.pending is None else x.zeroed
    return x.like(renormalised(factor, bias, lambda bias: F.conv2d(values, bias=bias, **given)))


@function_rule("max_pool2d", on=(MaskedTensor,))
def _max_pool2d(func: Function, owner: MaskedTensor, args: Arguments, kwargs: Options) -> SparseTensor:
    given = max_pool_arguments(args, kwargs)
    x = given.pop("input")
    _check(x, "max_pool2d", given["kernel_size"], given)
    given.pop("return_indices", None)
    return x.like(F.max_pool2d(x.zeroed, **given))


@function_rule("avg_pool2d", on=(MaskedTensor,))
def _avg_pool2d(func: Function, owner: MaskedTensor, args: Arguments, kwargs: Options) -> SparseTensor:
    given = avg_pool_arguments(args, kwargs)
    x = given.pop("input")
    factor = tap_factor(x.cells, _check(x, "avg_pool2d", given["kernel_size"], given), x.dtype)
    given.pop("dilation")
    return x.like(renormalised(factor, None, lambda _: F.avg_pool2d(x.zeroed, **given)))


def _check(x: MaskedTensor, what: str, kernel: int | Sequence[int], given: dict[str, Any]) -> ConvGeometry:
    """The geometry, with the same refusals as the packed backend."""
    if x.channel_dim != 1:
        raise NoSparseRuleError("channels-last-order", f"{what} on a sparse feature map in channels-last order; permute first")
    s = x.cells.side(x.stride)
    size = (x.cells.grid[0] * s, x.cells.grid[1] * s)
    return window_geometry(what, s, size, kernel, given, x.pending)
