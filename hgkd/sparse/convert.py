"""``sparsify``: an ordinary network -> one that also takes sparse tensors, with the same parameters under the same names.

Most layers need nothing: their forward meets the rules of :class:`SparseTensor`. A layer whose forward depends on the shape
of a whole image, or on the batch dimension, gets a rule for its type here (:func:`layer_rule`), and users add theirs in the
same way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache, reduce
from typing import Any, cast

import timm.layers
import torch
import torchvision
from torch import Tensor, nn

from hgkd.errors import InvalidValueError, NoSparseRuleError
from hgkd.sparse.choice import kernels_mode
from hgkd.sparse.kernels import gathers
from hgkd.sparse.layout import CellLayout
from hgkd.sparse.masked import MaskedTensor
from hgkd.sparse.measured import choice_for
from hgkd.sparse.packed import PackedTensor
from hgkd.sparse.rectangle import RectangleTensor
from hgkd.sparse.spconv import SpconvTensor
from hgkd.sparse.tensor import SparseTensor

#: Name -> class of the tensors that compute with it: 'gather' (visible cells only), 'masked' (the reference, dense), 'spconv'.
BACKENDS: dict[str, type[SparseTensor]] = {"gather": PackedTensor, "masked": MaskedTensor, "spconv": SpconvTensor}

LayerRule = Callable[[Any, SparseTensor], Any]
LAYER_RULES: dict[type[nn.Module], LayerRule] = {}

# they mix positions and have neither a function rule nor a layer rule: refused when the network is converted
_REFUSED = (
    nn.ConvTranspose2d,
    nn.InstanceNorm2d,
    nn.LocalResponseNorm,
    nn.MultiheadAttention,
    nn.Unfold,
    nn.Fold,
    nn.Conv3d,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    torchvision.ops.DeformConv2d,
)
# the same of libraries that are not imported here, by module and name
_REFUSED_NAMES = ("mmcv.ops.deform_conv.DeformConv2d", "mmcv.ops.modulated_deform_conv.ModulatedDeformConv2d")
_RULES_BY_NAME: dict[str, LayerRule] = {}


def layer_rule(*layers: type[nn.Module]) -> Callable[[LayerRule], LayerRule]:
    """Register ``rule(layer, x: SparseTensor) -> SparseTensor`` as the sparse forward of layer types.

    The rule serves exactly these types and subclasses that keep their ``forward``. A later registration replaces an
    earlier one.

    >>> @layer_rule(MyGate)
    ... def gate(layer, x):
    ...     return x * layer.scale.view(1, -1, 1, 1)
    """

    def register(rule: LayerRule) -> LayerRule:
        for layer in layers:
            LAYER_RULES[layer] = rule
        return rule

    return register


class SparseModule:
    """Methods that :func:`sparsify` adds to the root of a network.

    Attributes:
        sparse_cell: side of a mask cell, pixels.
        sparse_backend: name of the backend.
        sparse_renormalize: whether taps are renormalised.
    """

    sparse_cell: int
    sparse_backend: str
    sparse_renormalize: bool

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """What ``to``, ``cuda`` and the like call: each kind of device has weights of its own that are laid out."""
        before = _device_type(self)  # type: ignore[arg-type]
        super()._apply(fn, recurse)  # type: ignore[misc]
        if self.sparse_backend == "gather" and _device_type(self) != before:  # type: ignore[arg-type]
            _lay_out_weights(self)  # type: ignore[arg-type]
        return self  # type: ignore[return-value]

    def pack(self, images: Tensor, visible: Tensor | CellLayout) -> SparseTensor:
        """Visible part of a batch of images.

        Args:
            images: (B, C, H, W), already normalised: hidden positions count as 0.
            visible: bool (B, H/cell, W/cell), True = visible, or a ready layout.

        Raises:
            ValueError: the layout renormalises and the network does not, or the other way round.
        """
        if not isinstance(visible, CellLayout):
            visible = CellLayout(visible, self.sparse_cell, self.sparse_renormalize)
        cells = visible
        if cells.renormalize != self.sparse_renormalize:
            raise InvalidValueError(
                "layout-of-another-network",
                f"the layout has renormalize={cells.renormalize}, the network renormalize={self.sparse_renormalize}: its "
                f"features would be others than in training; make the layout with renormalize={self.sparse_renormalize}",
            )
        if any("sparse_path" not in layer.__dict__ for layer in self.modules()):  # type: ignore[attr-defined]
            _give_rules(self)  # type: ignore[arg-type]  # e.g. convert_sync_batchnorm has put in new layers
        # with nothing hidden there is nothing to save, and dense kernels are the fastest
        kind = MaskedTensor if cells.all_visible else BACKENDS[self.sparse_backend]
        if kind is PackedTensor and cells.rectangle is not None:
            kind = RectangleTensor
        if BACKENDS[self.sparse_backend] is PackedTensor and kernels_mode() == "measure":
            gathers = kind is PackedTensor
            choice = choice_for(self, images, cells, gathers)  # type: ignore[arg-type]
            if gathers:
                cells.chosen, kind = choice.layers, BACKENDS[choice.backend]
        return kind.pack(images, cells)

    def forward(self, images: Tensor, *args: object, visible: Tensor | CellLayout | None = None, **kwargs: object) -> object:
        """The network's own forward; with ``visible``, of the visible part only."""
        if visible is not None:
            images = self.pack(images, visible)
        return super().forward(images, *args, **kwargs)  # type: ignore[misc]


