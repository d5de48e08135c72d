"""Rules that both kinds of sparse tensor share: elementwise functions, views of channels, statistics of an image."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hgkd.errors import InvalidValueError, NoSparseRuleError
from hgkd.sparse.masked import MaskedTensor
from hgkd.sparse.packed import PackedTensor
from hgkd.sparse.tensor import (
    ELEMENTWISE,
    Arguments,
    Function,
    Options,
    Padding,
    SparseTensor,
    calling_layer,
    function_rule,
    plain_torch,
    wide,
)

BOTH = (PackedTensor, MaskedTensor)


def _refuse(code: str, func: Function, why: str) -> NoSparseRuleError:
    return NoSparseRuleError(code, f"{getattr(func, '__name__', func)} on a sparse feature map{calling_layer()}: {why}")


def check_same_cells(func: Function, owner: SparseTensor, other: SparseTensor) -> None:
    """Refuse to mix two masks, two orders of dimensions, or two resolutions in one operation."""
    if other is owner:
        return
    if other.cells is not owner.cells:
        raise InvalidValueError(
            "masks-differ",
            f"{getattr(func, '__name__', func)} got sparse tensors of two different masks, {owner.cells} and "
            f"{other.cells}; pack all inputs of a network with one CellLayout",
        )
    if other.channel_dim != owner.channel_dim:
        raise _refuse(
            "channel-orders-differ", func, "one operand is in channels-first and the other in channels-last order; permute one"
        )
    # where an image is one cell, tiles are whole images, and torch broadcasts as it does dense ones
    if owner.cells.grid != (1, 1) and other.stride != owner.stride:
        raise _refuse(
            "resolutions-differ",
            func,
            f"its operands have a position every {owner.stride} and every {other.stride} pixels, and would be matched cell by "
            "cell. A pooling over x.shape sees a cell, not the image: for the mean of each image write x.mean((2, 3), "
            "keepdim=True) or adaptive_avg_pool2d(x, 1), which are over its visible positions (docs/reference/students.md, "
            "'Your own layers')",
        )


def operand(func: Function, owner: SparseTensor, value: Tensor) -> Tensor:
    """A plain tensor as partner of ``owner`` in an elementwise function.

    Allowed: one value; one value a channel; one value an image and channel, (B, C, 1, 1), which is repeated for each
    visible cell of its image.
    """
    if value.numel() == 1:
        return value
    y_dim, x_dim = owner.spatial_dims
    dims = value.dim()
    sizes = (1,) * (4 - dims) + tuple(value.shape) if dims <= 4 else ()
    if not sizes or sizes[y_dim] != 1 or sizes[x_dim] != 1:
        raise _refuse(
            "dense-operand",
            func,
            f"the other operand, of shape {tuple(value.shape)}, differs from position to position; pack it with the same "
            "CellLayout first",
        )
    if sizes[0] == 1:
        return value
    return owner.per_image(value)


@function_rule("expand_as", on=BOTH)
def _expand_as(func: Function, owner: SparseTensor, args: Arguments, kwargs: Options) -> Tensor:
    value, target = args
    if isinstance(value, SparseTensor):
        return value
    operand(func, target, value)  # raises when it could not be broadcast later
    return value


def _elementwise(func: Function, owner: SparseTensor, args: Arguments, kwargs: Options) -> object:
    def convert(value: object) -> object:
        if isinstance(value, SparseTensor):
            check_same_cells(func, owner, value)
        elif isinstance(value, Tensor):
            return operand(func, owner, value)
        return value

    args = tuple(convert(a) for a in args)
    kwargs = {k: convert(v) for k, v in kwargs.items()}
    with plain_torch():
        result = func(*args, **kwargs)
    return owner.like(result) if isinstance(result, Tensor) else result


for _kind in BOTH:
    for _func in ELEMENTWISE:
        _kind.rules.setdefault(_func, _elementwise)


@function_rule("permute", on=BOTH)
def _permute(func: Function, owner: SparseTensor, args: Arguments, kwargs: Options) -> SparseTensor:
    dims = kwargs.get("dims", args[1:])
    dims = tuple(dims[0]) if len(dims) == 1 else tuple(dims)
    order = tuple(d % 4 for d in dims)
    moves = {(0, 1, 2, 3): {1: 1, 3: 3}, (0, 2, 3, 1): {1: 3}, (0, 3, 1, 2): {3: 1}}
    channel_dim = moves.get(order, {}).get(owner.channel_dim)
    if channel_dim is None:
        raise _refuse(
            "permute-of-positions",
            func,
            f"permute{dims} separates the positions; only a move of the channel dimension is supported",
        )
    with plain_torch():
        return owner.like(torch.permute(args[0], order), channel_dim)


@function_rule("pad", on=BOTH)
def _pad(func: Function, owner: SparseTensor, args: Arguments, kwargs: Options) -> SparseTensor:
    """Nothing is moved: the padding is remembered for the convolution or pooling that follows (timm's 'same' layers)."""
    given = dict(zip(("input", "pad", "mode", "value"), args, strict=False)) | kwargs
    sides, mode = tuple(int(n) for n in given["pad"]), given.get("mode", "constant")
    if len(sides) not in (2, 4) or owner.channel_dim != 1 or mode not in ("constant", "reflect") or min(sides) < 0:
        raise _refuse(
            "padding-without-sparse-rule",
            func,
            f"padding {sides} with mode={mode!r}; only positions may be padded, with a constant or by reflection",
        )
    if owner.pending is not None:
        raise _refuse("padded-twice", func, "it is padded already; pad once")
    left, right, top, bottom = (*sides, 0, 0)[:4]
    padding = Padding(left, right, top, bottom, mode, float(given.get("value") or 0.0))
    s = owner.cells.side(owner.stride)
    if mode == "reflect" and (
        max(padding.sides[:2]) >= owner.cells.grid[1] * s or max(padding.sides[2:]) >= owner.cells.grid[0] * s
    ):
        raise InvalidValueError(
            "reflection-too-wide",
            f"reflection of {sides} positions on a map of {owner.cells.grid[0] * s} x {owner.cells.grid[1] * s}",
        )
    out = owner.like(owner.plain)
    out.pending = padding if any(sides) else None
    return out


@function_rule("layer_norm", on=BOTH)
def _layer_norm(func: Function, owner: SparseTensor, args: Arguments, kwargs: Options) -> SparseTensor:
    shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
    if owner.channel_dim != 3 or len(tuple(shape)) != 1:
        raise _refuse(
            "norm-over-positions",
            func,
            f"a layer norm over {tuple(shape)} spans positions; only the channel dimension is supported",
        )
    with plain_torch():
        return owner.like(func(*args, **kwargs))


@function_rule("linear", on=BOTH)
def _linear(func: Function, owner: SparseTensor, args: Arguments, kwargs: Options) -> SparseTensor:
    if owner.channel_dim != 3:
        raise _refuse(
            "linear-over-positions",
            func,
            "a linear layer acts on the last dimension, which holds positions; permute to channels last",
        )
    with plain_torch():
        return owner.like(func(*args, **kwargs))


@function_rule("cat", "concat", "concatenate", on=BOTH)
def _cat(func: Function, owner: SparseTensor, args: Arguments, kwargs: Options) -> SparseTensor:
    tensors = args[0] if args else kwargs["tensors"]
    dim = cast(int, args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0)))
    if dim % 4 != owner.channel_dim:
        raise _refuse(
            "concatenation-of-positions", func, f"concatenation along dimension {dim}; only the channel dimension is supported"
        )
    for other in tensors:
        if not isinstance(other, SparseTensor):
            raise _refuse("dense-operand", func, "one of the tensors is dense; pack it with the same CellLayout first")
        check_same_cells(func, owner, other)
    with plain_torch():
        return owner.like(torch.cat(tensors, dim))


