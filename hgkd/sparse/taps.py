"""Renormalised taps: a convolution at the border of hidden cells is scaled up by the taps that it lacks.

After partial convolution (Liu et al., arXiv 1804.07723, equation 1): with the mask M (1 = visible),

    y = W^T (x * M) * (taps inside the image / taps at visible positions) + b

The paper divides the number of all taps; here only those inside the image count, so that the factor is 1 everywhere when
nothing is hidden, and the network is then the dense one. The factor depends on the mask alone: it is made once a layout for
each geometry, from a map of one channel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from hgkd.sparse.layout import CellLayout

if TYPE_CHECKING:
    from hgkd.sparse.kernels import ConvGeometry


def tap_factor(layout: CellLayout, geometry: ConvGeometry, dtype: torch.dtype) -> Tensor | None:
    """Taps inside the image / taps at visible positions, of every output place: (B, 1, H', W'), fp32 or wider.

    None where it is 1 everywhere: the layout does not renormalise, nothing is hidden, or no window leaves its cell.
    Outputs without any visible tap, which lie at hidden positions, have the factor of one tap.
    """
    if not layout.renormalize or layout.all_visible or geometry.is_pointwise or geometry.stays_in_cells:
        return None

    def make() -> Tensor:
        visible = layout.mask(layout.cell // geometry.s_in).float()
        with torch.no_grad(), torch.autocast(visible.device.type, enabled=False):
            inside, seen = taps_on(torch.ones_like(visible[:1]), geometry), taps_on(visible, geometry).clamp_min(1.0)
            return inside.to(wide) / seen.to(wide)  # the counts are exact, the quotient is not

    wide = torch.promote_types(dtype, torch.float32)
    return layout.keep(("tap_factor", geometry, wide), make)


def packed_tap_factor(layout: CellLayout, geometry: ConvGeometry, dtype: torch.dtype) -> Tensor | None:
    """:func:`tap_factor` of the visible cells: (T, 1, s, s)."""
    factor = tap_factor(layout, geometry, dtype)
    if factor is None:
        return None
    return layout.keep(("packed_tap_factor", geometry, factor.dtype), lambda: layout.gather_cells(factor, geometry.s_out))


def renormalised(factor: Tensor | None, bias: Tensor | None, convolve: Callable[[Tensor | None], Tensor]) -> Tensor:
    """The output of a convolution, scaled before its bias is added.

    Args:
        factor: see :func:`tap_factor`.
        bias: (C,) of the layer.
        convolve: computes the layer with the given bias.
    """
    if factor is None:
        return convolve(bias)
    out = convolve(None)
    out = out * factor.to(out.dtype)
    return out if bias is None else out + bias.to(out.dtype).view(1, -1, 1, 1)


def taps_on(positions: Tensor, geometry: ConvGeometry) -> Tensor:
    """Number of taps of each window that fall on ones: (B, 1, H, W) -> (B, 1, H', W')."""
    sides: list[int] = []
    for axis in (1, 0):  # torch.nn.functional.pad begins with the last axis
        size, stride = positions.shape[2 + axis], geometry.stride[axis]
        reach = (size // stride - 1) * stride + geometry.dilation[axis] * (geometry.kernel[axis] - 1) + 1
        sides += [geometry.pad[axis], reach - geometry.pad[axis] - size]  # a negative end is cut off
    padded = F.pad(positions, sides, geometry.border)
    kernel = torch.ones(1, 1, *geometry.kernel, dtype=positions.dtype, device=positions.device)
    return F.conv2d(padded, kernel, stride=geometry.stride, dilation=geometry.dilation)
