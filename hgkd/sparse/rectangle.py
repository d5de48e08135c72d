"""Visible rectangles: where every image of a batch shows one, all of one size, the visible part is a batch of crops.

An ordinary convolution of the crops, with its ordinary zeros around them, is then what the masked network computes, since
hidden positions count as 0: nothing is gathered, and a visible cell costs what it costs in the dense network. The backend
``gather`` takes this way by itself on a CPU, and on a GPU where it is told that the masks are such
(:attr:`CellLayout.rectangle`); :class:`hgkd.masking.RectangleMask` draws them, and says so.
"""

from __future__ import annotations

from collections import ChainMap
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from hgkd.sparse.convolution import avg_pool_arguments, conv_arguments, max_pool_arguments
from hgkd.sparse.kernels import ConvGeometry
from hgkd.sparse.layout import CellLayout
from hgkd.sparse.masked import MaskedTensor
from hgkd.sparse.packed import PackedTensor, _geometry, _side_of, conv_geometry, window_share
from hgkd.sparse.taps import renormalised, tap_factor, taps_on
from hgkd.sparse.tensor import Arguments, Function, Options, Rule, SparseTensor, function_rule, wide


class RectangleTensor(PackedTensor):
    """The visible rectangle of each image: (B, C, rows*s, columns*s), or (B, rows*s, columns*s, C) in channels-last order."""

    rules: ClassVar[ChainMap[Any, Rule]] = ChainMap({}, PackedTensor.rules)  # type: ignore[assignment, misc]

    @classmethod
    def pack(cls, dense: Tensor, cells: CellLayout) -> RectangleTensor:
        return cls.wrap(crop(dense, cells, _side_of(dense, cells)), cells)

    def to_dense(self, fill: float | Tensor = 0.0) -> Tensor:  # type: ignore[override]
        self.check_complete()
        return uncrop(self.plain, self.cells, fill)

    @property
    def side(self) -> int:
        """Positions along a cell's side."""
        return int(self.shape[self.spatial_dims[0]]) // sides(self.cells)[0]

    def per_image(self, value: Tensor) -> Tensor:
        """(B, ...) operands broadcast without reshaping."""
        self.check_per_image(value)
        return value

    def image_sum(self, values: Tensor) -> Tensor:
        """Sum of values over each image's positions: (B, C), fp32 or wider."""
        return values.sum(self.spatial_dims, dtype=wide(values.dtype))

    def image_max(self) -> Tensor:
        """Maximum over each image's positions: (B, C)."""
        return self.plain.amax(self.spatial_dims)


def sides(cells: CellLayout) -> tuple[int, int]:
    """(rows, columns) of a layout's rectangles."""
    assert cells.rectangle is not None
    return cells.rectangle


def crop(dense: Tensor, cells: CellLayout, s: int) -> Tensor:
    """The visible rectangles of a dense map (B, C, h*s, w*s): (B, C, rows*s, columns*s), channels_last; differentiable."""
    rows, columns = sides(cells)
    tiles = cells.gather_cells(dense, s).permute(0, 2, 3, 1).reshape(cells.batch, rows, columns, s, s, -1)
    return tiles.permute(0, 1, 3, 2, 4, 5).reshape(cells.batch, rows * s, columns * s, -1).permute(0, 3, 1, 2)


def uncrop(crops: Tensor, cells: CellLayout, fill: float | Tensor = 0.0) -> Tensor:
    """Inverse of :func:`crop`: (B, C, rows*s, columns*s) -> (B, C, h*s, w*s), ``fill`` at hidden positions; differentiable."""
    rows, columns = sides(cells)
    s, values = crops.shape[2] // rows, crops.permute(0, 2, 3, 1)
    split = values.reshape(cells.batch, rows, s, columns, s, -1).permute(0, 1, 3, 2, 4, 5)
    return cells.scatter_cells(split.reshape(cells.num_cells, s, s, -1).permute(0, 3, 1, 2), fill)


def visible_crop(level: SparseTensor) -> Tensor:
    """The visible rectangles of a sparse feature map of any backend, (B, C, rows*s, columns*s)."""
    level.check_complete()
    if isinstance(level, RectangleTensor):
        return level.plain
    return crop(level.to_dense(), level.cells, level.cells.side(level.stride))