@function_rule("chunk", "split", "split_with_sizes", "tensor_split", on=BOTH)
def _split(func: Function, owner: SparseTensor, args: Arguments, kwargs: Options) -> tuple[SparseTensor, ...]:
    dim = cast(int, kwargs.get("dim", args[2] if len(args) > 2 else 0))
    if dim % 4 != owner.channel_dim:
        raise _refuse("split-of-positions", func, f"a split along dimension {dim}; only the channel dimension is supported")
    with plain_torch():
        return tuple(owner.like(part) for part in func(*args, **kwargs))


@function_rule("__getitem__", on=BOTH)
def _getitem(func: Function, owner: SparseTensor, args: Arguments, kwargs: Options) -> SparseTensor:
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    if Ellipsis in index:
        missing = 4 - sum(i is not Ellipsis for i in index)
        at = index.index(Ellipsis)
        index = (*index[:at], *(slice(None),) * missing, *index[at + 1 :])
    step = _phase_step(owner, index)
    if step:
        with plain_torch():
            return owner.like(func(args[0], index))
    keeps = [isinstance(i, slice) and i == slice(None) for i in index]
    channels = [d for d, keep in enumerate(keeps) if not keep]
    if channels not in ([], [owner.channel_dim]) or not all(isinstance(i, slice) for i in index):
        raise _refuse(
            "index-of-positions", func, f"index {args[1]} selects positions or images; only a slice of channels is supported"
        )
    with plain_torch():
        return owner.like(func(*args, **kwargs))