def sparsify(module: nn.Module, cell: int, backend: str = "gather", renormalize: bool = False) -> nn.Module:
    """Copy of a network that takes sparse tensors as well as dense ones.

    Args:
        module: any convolutional network; not changed.
        cell: side of a mask cell in pixels, a multiple of the network's total stride.
        backend: 'gather' (default), 'masked' (the reference) or 'spconv' (if installed).
        renormalize: scale what convolutions and average pooling give next to hidden cells by the taps that they lack there
            (partial convolution, arXiv 1804.07723; :mod:`hgkd.sparse.taps`). False is SparK's arithmetic. On whole images
            both are the dense network.

    Returns:
        A copy with equal parameters and ``state_dict`` keys, and the methods of :class:`SparseModule`. Given a dense
        tensor it computes what ``module`` does.

    Raises:
        ValueError: unknown backend, ``cell`` < 1, or a network that is sparse already.
        ImportError: the backend's library is not installed.
        NoSparseRuleError: a layer is known to mix positions without a rule, or cannot be copied; it is named.
    """
    if backend not in BACKENDS:
        raise InvalidValueError("sparse-backend-unknown", f"unknown sparse backend {backend!r}; known: {', '.join(BACKENDS)}")
    BACKENDS[backend].require()
    if cell < 1:
        raise InvalidValueError("cell-not-positive", f"cell must be a positive number of pixels, got {cell}")
    if isinstance(module, SparseModule):
        raise InvalidValueError(
            "sparsified-twice",
            f"the network is sparse already, with cells of {module.sparse_cell} pixels and backend {module.sparse_backend!r}; "
            f"convert the ordinary network with cell={cell}, and copy the weights by load_state_dict",
        )
    module = _copy(module)
    _give_rules(module)
    if backend == "gather":
        _lay_out_weights(module)
    module.__class__ = _root_type(type(module))  # type: ignore[arg-type]
    module.sparse_cell, module.sparse_backend = cell, backend  # type: ignore[assignment]
    module.sparse_renormalize = renormalize  # type: ignore[assignment]
    return module


