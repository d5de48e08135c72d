"""Tensors that carry the visible cells with them.

A :class:`SparseTensor` goes through any network that is written in ordinary torch: every torch function that it meets is
looked up in one table of rules (``__torch_function__``). Elementwise functions act on the visible positions as they are;
convolution, pooling, norms, reductions over an image and concatenation have rules of their own in
``packed.py`` and ``masked.py``; a function without a rule raises :class:`hgkd.errors.NoSparseRuleError`, because its result
could depend on hidden positions. No module and no global variable ever holds a mask, so several networks, threads and the
recomputation of activation checkpointing (the non-reentrant kind, torch's recommended one) cannot mix up theirs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hgkd.errors import InvalidValueError, NoSparseRuleError
from hgkd.sparse.layout import CellLayout

# a function of torch's, and what it was called with
Function = Callable[..., Any]
Arguments = Sequence[Any]
Options = dict[str, Any]
Rule = Callable[..., Any]
T = TypeVar("T", bound="SparseTensor")

plain_torch = torch._C.DisableTorchFunctionSubclass


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that statistics are taken in: fp32 or wider, under autocast as well."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Padding:
    """Positions that ``torch.nn.functional.pad`` put round the image, remembered until a window function reads them.

    Attributes:
        left, right, top, bottom: numbers of positions.
        mode: 'constant' or 'reflect'.
        value: of constant padding.
    """

    left: int
    right: int
    top: int
    bottom: int
    mode: str = "constant"
    value: float = 0.0

    @property
    def sides(self) -> tuple[int, int, int, int]:
        """In the order of ``torch.nn.functional.pad``."""
        return self.left, self.right, self.top, self.bottom


class SparseTensor(Tensor):
    """Base of the two kinds of sparse feature map; made by :meth:`pack`, never by its constructor.

    Attributes:
        cells: the :class:`CellLayout`.
        channel_dim: 1 for (N, C, y, x), 3 for (N, y, x, C), as after ``permute(0, 2, 3, 1)``.
        pending: padding that the next convolution or pooling, and nothing else, may read.
    """

    cells: CellLayout
    channel_dim: int
    pending: Padding | None = None
    rules: ClassVar[dict[Any, Rule]] = {}

    @classmethod
    def require(cls) -> None:
        """Raise ImportError, with the remedy, when the backend needs a library that is not installed."""

    @classmethod
    def pack(cls: type[T], dense: Tensor, cells: CellLayout) -> T:
        """Take the visible positions of a dense map (B, C, H, W) whose stride is image height / H.

        Raises:
            ValueError: the shape does not fit the layout.
        """
        raise NotImplementedError

    def to_dense(self, fill: float | Tensor = 0.0) -> Tensor:  # type: ignore[override]
        """Dense (B, C, H, W) with ``fill`` (number or (C,)) at hidden positions; differentiable in both."""
        raise NotImplementedError

    @property
    def stride(self) -> int:  # type: ignore[override]
        """Image pixels per position."""
        raise NotImplementedError

    def per_image(self, value: Tensor) -> Tensor:
        """A tensor (B, ...) with one entry an image, as partner in an elementwise function."""
        raise NotImplementedError

    def image_sum(self, values: Tensor) -> Tensor:
        """Sum of plain values, stored as this tensor's are, over each image's visible positions: (B, C), fp32 or wider."""
        raise NotImplementedError

    def image_max(self) -> Tensor:
        """Maximum over each image's visible positions: (B, C)."""
        raise NotImplementedError

    @classmethod
    def wrap(cls: type[T], data: Tensor, cells: CellLayout, channel_dim: int = 1) -> T:
        """Make a plain tensor of this class's storage layout a sparse one, in place (no copy, no autograd node)."""
        if not isinstance(data, SparseTensor):
            data.__class__ = cls
        data.cells, data.channel_dim = cells, channel_dim  # type: ignore[attr-defined]
        return data  # type: ignore[return-value]

    def like(self, data: Tensor, channel_dim: int | None = None) -> SparseTensor:
        """``data`` as a sparse tensor with this one's cells."""
        return type(self).wrap(data, self.cells, self.channel_dim if channel_dim is None else channel_dim)

    @property
    def plain(self) -> Tensor:
        """The stored values as an ordinary tensor (differentiable alias)."""
        with plain_torch():
            return self.as_subclass(Tensor)

    def check_complete(self) -> None:
        """Refuse to read the values as a map while in channels-last order, or between a padding and what it is for."""
        if self.channel_dim != 1:
            raise InvalidValueError("dense-of-channels-last", "to_dense needs channels-first order; permute(0, 3, 1, 2) first")
        if self.pending is not None:
            raise InvalidValueError(
                "dense-of-padded",
                "to_dense after torch.nn.functional.pad: the padding belongs to the convolution or pooling to come",
            )

    def check_per_image(self, value: Tensor) -> None:
        """Refuse an operand that has not one entry an image."""
        if value.shape[0] != self.cells.batch:
            raise InvalidValueError(
                "operand-shape", f"an operand of shape {tuple(value.shape)} does not fit a batch of {self.cells.batch} images"
            )

    @property
    def spatial_dims(self) -> tuple[int, int]:
        """The two dimensions of positions."""
        return (2, 3) if self.channel_dim == 1 else (1, 2)

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        with plain_torch():
            shape = tuple(self.shape)
        return f"{type(self).__name__}(shape={shape}, stride={self.stride}, {self.cells})"

    @classmethod
    def __torch_function__(cls, func: Function, types: object, args: Arguments = (), kwargs: Options | None = None) -> object:
        kwargs = kwargs or {}
        if func in _METADATA:
            with plain_torch():
                return func(*args, **kwargs)
        operands = list(_sparse_in((args, tuple(kwargs.values()))))
        owner = operands[0] if operands else None
        rule = type(owner).rules.get(func) if owner is not None else None
        if rule is None:
            name = getattr(func, "__qualname__", getattr(func, "__name__", repr(func)))
            raise NoSparseRuleError(
                "operation-without-sparse-rule",
                f"{name} has no sparse rule{calling_layer()}: its result could depend on hidden positions. "
                "Register a rule for the layer with hgkd.sparse.layer_rule (see docs/reference/students.md, 'Your own layers')",
            )
        if func not in _READ_PADDING and any(operand.pending for operand in operands):
            name = getattr(func, "__name__", repr(func))
            raise NoSparseRuleError(
                "operation-after-padding",
                f"{name}{calling_layer()} got a feature map that torch.nn.functional.pad has padded; on a sparse feature map "
                "only a convolution or a pooling may follow the padding",
            )
        return rule(func, owner, args, kwargs)