def _phase_step(owner: SparseTensor, index: tuple[object, ...]) -> int:
    """n of an index that takes every n-th place along both sides, from within the first n (YOLO's Focus); 0: another index.

    Cells begin at multiples of their side, which n must divide, so each cell gives its own positions.
    """
    slices = [part for part in index if isinstance(part, slice)]
    if not len(slices) == len(index) == 4:
        return 0
    rest = [part for dim, part in enumerate(slices) if dim not in owner.spatial_dims]
    rows, columns = (slices[dim] for dim in owner.spatial_dims)
    step = int(rows.step or 1)
    side = owner.cells.side(owner.stride)
    inside = all(part.stop is None and 0 <= (part.start or 0) < step for part in (rows, columns))
    fits = step > 1 and columns.step == step and inside and side % step == 0
    return step if fits and all(part == slice(None) for part in rest) else 0


def _autograd(func: Function, owner: SparseTensor, args: Arguments, kwargs: Options) -> object:
    with plain_torch():
        return func(*args, **kwargs)


for _kind in BOTH:  # reentrant activation checkpointing calls it on the recomputed output
    _kind.rules[torch.autograd.backward] = _autograd


# --- statistics over an image's visible positions --------------------------------------------------------------------------


def _dims(owner: SparseTensor, args: Arguments, kwargs: Options) -> tuple[int, ...] | None:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis"))
    if dim is None:
        return None
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    return tuple(sorted(d % 4 for d in dims))


def _keepdim(position: int, args: Arguments, kwargs: Options) -> bool:
    return bool(args[position] if len(args) > position else kwargs.get("keepdim", False))


def _over_image(func: Function, owner: SparseTensor, dims: tuple[int, ...] | None, keepdim: bool, values: Tensor) -> Tensor:
    """(B, C) statistics in the shape that the dense function would give."""
    if not keepdim:
        return values
    y_dim, x_dim = owner.spatial_dims
    return values.unsqueeze(min(y_dim, x_dim)).unsqueeze(max(y_dim, x_dim))


def _reduce(
    func: Function, owner: SparseTensor, args: Arguments, kwargs: Options, position: int, image: Callable[..., Tensor]
) -> object:
    dims = _dims(owner, args, kwargs)
    keepdim = _keepdim(position, args, kwargs)
    if dims == owner.spatial_dims:
        return _over_image(func, owner, dims, keepdim, image())
    if dims == (owner.channel_dim,) and keepdim:
        with plain_torch():
            return owner.like(func(*args, **kwargs))
    raise _refuse(
        "reduction-of-positions",
        func,
        f"a reduction over dimensions {dims}; supported are the two dimensions of positions ({owner.spatial_dims}, gives one "
        f"value an image and channel) and the channel dimension with keepdim=True",
    )


@function_rule("mean", on=BOTH)
def _mean(func: Function, owner: SparseTensor, args: Arguments, kwargs: Options) -> object:
    return _reduce(func, owner, args, kwargs, 2, lambda: image_mean(owner))


@function_rule("sum", on=BOTH)
def _sum(func: Function, owner: SparseTensor, args: Arguments, kwargs: Options) -> object:
    return _reduce(func, owner, args, kwargs, 2, lambda: as_dense_would(owner, owner.image_sum(owner.plain)))


@function_rule("amax", on=BOTH)
def _amax(func: Function, owner: SparseTensor, args: Arguments, kwargs: Options) -> object:
    return _reduce(func, owner, args, kwargs, 2, owner.image_max)