def _copy(module: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(module)
    except RuntimeError as error:  # torch copies no tensor that another was computed from
        for path, layer in module.named_modules():
            kept = [name for name, value in vars(layer).items() if _computed(value)]
            if kept:
                raise NoSparseRuleError(
                    "layer-with-computed-tensors",
                    f"layer {path!r} ({type(layer).__name__}) keeps computed tensors ({kept[0]}) from one forward to the next, "
                    "so the network cannot be copied; convert it before its first forward, or choose another network",
                ) from error
        raise


def _computed(value: object) -> bool:
    if isinstance(value, Tensor):
        return not value.is_leaf
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return any(isinstance(item, Tensor) and not item.is_leaf for item in inner)


def _give_rules(module: nn.Module) -> None:
    """Every layer whose type has a rule becomes its sparse twin; every layer learns its name, for messages."""
    for path, layer in module.named_modules():
        rule = _rule_of(type(layer))
        if rule is not None:
            layer.__class__ = _twin_type(type(layer), rule)  # type: ignore[arg-type]
        elif isinstance(layer, _REFUSED) or any(_full_name(base) in _REFUSED_NAMES for base in type(layer).__mro__):
            raise NoSparseRuleError(
                "layer-without-sparse-rule",
                f"layer {path!r} ({type(layer).__name__}) mixes positions and has no sparse rule; register one with "
                "hgkd.sparse.layer_rule, or choose another network",
            )
        layer.__dict__["sparse_path"] = path


def _lay_out_weights(module: nn.Module) -> None:
    """Put the weights of layers that gather their neighbours into channels_last: their products read them without a copy.

    Not those of other layers, which gain nothing: they would draw ordinary dense passes into channels_last as well, where
    torch on the CPU ends the process in strided 1x1 convolutions of few channels.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d) and gathers(layer.weight, layer.groups):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)


def _device_type(module: nn.Module) -> str | None:
    return next((parameter.device.type for parameter in module.parameters()), None)


def _rule_of(layer_type: type[nn.Module]) -> LayerRule | None:
    for base in layer_type.__mro__:
        rule = LAYER_RULES.get(base) or _RULES_BY_NAME.get(_full_name(base))
        if rule is not None and layer_type.forward is cast(Any, base).forward:
            return rule
    return None


def _full_name(layer_type: type) -> str:
    return f"{layer_type.__module__}.{layer_type.__qualname__}"


@cache
def _twin_type(layer_type: type[nn.Module], rule: LayerRule) -> type[nn.Module]:
    def forward(self: nn.Module, x: object, *args: object, **kwargs: object) -> object:
        if isinstance(x, SparseTensor):
            return rule(self, x)
        return layer_type.forward(self, x, *args, **kwargs)

    made = type("Sparse" + layer_type.__name__, (layer_type,), {"forward": forward, "__doc__": layer_type.__doc__})
    return _picklable(made, layer_type, root=False)


@cache
def _root_type(module_type: type[nn.Module]) -> type[nn.Module]:
    made = type("Sparse" + module_type.__name__, (SparseModule, module_type), {"__doc__": module_type.__doc__})
    return _picklable(made, module_type.__dict__.get(_MADE_OF, module_type), root=True)


_MADE_OF = "sparse_made_of"  # attribute of the classes above: the network's own class


def _picklable(made: type[nn.Module], of: type[nn.Module], root: bool) -> type[nn.Module]:
    """Let a class that is made here be pickled as what it is made of: it has no name by which it could be found."""

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        given = super(made, self).__reduce_ex__(protocol)
        # all but networks with a way of their own, and subclasses that others make, are told by their class alone
        return (_new, (of, root), *given[2:]) if given[1] == (made,) else given

    setattr(made, _MADE_OF, of)
    made.__reduce_ex__ = reduce_ex  # type: ignore[assignment, method-assign]
    return made


def _new(of: type[nn.Module], root: bool) -> nn.Module:
    """An empty layer, or network, for what was pickled of it."""
    rule = _rule_of(of)
    if rule is None and not root:
        raise NoSparseRuleError(
            "sparse-rule-not-registered",
            f"a pickled network holds a {of.__name__} with a sparse rule, and it has none here; import the module that "
            "registers it (hgkd.sparse.layer_rule) before the network is read",
        )
    made = of if rule is None else _twin_type(of, rule)  # type: ignore[arg-type]
    made = _root_type(made) if root else made  # type: ignore[arg-type]
    return made.__new__(made)


# --- rules for layers whose forward is not a matter of single functions ----------------------------------------------


@layer_rule(timm.layers.DropPath)
def drop_path(layer: timm.layers.DropPath, x: SparseTensor) -> SparseTensor:
    """Stochastic depth drops whole images, not cells (arXiv 1603.09382)."""
    if layer.drop_prob == 0.0 or not layer.training:
        return x
    keep = 1.0 - layer.drop_prob
    kept = torch.empty(x.cells.batch, 1, 1, 1, dtype=x.dtype, device=x.device).bernoulli_(keep)
    if keep > 0.0 and layer.scale_by_keep:
        kept = kept / keep
    return cast(SparseTensor, x * kept)


@layer_rule(torchvision.ops.StochasticDepth)
def stochastic_depth(layer: Any, x: SparseTensor) -> SparseTensor:
    """torchvision's, of single images (mode 'row') or of the batch at once."""
    if layer.p == 0.0 or not layer.training:
        return x
    rows = x.cells.batch if layer.mode == "row" else 1
    keep = 1.0 - layer.p
    kept = torch.empty(rows, 1, 1, 1, dtype=x.dtype, device=x.device).bernoulli_(keep)
    return cast(SparseTensor, x * (kept / keep if keep > 0.0 else kept))


def openmmlab_drop_path(layer: Any, x: SparseTensor) -> SparseTensor:
    """mmcv's, of single images."""
    if layer.drop_prob == 0.0 or not layer.training:
        return x
    keep = 1.0 - layer.drop_prob
    kept = torch.empty(x.cells.batch, 1, 1, 1, dtype=x.dtype, device=x.device).bernoulli_(keep)
    return cast(SparseTensor, x * (kept / keep))


_RULES_BY_NAME["mmcv.cnn.bricks.drop.DropPath"] = openmmlab_drop_path


@layer_rule(timm.layers.EcaModule)
def efficient_channel_attention(layer: timm.layers.EcaModule, x: SparseTensor) -> SparseTensor:
    """ECA (arXiv 1910.03151): a 1-D convolution over channels of the image's mean, which is over visible positions here."""
    mean = x.mean((2, 3))
    gate = layer.conv(mean.unsqueeze(1))
    if layer.conv2 is not None:
        gate = layer.conv2(layer.act(gate))
    gate = gate.squeeze(1)
    return cast(SparseTensor, x * layer.gate(gate)[:, :, None, None])


@layer_rule(timm.layers.SplitAttn)
def split_attention(layer: timm.layers.SplitAttn, x: SparseTensor) -> SparseTensor:
    """ResNeSt (arXiv 2004.08955): a weighted sum of groups of channels; the weights come from the image's mean."""
    x = layer.act0(layer.drop(layer.bn0(layer.conv(x))))
    parts = x.chunk(layer.radix, 1)
    gate = layer.fc2(layer.act1(layer.bn1(layer.fc1(_total(parts).mean((2, 3), keepdim=True)))))
    weights = layer.rsoftmax(gate).view(x.cells.batch, -1, 1, 1).chunk(layer.radix, 1)
    return _total([part * weight for part, weight in zip(parts, weights, strict=True)])


@layer_rule(timm.layers.SelectiveKernel)
def selective_kernel(layer: timm.layers.SelectiveKernel, x: SparseTensor) -> SparseTensor:
    """SKNet (arXiv 1903.06586): a weighted sum of paths; the weights come from the mean of their sum."""
    inputs = x.chunk(layer.num_paths, 1) if layer.split_input else [x] * layer.num_paths
    paths = [path(part) for path, part in zip(layer.paths, inputs, strict=True)]
    attention = layer.attn
    gate = attention.act(attention.bn(attention.fc_reduce(_total(paths).mean((2, 3), keepdim=True))))
    weights = attention.fc_select(gate).unflatten(1, (layer.num_paths, -1)).softmax(1).unbind(1)
    return _total([path * weight for path, weight in zip(paths, weights, strict=True)])


def _total(parts: Sequence[Tensor]) -> SparseTensor:
    """Sum of feature maps (Python's ``sum`` would start from 0, at the price of one more pass)."""
    return cast(SparseTensor, reduce(torch.add, parts))


@layer_rule(timm.layers.GlobalContext)
def global_context(layer: timm.layers.GlobalContext, x: SparseTensor) -> SparseTensor:
    """GCNet (arXiv 1904.11492): the softmax that weighs the positions runs over the image's visible ones."""
    if layer.conv_attn is None:
        context = x.mean((2, 3), keepdim=True)
    else:
        logits = layer.conv_attn(x)
        weights = (logits - logits.amax((2, 3), keepdim=True).detach()).exp()
        context = (x * weights).sum((2, 3), keepdim=True) / weights.sum((2, 3), keepdim=True)
    if layer.mlp_scale is not None:
        x = cast(SparseTensor, x * layer.gate(layer.mlp_scale(context)))
    if layer.mlp_add is not None:
        x = cast(SparseTensor, x + layer.mlp_add(context))
    return x


@layer_rule(nn.SyncBatchNorm)
def sync_batch_norm(layer: nn.SyncBatchNorm, x: SparseTensor) -> SparseTensor:
    """Statistics over the visible positions of all processes; torch weighs each by its number of rows."""
    cells = x.cells
    if isinstance(x, PackedTensor) or cells.all_visible:
        return x.like(nn.SyncBatchNorm.forward(layer, x.plain))
    return x.like(cells.scatter_cells(nn.SyncBatchNorm.forward(layer, cells.gather_cells(x.plain, cells.side(x.stride)))))


@layer_rule(timm.layers.SyncBatchNormAct)
def sync_batch_norm_act(layer: timm.layers.SyncBatchNormAct, x: SparseTensor) -> SparseTensor:
    """timm's norm with an activation, as its ``convert_sync_batchnorm`` leaves it."""
    act, drop = cast(nn.Module, layer.act), cast(nn.Module, layer.drop)
    return cast(SparseTensor, act(drop(sync_batch_norm(layer, x))))
