"""Optimiser wrappers: bfloat16 on every device, weight decay on weights only, learning rates that fall layer by layer."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from mmengine import registry as roots
from mmengine.device import get_device
from mmengine.optim import OptimWrapper
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from hgkd.errors import InvalidValueError
from hgkd.networks.vit import classifier_heads, is_plain_vit
from hgkd.registry import OPTIM_WRAPPER_CONSTRUCTORS
from hgkd.training.registries import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Mixed precision in bfloat16, on CPU and GPU alike.

    bfloat16 has the range of float32, so the loss needs no scaling; mmengine's ``AmpOptimWrapper`` scales and needs a GPU.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, dtype=torch.bfloat16):
            yield


class AdamW(torch.optim.AdamW):
    """torch's AdamW, whose fused kernel pairs the values of its tensors as they lie in memory.

    So weights, gradients and moments must be laid out alike, or it makes wrong updates without a word (torch 2.15). Gradients
    and moments, above all those of a checkpoint, are laid out as the weights are. On the CPU the kernel also copies what is not
    contiguous, there and back, each step; convolution weights in channels_last memory are such tensors, so it is given the same
    memory as contiguous views. State and results are torch's own.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        if not group.get("fused"):
            plain: bool = super()._init_group(group, *lists)  # type: ignore[no-untyped-call]
            return plain
        for parameter in group["params"]:
            state = self.state.get(parameter, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[name] = _laid_out_as(parameter, value)
        found: bool = super()._init_group(group, *lists)  # type: ignore[no-untyped-call]
        parameters, gradients, *_ = lists
        gradients[:] = map(_laid_out_as, parameters, gradients)
        *values, _ = lists  # the last holds the numbers of steps
        for i, tensors in enumerate(zip(*(kind for kind in values if kind), strict=True)):
            if not tensors[0].is_contiguous() and all(map(_is_channels_last, tensors)):
                for kind in filter(None, values):
                    kind[i] = kind[i].detach().permute(0, 2, 3, 1)
        return found


def _laid_out_as(model: Tensor, tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where the other one, of its shape, has another order of its axes in memory."""
    return tensor if tensor.stride() == model.stride() else torch.empty_like(model, dtype=tensor.dtype).copy_(tensor)


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class DecayGroupsConstructor:
    """Weight decay on matrices and kernels, none on one-dimensional parameters: biases, norms, mask tokens, layer scales.

    It makes two parameter groups. mmengine's default constructor with ``paramwise_cfg`` makes one a parameter, which keeps
    optimisers from updating many tensors at once, and logs a line for each.

    Args:
        optim_wrapper_cfg: config of the wrapper, with ``optimizer``.
        paramwise_cfg: not taken; use ``constructor='DefaultOptimWrapperConstructor'`` for it.
    """

    def __init__(self, optim_wrapper_cfg: Mapping[str, Any], paramwise_cfg: Mapping[str, Any] | None = None) -> None:
        if paramwise_cfg:
            raise InvalidValueError(
                "paramwise-cfg-refused",
                f"DecayGroupsConstructor takes no paramwise_cfg, got {dict(paramwise_cfg)}; "
                "set optim_wrapper.constructor='DefaultOptimWrapperConstructor' to use it",
            )
        self.wrapper_cfg = dict(optim_wrapper_cfg)
        self.optimizer_cfg = dict(self.wrapper_cfg.pop("optimizer"))

    def __call__(self, model: nn.Module) -> OptimWrapper:
        return self._wrapper(decay_groups(p for p in model.parameters() if p.requires_grad))

    def _wrapper(self, groups: list[dict[str, Any]]) -> OptimWrapper:
        """The wrapper of an optimiser over parameter groups, of which empty ones are left out."""
        kind = self.optimizer_cfg["type"]
        cls = roots.OPTIMIZERS.get(kind) if isinstance(kind, str) else kind
        cls = AdamW if cls is torch.optim.AdamW else cls
        first = next(iter(inspect.signature(cls).parameters))
        optimizer = roots.OPTIMIZERS.build({**self.optimizer_cfg, "type": cls, first: [g for g in groups if g["params"]]})
        wrapper: OptimWrapper = OPTIM_WRAPPERS.build(
            {"type": "OptimWrapper", "_scope_": "hgkd", **self.wrapper_cfg, "optimizer": optimizer}
        )
        return wrapper


def check_optim_config(cfg: Mapping[str, Any]) -> None:
    """Refuse numbers of an optimiser wrapper's config with which every update would do damage, or nothing.

    Raises:
        ValueError: a rate or decay that is not finite, a clipping that is not above 0, an accumulation of no whole number of
            steps, or a loss scaling that needs a GPU where there is none.
    """
    for name, value in dict(cfg.get("optimizer") or {}).items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
            raise InvalidValueError(
                "optimizer-value-not-finite", f"optim_wrapper.optimizer.{name}={value}: expected a finite number"
            )
    rate = dict(cfg.get("optimizer") or {}).get("lr", 0.0)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or rate < 0:
        raise InvalidValueError("lr-not-a-rate", f"optim_wrapper.optimizer.lr={rate!r}: expected a number, 0 or more")
    for name, value in dict(cfg.get("clip_grad") or {}).items():
        if name in ("max_norm", "clip_value") and not float(value) > 0:
            raise InvalidValueError(
                "clip-grad-not-positive",
                f"optim_wrapper.clip_grad.{name}={value}: expected a number above 0; clip_grad=None does not clip",
            )
    count = cfg.get("accumulative_counts", 1)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InvalidValueError(
            "accumulation-not-whole",
            f"optim_wrapper.accumulative_counts={count}: expected a whole number of steps an update, 1 or more (1: no "
            "accumulation)",
        )
    kind = cfg.get("type")
    name = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
    if name.rpartition(".")[2] == "AmpOptimWrapper" and get_device() == "cpu":
        raise InvalidValueError(
            "amp-needs-gpu",
            "optim_wrapper.type=AmpOptimWrapper scales its losses, which needs a GPU; use --amp, which computes in bfloat16 on "
            "a CPU (type='hgkd.BFloat16OptimWrapper')",
        )


def decay_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Two parameter groups: what decays, and what is one-dimensional and does not."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayConstructor(DecayGroupsConstructor):
    """Learning rates that fall from head to stem, lr * layer_decay ** (layers above), for every timm network of a model.

    One constructor for classifiers (CNN and ViT) and for the backbones of detectors and segmentors. Layers and groups are
    timm's (``group_matcher``, ``param_groups_layer_decay``, after BEiT, arXiv 2106.08254): a block is a layer, a trained
    classifier the last one, with a ViT's last norm and distillation token. Weights decay as with
    :class:`DecayGroupsConstructor`, but for what timm says must not (class token, positions). Whatever is in no timm network
    (necks, heads, generators of objectives) gets the full rate. The first group, whose rate is logged, is one of full rate.

    Args:
        optim_wrapper_cfg: config of the wrapper, with ``optimizer``, which has ``lr`` and ``weight_decay``.
        paramwise_cfg: ``layer_decay``, in (0, 1]; and for CNNs ``blocks_per_layer``, how many blocks of each stage make a
            layer (SparK's fine-tuning of ResNet-50: (3, 2, 3, 3), of ConvNeXt: (3, 3, 3, 3)).

    Raises:
        ValueError: no ``layer_decay``, one out of range, a model without a timm network, or ``blocks_per_layer`` for a
            network without stages.
    """

    def __init__(self, optim_wrapper_cfg: Mapping[str, Any], paramwise_cfg: Mapping[str, Any] | None = None) -> None:
        super().__init__(optim_wrapper_cfg)
        options = dict(paramwise_cfg or {})
        self.layer_decay = options.pop("layer_decay", None)
        self.blocks_per_layer: Sequence[int] | None = options.pop("blocks_per_layer", None)
        if options or not isinstance(self.layer_decay, (int, float)) or not 0.0 < self.layer_decay <= 1.0:
            raise InvalidValueError(
                "layer-decay-out-of-range",
                "LayerDecayConstructor takes paramwise_cfg=dict(layer_decay=number in (0, 1], for CNNs also blocks_per_layer), "
                f"got {dict(paramwise_cfg or {})}; for one rate everywhere use DecayGroupsConstructor",
            )

    def __call__(self, model: nn.Module) -> OptimWrapper:
        lr = self.optimizer_cfg["lr"]
        groups = [group for network in _timm_networks(model) for group in self._groups(network)]
        if not groups:
            raise InvalidValueError(
                "layer-decay-without-layers",
                "layer-wise learning-rate decay reads the layers of a timm network, and this model trains none; use an "
                "ImageClassifier or a hgkd.TimmBackbone, or DecayGroupsConstructor for one rate everywhere",
            )
        inside = {id(p) for group in groups for p in group["params"]}
        others = decay_groups(p for p in model.parameters() if p.requires_grad and id(p) not in inside)
        groups += [{**group, "lr_scale": 1.0} for group in others if group["params"]]
        groups.sort(key=lambda group: -group["lr_scale"])  # stable: heads of the network before other parts
        return self._wrapper([{**group, "lr": lr * group.pop("lr_scale")} for group in groups])

    def _groups(self, network: nn.Module) -> list[dict[str, Any]]:
        """Groups of a network's trained parameters with the factor of their rate, ``lr_scale``, from head to stem."""
        layers = _TrainedLayers(network, self.blocks_per_layer)
        keep: Callable[[], Iterable[str]] = getattr(network, "no_weight_decay", tuple)
        groups = param_groups_layer_decay(
            cast(nn.Module, layers),
            weight_decay=self.optimizer_cfg.get("weight_decay", 0.0),
            no_weight_decay_list=list(keep()),
            layer_decay=self.layer_decay,
        )
        # without a classifier of its own the network's last layer is the one below the head
        below = 1.0 if layers.has_head else self.layer_decay
        return [{**group, "lr_scale": below * group["lr_scale"]} for group in reversed(groups)]


def _timm_networks(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that know their layers, as timm's networks do, and train."""
    for part in model.children():
        if hasattr(part, "group_matcher"):
            if any(p.requires_grad for p in part.parameters()):
                yield part
        else:
            yield from _timm_networks(part)


class _TrainedLayers:
    """A timm network as ``param_groups_layer_decay`` sees it: trained parameters only; for CNNs some blocks make a layer.

    What is not trained, such as the norm of an unused head, would count as a layer behind the last.
    """

    def __init__(self, network: nn.Module, blocks_per_layer: Sequence[int] | None) -> None:
        self._network = network
        heads = {p for part in classifier_heads(network) for p in part.parameters()}
        self._head_names = {name for name, p in network.named_parameters() if p in heads}
        self._is_vit = is_plain_vit(network)  # whose last norm is in the head's layer
        self.has_head = self._is_vit or any(p.requires_grad for p in heads)
        self._blocks = None if blocks_per_layer is None else tuple(blocks_per_layer)
        if self._blocks is None:
            return
        stages = {found["stage"] for name, _ in network.named_parameters() if (found := _STAGE.match(name))}
        if len(stages) != len(self._blocks) or min(self._blocks) < 1:
            raise InvalidValueError(
                "blocks-per-layer-differ",
                f"blocks_per_layer={self._blocks} needs a number of blocks, 1 or more, for each stage; "
                f"{type(network).__name__} has {len(stages)} stages; leave it out (None) to make every block a layer",
            )
        self._first = min(map(int, stages))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self._network.named_parameters() if p.requires_grad)

    def group_matcher(self, coarse: bool = False) -> object:
        """timm's patterns, or a function from a parameter's name to its layer."""
        if self._blocks is not None:
            return self._stage_layer
        return _vit_layer if self._is_vit else cast(Callable[[bool], object], self._network.group_matcher)(coarse)

    def _stage_layer(self, name: str) -> tuple[int, ...]:
        found = _STAGE.match(name)
        if found is None:  # a norm between the last stage and the classifier counts with the latter, as in SparK and ConvNeXt
            return (2,) if name in self._head_names or name.startswith(("head.", "norm_pre.")) else (0,)
        assert self._blocks is not None
        stage = int(found["stage"]) - self._first
        return 1, stage, int(found["block"] or 0) // self._blocks[stage]


def _vit_layer(name: str) -> tuple[int, ...]:
    """As in BEiT's and MAE's released code: the last norm and a distillation token, new ones often, have the head's rate.

    timm counts the norm with the last block and the token with the stem.
    """
    block = _VIT_BLOCK.match(name)
    if block is not None:
        return 1, int(block[1])
    return (0,) if name.startswith(_VIT_STEM) else (2,)


_VIT_BLOCK = re.compile(r"blocks\.(\d+)\.")
_VIT_STEM = ("cls_token", "reg_token", "pos_embed", "patch_embed", "norm_pre")
_STAGE = re.compile(r"(?:layer|stages\.)(?P<stage>\d+)(?:\.blocks)?(?:\.(?P<block>\d+))?")
