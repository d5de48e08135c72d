"""Backend ``masked``: dense compute, hidden positions multiplied by zero before anything that reads neighbours.

This is what SparK (arXiv 2301.03580) and its descendants do; here it is the reference that the other backends are tested
against and the baseline of the benchmarks. With nothing hidden it multiplies nothing and is the dense network itself, so the
other backends hand over to it then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hgkd.errors import InvalidValueError, NoSparseRuleError
from hgkd.sparse.convolution import avg_pool_arguments, conv_arguments, max_pool_arguments, window_geometry
from hgkd.sparse.kernels import ConvGeometry
from hgkd.sparse.layout import CellLayout
from hgkd.sparse.packed import _side_of
from hgkd.sparse.taps import renormalised, tap_factor
from hgkd.sparse.tensor import Arguments, Function, Options, Rule, SparseTensor, function_rule, plain_torch


class MaskedTensor(SparseTensor):
    """All positions, dense (B, C, H, W) or (B, H, W, C); values at hidden positions mean nothing."""

    rules: ClassVar[dict[Any, Rule]] = {}

    @classmethod
    def pack(cls, dense: Tensor, cells: CellLayout) -> MaskedTensor:
        if cells.all_visible:
            return cls.wrap(dense.view_as(dense), cells)
        mask = cells.mask(cells.cell // _side_of(dense, cells))
        return cls.wrap(dense * mask.to(dense.dtype), cells)

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
            values = values * self.visible_mask.to(values.dtype)
        if self.pending is not None:
            fill = self.pending.value if self.pending.mode == "constant" else None
            values = F.pad(values, self.pending.sides, self.pending.mode, fill)
        return values

    def per_image(self, value: Tensor) -> Tensor:
        """(B, ...) operands broadcast without reshaping."""
        if value.shape[0] != self.cells.batch:
            raise InvalidValueError(
                "operand-shape", f"an operand of shape {tuple(value.shape)} does not fit a batch of {self.cells.batch} images"
            )
        return value

    def image_sum(self, values: Tensor) -> Tensor:
        """Sum of (B, C, H, W) values over visible positions: (B, C)."""
        hidden = ~self.visible_mask
        return values.masked_fill(hidden, 0.0).sum(self.spatial_dims)

    def image_max(self) -> Tensor:
        """Maximum over visible positions: (B, C)."""
        return self.plain.masked_fill(~self.visible_mask, float("-inf")).amax(self.spatial_dims)


@function_rule("batch_norm", on=(MaskedTensor,))
def _batch_norm(func: Function, owner: MaskedTensor, args: Arguments, kwargs: Options) -> SparseTensor:
    if owner.channel_dim != 1:
        raise NoSparseRuleError(
            "channels-last-order", "batch_norm on a sparse feature map in channels-last order; permute first"
        )
    x = args[0] if args else kwargs.pop("input")
    if x.cells.all_visible:
        with plain_torch():
            return x.like(func(x, *args[1:], **kwargs))
    visible = x.visible_mask[:, 0]
    rows = x.plain.permute(0, 2, 3, 1)
    with plain_torch():
        normed = func(rows[visible], *args[1:], **kwargs)
    out = torch.zeros_like(rows, dtype=normed.dtype)
    out[visible] = normed
    return x.like(out.permute(0, 3, 1, 2))


@function_rule("conv2d", on=(MaskedTensor,))
def _conv2d(func: Function, owner: MaskedTensor, args: Arguments, kwargs: Options) -> SparseTensor:
    given = conv_arguments(args, kwargs)
    x = given.pop("input")
    factor = tap_factor(x.cells, _check(x, "conv2d", given["weight"].shape[2:], given), x.dtype)
    bias = given.pop("bias")
    return x.like(renormalised(factor, bias, lambda bias: F.conv2d(x.zeroed, bias=bias, **given)))


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