def calling_layer() -> str:
    """' (called by layer NAME: Type)' of the nn.Module nearest in the call stack, or ''."""
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module):
            path = module.__dict__.get("sparse_path")
            return f" (called by layer {path + ': ' if path else ''}{type(module).__name__})"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def _sparse_in(values: Iterable[object]) -> Iterator[SparseTensor]:
    """The sparse tensors among arguments, looking into lists and tuples."""
    for value in values:
        if isinstance(value, SparseTensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _sparse_in(value)


# --- the table of functions that act value by value ------------------------------------------------------------------

_PROPERTIES = (
    "shape dtype device requires_grad grad_fn is_leaf ndim is_cuda is_sparse is_quantized is_meta grad itemsize _version "
    "is_mps is_xpu is_cpu output_nr is_nested retains_grad is_mkldnn layout names _backward_hooks is_ipu is_maia is_vulkan "
    "is_sparse_csr is_mtia nbytes _base"
).split()
_METHODS = (
    "size dim numel nelement is_contiguous is_floating_point element_size data_ptr storage_offset is_complex register_hook "
    "retain_grad requires_grad_ __hash__ is_signed get_device __len__ untyped_storage _is_view"
).split()

_METADATA: set[Any] = set()
for _name in _PROPERTIES:
    if hasattr(Tensor, _name):
        _METADATA |= {getattr(Tensor, _name).__get__} | (
            {getattr(Tensor, _name).__set__} if hasattr(getattr(Tensor, _name), "__set__") else set()
        )
_METADATA |= {getattr(Tensor, name) for name in _METHODS if hasattr(Tensor, name)}
_METADATA |= {torch.is_floating_point, torch.is_complex, torch.numel, torch.is_tensor, torch.is_same_size}

_ELEMENTWISE_NAMES = (
    # activations
    "relu relu_ relu6 leaky_relu leaky_relu_ elu elu_ selu celu gelu silu mish softplus sigmoid sigmoid_ tanh tanh_ hardtanh "
    "hardtanh_ hardswish hardsigmoid logsigmoid softsign threshold rrelu dropout dropout_ alpha_dropout "
    # arithmetic
    "add add_ sub sub_ rsub mul mul_ div div_ true_divide neg neg_ abs abs_ pow pow_ exp exp_ log sqrt sqrt_ rsqrt square "
    "reciprocal clamp clamp_ clamp_min clamp_min_ clamp_max maximum minimum addcmul addcmul_ addcdiv lerp where erf sign "
    "nan_to_num __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__ __rtruediv__ "
    "__itruediv__ __neg__ __pow__ __abs__ multiply negative subtract divide "
    # the same values in another form; view_as is what autograd functions that return an input are given, as those of a
    # module's full backward hooks do
    "to float half bfloat16 double type_as clone detach detach_ contiguous cpu cuda zeros_like ones_like rand_like "
    "type alias view_as"
).split()


def _named(names: list[str]) -> set[Any]:
    homes = (torch, Tensor, F, torch._C._nn)
    return {getattr(home, name) for name in names for home in homes if hasattr(home, name)}


ELEMENTWISE: set[Any] = _named(_ELEMENTWISE_NAMES) - _METADATA


def named_functions(*names: str) -> set[Any]:
    """The torch functions of these names: ``torch.x``, ``Tensor.x`` and ``torch.nn.functional.x``."""
    found = _named(list(names))
    if not found:
        raise InvalidValueError("torch-function-missing", f"torch has no function of any of these names: {names}")
    return found


_READ_PADDING = named_functions("pad", "conv2d", "max_pool2d", "avg_pool2d")


def function_rule(*names: str, on: tuple[type[SparseTensor], ...]) -> Callable[[Rule], Rule]:
    """Register ``rule(func, owner, args, kwargs)`` for all torch functions of the given names."""

    def register(rule: Rule) -> Rule:
        for kind in on:
            for func in named_functions(*names):
                if func not in _METADATA:
                    kind.rules[func] = rule
        return rule

    return register
