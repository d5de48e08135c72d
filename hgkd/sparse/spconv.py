"""Backend ``spconv``: convolutions larger than 1x1 by the spconv library (traveller59/spconv, Apache-2.0), if installed.

Everything else is the ``gather`` backend's: a :class:`SpconvTensor` is a :class:`PackedTensor` with another rule for
``conv2d``. The dense weights are shared: each call hands spconv a view of them in its own layout, KRSC for torch's KCRS.
A stride-1 convolution is submanifold; a strided one would add positions next to the visible cells, which are dropped again, so
that the active positions stay on the mask's grid.

spconv has no grouped or depthwise convolution, no even kernel that keeps the size, no asymmetric or reflected padding and no
bf16: such layers use gather's kernels, and bf16 is computed in fp32. On the CPU spconv has one algorithm, ``Native``.
"""

from __future__ import annotations

import threading
from collections import ChainMap
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from hgkd.errors import InvalidValueError, MissingPackageError
from hgkd.sparse import kernels
from hgkd.sparse.convolution import conv_arguments
from hgkd.sparse.kernels import ConvGeometry
from hgkd.sparse.layout import CellLayout
from hgkd.sparse.packed import PackedTensor, conv_geometry
from hgkd.sparse.taps import packed_tap_factor, renormalised
from hgkd.sparse.tensor import Arguments, Function, Options, Rule, SparseTensor, function_rule

# torch.func.functional_call lends the shared spconv module our weights for the time of one call
_LENDING = threading.Lock()


class SpconvTensor(PackedTensor):
    """Visible cells as in :class:`PackedTensor`; spconv sees their positions as rows with coordinates."""

    rules: ClassVar[ChainMap[Any, Rule]] = ChainMap({}, PackedTensor.rules)  # type: ignore[assignment, misc]

    @classmethod
    def require(cls) -> None:
        try:
            import spconv.pytorch  # noqa: F401
        except ImportError as error:
            raise MissingPackageError(
                "spconv-missing",
                f"backend 'spconv' needs the spconv library ({error}); pip install 'hgkd[spconv]', any spconv build will do, "
                "or use backend='gather', which needs nothing",
            ) from error


@function_rule("conv2d", on=(SpconvTensor,))
def _conv2d(func: Function, owner: SpconvTensor, args: Arguments, kwargs: Options) -> SparseTensor:
    given = conv_arguments(args, kwargs)
    x, weight, groups = given["input"], given["weight"], given["groups"]
    geometry = conv_geometry(x, given)

    def convolve(bias: Tensor | None) -> Tensor:
        if not fits_spconv(x.cells, groups, geometry):
            return kernels.convolve(x.plain, weight, bias, groups, geometry, x.cells)
        return _convolve(x.plain, weight, bias, geometry, x.cells)

    return x.like(renormalised(packed_tap_factor(x.cells, geometry, x.dtype), given["bias"], convolve))


def fits_spconv(layout: CellLayout, groups: int, geometry: ConvGeometry) -> bool:
    """Whether spconv can do a layer, and it is more than the plain matrix product of a 1x1 convolution."""
    if groups > 1 or geometry.is_pointwise or geometry.border != "constant":
        return False
    for axis in (0, 1):
        reach = geometry.dilation[axis] * (geometry.kernel[axis] - 1)
        if geometry.stride[axis] == 1 and 2 * geometry.pad[axis] != reach:
            return False
        room = layout.grid[axis] * geometry.s_in + 2 * geometry.pad[axis] - reach - 1
        if room // geometry.stride[axis] + 1 != layout.grid[axis] * geometry.s_out:
            return False
    return geometry.stride != (1, 1) or all(k % 2 for k in geometry.kernel)


def to_krsc(weight: Tensor) -> Tensor:
    """A convolution's weight from torch's (K, C, R, S) to spconv's (K, R, S, C)."""
    return weight.permute(0, 2, 3, 1).contiguous()


def from_krsc(weight: Tensor) -> Tensor:
    """A convolution's weight from spconv's (K, R, S, C) to torch's (K, C, R, S)."""
    return weight.permute(0, 3, 1, 2).contiguous()


def check_indices(indices: Tensor) -> Tensor:
    """``indices`` itself.

    Raises:
        ValueError: not int32 (N, 3) in contiguous memory; spconv would read wrong positions without a word.
    """
    if indices.dtype != torch.int32 or indices.dim() != 2 or indices.shape[1] != 3 or not indices.is_contiguous():
        raise InvalidValueError(
            "spconv-indices",
            f"spconv needs contiguous int32 indices (N, 3), got {indices.dtype} {tuple(indices.shape)}"
            f"{'' if indices.is_contiguous() else ', not contiguous'}; use .int().contiguous()",
        )
    return indices


def _convolve(packed: Tensor, weight: Tensor, bias: Tensor | None, geometry: ConvGeometry, layout: CellLayout) -> Tensor:
    device_type = packed.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else packed.dtype
    compute = torch.float32 if dtype == torch.bfloat16 else dtype
    rows = kernels.rows_of(packed).to(compute)
    positions = _places(layout, geometry.s_in).replace_feature(rows)
    lent = {"weight": to_krsc(weight.to(compute))}
    layer = _layer(weight.shape[1], weight.shape[0], geometry, device_type)
    with torch.autocast(device_type, enabled=False), _LENDING:
        made = torch.func.functional_call(layer, lent, (positions,))
    out = made.features
    if geometry.stride != (1, 1):
        out = _on_the_grid(out, made.indices, geometry.s_out, layout)
    out = out.to(dtype)
    return kernels.packed_of(out if bias is None else out + bias.to(dtype), geometry.s_out)


def _on_the_grid(values: Tensor, indices: Tensor, s: int, layout: CellLayout) -> Tensor:
    """Rows (T*s*s, C) in packed order out of spconv's, which come in any order and include positions of hidden cells."""
    image, y, x = indices.long().unbind(1)
    rows = layout.row_map(s)[image, y, x].long()  # hidden positions: one past the last row
    out = values.new_zeros(layout.num_cells * s * s + 1, values.shape[1])
    return out.index_copy(0, rows, values)[:-1]


def _places(layout: CellLayout, s: int) -> Any:
    """spconv's tensor of the visible positions, without values; it keeps the tables of neighbours for all layers."""
    from spconv.pytorch import SparseConvTensor

    def make() -> object:
        indices = check_indices(layout.coordinates(s))
        shape = [layout.grid[0] * s, layout.grid[1] * s]
        return SparseConvTensor(torch.empty(len(indices), 0, device=layout.device), indices, shape, layout.batch)

    return layout.keep(("spconv", s), make)


@cache
def _layer(in_channels: int, out_channels: int, geometry: ConvGeometry, device_type: str) -> torch.nn.Module:
    """spconv's layer for a shape; its own weights are never used, so they hold no memory."""
    from spconv.pytorch import ConvAlgo, SparseConv2d, SubMConv2d

    options: dict[str, Any] = {
        "kernel_size": list(geometry.kernel),
        "padding": list(geometry.pad),
        "dilation": list(geometry.dilation),
        "bias": False,
        "algo": ConvAlgo.Native if device_type == "cpu" else None,
    }
    if geometry.stride == (1, 1):
        key = f"{geometry.kernel}{geometry.dilation}{geometry.s_in}"
        layer = SubMConv2d(in_channels, out_channels, indice_key=key, **options)
    else:
        layer = SparseConv2d(in_channels, out_channels, stride=list(geometry.stride), **options)
    return layer.to("meta")