@function_rule("norm", on=BOTH)
def _norm(func: Function, owner: SparseTensor, args: Arguments, kwargs: Options) -> object:
    power = args[1] if len(args) > 1 else kwargs.get("p", 2)
    if power not in (2, "fro"):  # over any dimensions the Frobenius norm is this one
        raise _refuse("norm-power", func, f"the norm with p={power}; only p=2 is supported")
    rest = {"dim": args[2] if len(args) > 2 else kwargs.get("dim")}
    rest["keepdim"] = args[3] if len(args) > 3 else kwargs.get("keepdim", False)
    squares = owner.plain.to(wide(owner.dtype)).square()  # of fp16 they would overflow above 255
    return _reduce(func, owner, (owner,), rest, 2, lambda: as_dense_would(owner, _root(owner.image_sum(squares))))


def _root(total: Tensor) -> Tensor:
    """Square root whose gradient at 0 is 0, as that of torch's norm is; that of ``sqrt`` is infinite there."""
    positive = total != 0  # NaN is kept
    return torch.where(positive, total, 1.0).sqrt() * positive


@function_rule("adaptive_avg_pool2d", on=BOTH)
def _global_average(func: Function, owner: SparseTensor, args: Arguments, kwargs: Options) -> Tensor:
    _check_global(func, owner, args, kwargs)
    return image_mean(owner)[:, :, None, None]


@function_rule("adaptive_max_pool2d", on=BOTH)
def _global_maximum(func: Function, owner: SparseTensor, args: Arguments, kwargs: Options) -> Tensor:
    _check_global(func, owner, args, kwargs)
    return owner.image_max()[:, :, None, None]


def _check_global(func: Function, owner: SparseTensor, args: Arguments, kwargs: Options) -> None:
    size = args[1] if len(args) > 1 else kwargs["output_size"]
    if owner.channel_dim != 1 or size not in (1, (1, 1), [1, 1]):
        raise _refuse(
            "pooling-not-global", func, f"output size {size}; only global pooling (1) is defined over visible positions"
        )


def image_mean(x: SparseTensor) -> Tensor:
    """Mean over each image's visible positions, (B, C)."""
    s = x.cells.side(x.stride)
    positions = (x.cells.cells_per_image * (s * s)).unsqueeze(1)
    total = x.image_sum(x.plain)
    return (total / positions.to(total.dtype)).to(x.dtype)


def as_dense_would(x: SparseTensor, statistics: Tensor) -> Tensor:
    """Sums and norms in the type of the map; under autocast they stay fp32, as torch's do there."""
    return statistics if torch.is_autocast_enabled(x.device.type) else statistics.to(x.dtype)


@function_rule("group_norm", on=BOTH)
def _group_norm(func: Function, owner: SparseTensor, args: Arguments, kwargs: Options) -> SparseTensor:
    names = ("input", "num_groups", "weight", "bias", "eps")
    given = dict(zip(names, args, strict=False)) | kwargs
    groups, eps = given["num_groups"], given.get("eps", 1e-5)
    dtype = owner.dtype
    owner = cast(SparseTensor, owner.to(wide(dtype)))

    def per_group(mean: Tensor) -> Tensor:
        batch, channels = mean.shape
        return mean.view(batch, groups, -1).mean(2).repeat_interleave(channels // groups, 1)[:, :, None, None]

    centred = owner - per_group(image_mean(owner))
    out = centred * (per_group(image_mean(cast(SparseTensor, centred * centred))) + eps).rsqrt()
    if given.get("weight") is not None:
        out = out * given["weight"].view(1, -1, 1, 1)
    if given.get("bias") is not None:
        out = out + given["bias"].view(1, -1, 1, 1)
    return cast(SparseTensor, out if torch.is_autocast_enabled(owner.device.type) else out.to(dtype))


@function_rule("interpolate", on=BOTH)
def _interpolate(func: Function, owner: SparseTensor, args: Arguments, kwargs: Options) -> SparseTensor:
    names = ("input", "size", "scale_factor", "mode")
    given = dict(zip(names, args, strict=False)) | kwargs
    scale = given.get("scale_factor")
    scales = tuple(scale) if isinstance(scale, (tuple, list)) else (scale, scale)
    whole = scale is not None and scales[0] == scales[1] and float(scales[0]).is_integer()
    if given.get("mode", "nearest") != "nearest" or not whole or given.get("size") is not None:
        raise _refuse(
            "interpolation-not-nearest", func, "only mode='nearest' with one whole scale_factor keeps to the visible cells"
        )
    with plain_torch():
        return owner.like(F.interpolate(owner, scale_factor=int(scales[0]), mode="nearest"))
