"""Optimiser wrappers: bfloat16 on every device, weight decay on weights only, learning rates that fall layer by layer."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmengine import registry as roots
from mmengine.optim import OptimWrapper
from timm.optim import param_groups_layer_decay
from torch import nn

from hgkd.engine.registries import OPTIM_WRAPPERS
from hgkd.registry import OPTIM_WRAPPER_CONSTRUCTORS


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
            raise ValueError(
                f"DecayGroupsConstructor takes no paramwise_cfg, got {dict(paramwise_cfg)}; "
                "set optim_wrapper.constructor='DefaultOptimWrapperConstructor' to use it"
            )
        self.wrapper_cfg = dict(optim_wrapper_cfg)
        self.optimizer_cfg = dict(self.wrapper_cfg.pop("optimizer"))

    def __call__(self, model: nn.Module) -> OptimWrapper:
        return self._wrapper(decay_groups(p for p in model.parameters() if p.requires_grad))

    def _wrapper(self, groups: list[dict[str, Any]]) -> OptimWrapper:
        """The wrapper of an optimiser over parameter groups, of which empty ones are left out."""
        kind = self.optimizer_cfg["type"]
        cls = roots.OPTIMIZERS.get(kind) if isinstance(kind, str) else kind
        first = next(iter(inspect.signature(cls).parameters))
        optimizer = roots.OPTIMIZERS.build({**self.optimizer_cfg, first: [g for g in groups if g["params"]]})
        wrapper: OptimWrapper = OPTIM_WRAPPERS.build(
            {"type": "OptimWrapper", "_scope_": "hgkd", **self.wrapper_cfg, "optimizer": optimizer}
        )
        return wrapper


def decay_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, Any]]:
    """Two parameter groups: what decays, and what is one-dimensional and does not."""
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.ndim > 1]},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayConstructor(DecayGroupsConstructor):
    """Learning rates that fall from the head of a classifier to its stem: lr * layer_decay ** (layers above), for CNN and ViT.

    Layers and groups are timm's (``param_groups_layer_decay``, after BEiT, arXiv 2106.08254): a block is a layer, the
    classifier the last one. Weights decay as with :class:`DecayGroupsConstructor`, but for what timm says must not (class
    token, positions). Whatever is no part of the model's ``classifier.network`` (a second head, generators of objectives) gets
    the full rate. The first group, whose rate is logged, is that of the head.

    Args:
        optim_wrapper_cfg: config of the wrapper, with ``optimizer``, which has ``lr`` and ``weight_decay``.
        paramwise_cfg: ``layer_decay``, in (0, 1]; and for CNNs ``blocks_per_layer``, how many blocks of each stage make a
            layer (SparK's fine-tuning of ResNet-50: (3, 2, 3, 3), of ConvNeXt: (3, 3, 3, 3)).

    Raises:
        ValueError: no ``layer_decay``, one out of range, or ``blocks_per_layer`` for a network without stages.
    """

    def __init__(self, optim_wrapper_cfg: Mapping[str, Any], paramwise_cfg: Mapping[str, Any] | None = None) -> None:
        super().__init__(optim_wrapper_cfg)
        options = dict(paramwise_cfg or {})
        self.layer_decay = options.pop("layer_decay", None)
        self.blocks_per_layer: Sequence[int] | None = options.pop("blocks_per_layer", None)
        if options or not isinstance(self.layer_decay, (int, float)) or not 0.0 < self.layer_decay <= 1.0:
            raise ValueError(
                "LayerDecayConstructor takes paramwise_cfg=dict(layer_decay=number in (0, 1], for CNNs also blocks_per_layer), "
                f"got {dict(paramwise_cfg or {})}; for one rate everywhere use DecayGroupsConstructor"
            )

    def __call__(self, model: nn.Module) -> OptimWrapper:
        network: Any = model.get_submodule("classifier.network")
        lr = self.optimizer_cfg["lr"]
        matched = network if self.blocks_per_layer is None else _StageLayers(network, self.blocks_per_layer)
        still = getattr(network, "no_weight_decay", set)()
        layers = param_groups_layer_decay(
            matched,
            weight_decay=self.optimizer_cfg.get("weight_decay", 0.0),
            no_weight_decay_list=still,
            layer_decay=self.layer_decay,
        )
        groups = [{**group, "lr": lr * group.pop("lr_scale")} for group in reversed(layers)]
        inside = {id(p) for p in network.parameters()}
        others = decay_groups(p for p in model.parameters() if p.requires_grad and id(p) not in inside)
        return self._wrapper([*groups, *others])


class _StageLayers:
    """A timm CNN as ``param_groups_layer_decay`` sees it: some blocks of a stage make a layer."""

    def __init__(self, network: Any, blocks_per_layer: Sequence[int]) -> None:
        self.named_parameters = network.named_parameters
        self._blocks = tuple(blocks_per_layer)
        stages = {found["stage"] for name, _ in network.named_parameters() if (found := _STAGE.match(name))}
        if len(stages) != len(self._blocks) or min(self._blocks) < 1:
            raise ValueError(
                f"blocks_per_layer={self._blocks} needs a number of blocks, 1 or more, for each stage; "
                f"{type(network).__name__} has {len(stages)} stages"
            )
        self._first = min(map(int, stages))
        self._heads = {id(p) for p in network.get_classifier().parameters()}
        self._head_names = {name for name, p in network.named_parameters() if id(p) in self._heads}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[int, ...]]:
        return self._layer

    def _layer(self, name: str) -> tuple[int, ...]:
        found = _STAGE.match(name)
        if found is None:  # a norm between the last stage and the classifier counts with the latter, as in SparK and ConvNeXt
            return (2,) if name in self._head_names or name.startswith(("head.", "norm_pre.")) else (0,)
        stage = int(found["stage"]) - self._first
        return 1, stage, int(found["block"] or 0) // self._blocks[stage]


_STAGE = re.compile(r"(?:layer|stages\.)(?P<stage>\d+)(?:\.blocks)?(?:\.(?P<block>\d+))?")