@function_rule("conv2d", on=(RectangleTensor,))
def _conv2d(func: Function, owner: RectangleTensor, args: Arguments, kwargs: Options) -> SparseTensor:
    given = conv_arguments(args, kwargs)
    x = given.pop("input")
    geometry, bias = conv_geometry(x, given), given.pop("bias")
    if geometry.border != "constant":
        return _by_whole_images(func, x, args, kwargs)
    values = _padded(x)
    if geometry.is_pointwise:
        # torch on the CPU ends the process in strided 1x1 convolutions of few channels in channels_last; these are the same
        step = geometry.stride[0]
        values, given["stride"] = values[:, :, ::step, ::step], 1
    return x.like(renormalised(_tap_factor(x, geometry), bias, lambda bias: F.conv2d(values, bias=bias, **given)))


@function_rule("max_pool2d", on=(RectangleTensor,))
def _max_pool2d(func: Function, owner: RectangleTensor, args: Arguments, kwargs: Options) -> SparseTensor:
    given = max_pool_arguments(args, kwargs)
    x = given.pop("input")
    geometry = _geometry("max_pool2d", x, given["kernel_size"], given)
    if x.pending is not None and x.pending.value > 0.0:
        return _by_whole_images(func, x, args, kwargs)  # more than a hidden position's 0 must not be put in its place
    given.pop("return_indices", None)
    out = F.max_pool2d(_padded(x), **given)
    if geometry.stays_in_cells:
        return x.like(out)
    floor = x.cells.keep(("floor", geometry), lambda: _touches_hidden(x.cells, geometry))
    return x.like(out.masked_fill(floor & (out < 0.0), 0.0))


@function_rule("avg_pool2d", on=(RectangleTensor,))
def _avg_pool2d(func: Function, owner: RectangleTensor, args: Arguments, kwargs: Options) -> SparseTensor:
    given = avg_pool_arguments(args, kwargs)
    x = given["input"]
    geometry = _geometry("avg_pool2d", x, given["kernel_size"], given)
    divisor = given["divisor_override"] or geometry.kernel[0] * geometry.kernel[1]
    share = window_share(x.cells, geometry, given, x.pending, x.dtype)
    options = (given["kernel_size"], given["stride"], given["padding"], given["ceil_mode"], True, divisor)
    pooled = F.avg_pool2d(_padded(x), *options)
    if share is not None:
        pooled = pooled / crop(share.expand(x.cells.batch, -1, -1, -1), x.cells, geometry.s_out)
    return x.like(renormalised(_tap_factor(x, geometry), None, lambda _: pooled))


def _padded(x: RectangleTensor) -> Tensor:
    """The values with the padding that was to be."""
    return x.plain if x.pending is None else F.pad(x.plain, x.pending.sides, x.pending.mode, x.pending.value)


def _tap_factor(x: RectangleTensor, geometry: ConvGeometry) -> Tensor | None:
    """:func:`tap_factor` of the visible rectangles."""
    cells, factor = x.cells, tap_factor(x.cells, geometry, x.dtype)
    if factor is None:
        return None
    return cells.keep(("rectangle_tap_factor", geometry, factor.dtype), lambda: crop(factor, cells, geometry.s_out))


def _touches_hidden(cells: CellLayout, geometry: ConvGeometry) -> Tensor:
    """Outputs of the rectangles whose window has a hidden position: bool (B, 1, rows*s_out, columns*s_out)."""
    hidden = (~cells.mask(cells.cell // geometry.s_in)).float()
    return crop(taps_on(hidden, geometry), cells, geometry.s_out) > 0


def _by_whole_images(func: Function, x: RectangleTensor, args: Arguments, kwargs: Options) -> SparseTensor:
    """What crops alone do not tell, such as a reflection at the image's border, by the reference; rare."""
    whole = MaskedTensor.wrap(uncrop(x.plain, x.cells), x.cells)
    whole.pending = x.pending
    rest = tuple(whole if argument is x else argument for argument in args)
    out: MaskedTensor = MaskedTensor.rules[func](func, whole, rest, {k: whole if v is x else v for k, v in kwargs.items()})
    return x.like(crop(out.plain, x.cells, x.cells.side(out.stride)))
