"""Arguments of convolution and pooling, and the check that sizes keep to the grid, for all backends."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from hgkd.errors import InvalidValueError, NoSparseRuleError
from hgkd.sparse.kernels import ConvGeometry
from hgkd.sparse.tensor import Arguments, Options, Padding

_CONV_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_MAX_POOL_NAMES = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
_AVG_POOL_NAMES = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """A number, or a list of one or two, as (vertical, horizontal)."""
    if isinstance(value, int):
        return value, value
    values = tuple(int(v) for v in value)
    return (values[0], values[0]) if len(values) == 1 else (values[0], values[1])


def conv_arguments(args: Arguments, kwargs: Options) -> dict[str, Any]:
    """All arguments of ``conv2d`` by name, with its defaults."""
    defaults = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    return defaults | dict(zip(_CONV_NAMES, args, strict=False)) | kwargs


def max_pool_arguments(args: Arguments, kwargs: Options) -> dict[str, Any]:
    """All arguments of ``max_pool2d`` by name; ``stride`` filled in."""
    given = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}
    given |= dict(zip(_MAX_POOL_NAMES, args, strict=False)) | kwargs
    given["stride"] = given["stride"] or given["kernel_size"]
    return given


def avg_pool_arguments(args: Arguments, kwargs: Options) -> dict[str, Any]:
    """All arguments of ``avg_pool2d`` by name; ``stride`` filled in."""
    given = {"stride": None, "padding": 0, "ceil_mode": False, "count_include_pad": True, "divisor_override": None}
    given |= dict(zip(_AVG_POOL_NAMES, args, strict=False)) | kwargs
    given["stride"] = given["stride"] or given["kernel_size"]
    given["dilation"] = 1
    return given


def window_geometry(
    what: str,
    s_in: int,
    size: tuple[int, int],
    kernel: int | Sequence[int],
    given: dict[str, Any],
    pending: Padding | None = None,
) -> ConvGeometry:
    """Geometry of a sliding window, after checking that the output falls on the cell grid.

    Args:
        what: name for messages.
        s_in: positions along a cell's side in the input.
        size: (height, width) of the whole feature map in positions.
        given: the function's arguments: stride, padding, dilation, perhaps ceil_mode.
        pending: what ``torch.nn.functional.pad`` added before.

    Raises:
        ValueError: a cell smaller than the stride, or an output whose size is not input / stride.
        NoSparseRuleError: different strides along the two axes, or a padding that the function cannot continue.
    """
    padding = given["padding"]
    padding = padding if isinstance(padding, str) else pair(padding)
    ceil_mode, stride, dilation = given.get("ceil_mode", False), pair(given["stride"]), pair(given["dilation"])
    return _checked_geometry(what, s_in, size, pair(kernel), stride, padding, dilation, ceil_mode, pending)


@lru_cache(maxsize=4096)  # the same layers ask at every step
def _checked_geometry(
    what: str,
    s_in: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] | str,
    dilation: tuple[int, int],
    ceil_mode: bool,
    pending: Padding | None,
) -> ConvGeometry:
    """See :func:`window_geometry`; all pairs are (vertical, horizontal)."""
    if stride[0] != stride[1]:
        raise NoSparseRuleError(
            "strides-differ-along-axes", f"{what} with strides {stride}: different strides along the axes have no sparse rule"
        )
    if s_in % stride[0]:
        raise InvalidValueError(
            "cells-too-small-for-stride",
            f"{what} of stride {stride[0]} on cells that are {s_in} positions wide here: cells must be a multiple of the "
            "network's total stride; use larger mask cells",
        )
    if isinstance(padding, str):
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)] if padding == "same" else [0, 0]
        pad = (total[0] // 2, total[1] // 2)  # torch pads the odd position below and right
        above_and_below = tuple(total)
    else:
        pad = padding
        above_and_below = (2 * pad[0], 2 * pad[1])
    before, padded = (0, 0), size
    if pending is not None:
        _check_pending(what, pending, any(above_and_below))
        before = (pending.top, pending.left)
        padded = (size[0] + pending.top + pending.bottom, size[1] + pending.left + pending.right)
    for axis in (0, 1):
        room = padded[axis] + above_and_below[axis] - dilation[axis] * (kernel[axis] - 1) - 1
        made = (-(-room // stride[axis]) if ceil_mode else room // stride[axis]) + 1
        if ceil_mode and (made - 1) * stride[axis] >= padded[axis] + pad[axis]:
            made -= 1  # torch drops a last window that would start beyond the image
        if made != size[axis] // stride[axis]:
            raise InvalidValueError(
                "window-moves-positions",
                f"{what} with kernel {kernel}, stride {stride}, padding {padding}, dilation {dilation} makes {made} positions "
                f"of {size[axis]}; a sparse layer must make {size[axis] // stride[axis]}, so that its positions stay "
                "aligned with the mask cells (usual remedy: padding = dilation * (kernel - 1) / 2)",
            )
    pad = (pad[0] + before[0], pad[1] + before[1])
    return ConvGeometry(s_in, kernel, stride, pad, dilation, pending.mode if pending else "constant")


def _check_pending(what: str, pending: Padding, pads_itself: bool) -> None:
    """A window function continues a padding only where both would mean the same."""
    if what == "conv2d":
        fits = not pads_itself if pending.mode == "reflect" else pending.value == 0.0
    else:
        fits = not pads_itself and pending.mode == "constant" and (what == "max_pool2d" or pending.value == 0.0)
    if not fits:
        raise NoSparseRuleError(
            "padding-without-sparse-rule",
            f"{what}{' that pads as well' if pads_itself else ''} after torch.nn.functional.pad with mode={pending.mode!r}, "
            f"value={pending.value}: this combination has no sparse rule",
        )
