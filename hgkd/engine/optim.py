"""Optimiser wrappers: bfloat16 on every device, and weight decay on weights only."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from mmengine import registry as roots
from mmengine.optim import OptimWrapper
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
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        kind = self.optimizer_cfg["type"]
        cls = roots.OPTIMIZERS.get(kind) if isinstance(kind, str) else kind
        first = next(iter(inspect.signature(cls).parameters))
        optimizer = roots.OPTIMIZERS.build({**self.optimizer_cfg, first: [g for g in groups if g["params"]]})
        wrapper: OptimWrapper = OPTIM_WRAPPERS.build(
            {"type": "OptimWrapper", "_scope_": "hgkd", **self.wrapper_cfg, "optimizer": optimizer}
        )
        return wrapper
