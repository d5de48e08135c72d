"""Backend ``gather``: the visible cells as a batch of small tiles, (T, C, s, s) in channels_last memory.

Pointwise convolutions, norms over the batch, activations and residuals are then ordinary dense operations on a fraction of
the data; what reads neighbours goes through :mod:`hgkd.sparse.kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hgkd.errors import InvalidValueError, NoSparseRuleError
from hgkd.sparse import kernels
from hgkd.sparse.convolution import avg_pool_arguments, conv_arguments, max_pool_arguments, window_geometry
from hgkd.sparse.layout import CellLayout, RepeatImages, SumImages
from hgkd.sparse.taps import packed_tap_factor, renormalised
from hgkd.sparse.tensor import Arguments, Function, Options, Padding, Rule, SparseTensor, function_rule, plain_torch, wide


class PackedTensor(SparseTensor):
    """Visible cells only: (T, C, s, s), or (T, s, s, C) while in channels-last order."""

    rules: ClassVar[dict[Any, Rule]] = {}

    @classmethod
    def pack(cls, dense: Tensor, cells: CellLayout) -> PackedTensor:
        s = _side_of(dense, cells)
        return cls.wrap(cells.gather_cells(dense, s), cells)

    def to_dense(self, fill: float | Tensor = 0.0) -> Tensor:  # type: ignore[override]
        self.check_complete()
        return self.cells.scatter_cells(self.plain, fill)

    @property
    def side(self) -> int:
        """Positions along a cell's side."""
        with plain_torch():
            return int(self.shape[2])

    @property
    def stride(self) -> int:  # type: ignore[override]
        return self.cells.cell // self.side

    def per_image(self, value: Tensor) -> Tensor:
        """Repeat (B, ...) for each visible cell of its image: (T, ...)."""
        self.check_per_image(value)
        return RepeatImages.apply(value, self.cells)

    def image_sum(self, values: Tensor) -> Tensor:
        """Sum of (T, C, s, s) values over each image's visible positions: (B, C), fp32 or wider."""
        return SumImages.apply(values.sum(self.spatial_dims, dtype=wide(values.dtype)), self.cells)

    def image_max(self) -> Tensor:
        """Maximum over each image's visible positions: (B, C)."""
        per_cell = self.plain.amax(self.spatial_dims)
        batch, places = self.cells.batch, self.cells.visible[0].numel()
        least = per_cell.new_full((batch * places, per_cell.shape[1]), float("-inf"))
        return least.index_copy(0, self.cells._positions, per_cell).view(batch, places, -1).amax(1)


def _side_of(dense: Tensor, cells: CellLayout) -> int:
    """Positions a cell side of a dense map (B, C, H, W); ValueError when it does not fit the layout."""
    if dense.dim() != 4 or dense.shape[0] != cells.batch:
        raise InvalidValueError("dense-map-shape", f"expected ({cells.batch}, C, H, W) for {cells}, got {tuple(dense.shape)}")
    (h, w), (height, width) = cells.grid, dense.shape[2:]
    s = height // h
    if s < 1 or cells.cell % s or (height, width) != (h * s, w * s):
        raise InvalidValueError(
            "dense-map-shape",
            f"a map of {height} x {width} positions does not fit the {h} x {w} cells of {cells.cell} px; expected "
            f"{cells.image_size[0]} x {cells.image_size[1]} divided by a stride",
        )
    return s


@function_rule("batch_norm", on=(PackedTensor,))
def _batch_norm(func: Function, owner: PackedTensor, args: Arguments, kwargs: Options) -> SparseTensor:
    if owner.channel_dim != 1:
        raise NoSparseRuleError(
            "channels-last-order", "batch_norm on a sparse feature map in channels-last order; permute first"
        )
    # the tiles hold the visible positions and nothing else, so the dense statistics are the sparse ones
    with plain_torch():
        return owner.like(func(*args, **kwargs))


@function_rule("conv2d", on=(PackedTensor,))
def _conv2d(func: Function, owner: PackedTensor, args: Arguments, kwargs: Options) -> SparseTensor:
    given = conv_arguments(args, kwargs)
    x = given["input"]
    geometry = conv_geometry(x, given)

    def convolve(bias: Tensor | None) -> Tensor:
        return kernels.convolve(x.plain, given["weight"], bias, given["groups"], geometry, x.cells)

    return x.like(renormalised(packed_tap_factor(x.cells, geometry, x.dtype), given["bias"], convolve))


def conv_geometry(x: PackedTensor, given: dict[str, Any]) -> kernels.ConvGeometry:
    """Geometry of a convolution from the arguments of ``conv2d``, checked against the feature map."""
    weight = given["weight"]
    geometry = _geometry("conv2d", x, weight.shape[2:], given)
    if weight.shape[1] * given["groups"] != x.shape[1]:
        raise InvalidValueError(
            "conv-channels-differ",
            f"conv2d: the weight expects {weight.shape[1] * given['groups']} channels, the feature map has {x.shape[1]}",
        )
    return geometry


@function_rule("max_pool2d", on=(PackedTensor,))
def _max_pool2d(func: Function, owner: PackedTensor, args: Arguments, kwargs: Options) -> SparseTensor:
    given = max_pool_arguments(args, kwargs)
    x = given["input"]
    geometry = _geometry("max_pool2d", x, given["kernel_size"], given)
    tiles = x.plain
    if not geometry.stays_in_cells:
        # a hidden position counts as 0, as in the masked-dense network; a place outside the image as minus infinity
        outside = x.pending.value if x.pending else float("-inf")
        tiles = kernels.halo_tiles(tiles, geometry, x.cells, outside)
    return x.like(F.max_pool2d(tiles, geometry.kernel, geometry.stride, 0, geometry.dilation))


@function_rule("avg_pool2d", on=(PackedTensor,))
def _avg_pool2d(func: Function, owner: PackedTensor, args: Arguments, kwargs: Options) -> SparseTensor:
    given = avg_pool_arguments(args, kwargs)
    x, divisor = given["input"], given["divisor_override"]
    geometry = _geometry("avg_pool2d", x, given["kernel_size"], given)
    if geometry.stays_in_cells:
        return x.like(F.avg_pool2d(x.plain, geometry.kernel, geometry.stride, divisor_override=divisor))
    tiles = kernels.halo_tiles(x.plain, geometry, x.cells)
    pooled = F.avg_pool2d(tiles, geometry.kernel, geometry.stride, divisor_override=divisor)
    share = window_share(x.cells, geometry, given, x.pending, pooled.dtype)
    if share is not None:
        pooled = pooled / x.cells.gather_cells(share.expand(x.cells.batch, -1, -1, -1), geometry.s_out)
    return x.like(renormalised(packed_tap_factor(x.cells, geometry, x.dtype), None, lambda _: pooled))


def _geometry(what: str, x: PackedTensor, kernel: int | Sequence[int], given: dict[str, Any]) -> kernels.ConvGeometry:
    if x.channel_dim != 1:
        raise NoSparseRuleError("channels-last-order", f"{what} on a sparse feature map in channels-last order; permute first")
    s = x.side
    size = (x.cells.grid[0] * s, x.cells.grid[1] * s)
    return window_geometry(what, s, size, kernel, given, x.pending)


def window_share(
    cells: CellLayout, geometry: kernels.ConvGeometry, given: dict[str, Any], pending: Padding | None, dtype: torch.dtype
) -> Tensor | None:
    """Share of each pooling window that dense pooling counts, (1, 1, H', W'); None when it is 1 everywhere."""
    if given["divisor_override"] is not None or (given["count_include_pad"] and not given["ceil_mode"]):
        return None
    height, width = cells.grid[0] * geometry.s_in, cells.grid[1] * geometry.s_in
    if pending is not None:  # these positions are part of what the pooling sees
        height, width = height + pending.top + pending.bottom, width + pending.left + pending.right
    ones = torch.ones(1, 1, height, width, dtype=dtype, device=cells.device)
    padding, ceil, include = given["padding"], given["ceil_mode"], given["count_include_pad"]
    mean = F.avg_pool2d(ones, geometry.kernel, geometry.stride, padding, ceil, include)
    area = geometry.kernel[0] * geometry.kernel[1]
    total = F.avg_pool2d(ones, geometry.kernel, geometry.stride, padding, ceil, True, divisor_override=area)
    return total / mean
