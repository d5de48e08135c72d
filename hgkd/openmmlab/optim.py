"""Layer-wise learning-rate decay for the backbone of a detector or segmentor.

BEiT (arXiv 2106.08254), for ConvNeXt in arXiv 2201.03545, appendix A.3: the learning rate of a layer is that of the head times
decay^(distance to the head). mmdet's and mmseg's ``LearningRateDecayOptimizerConstructor`` know mmpretrain's names of ConvNeXt
only; here timm says of each of its networks which parameters form a layer (``group_matcher``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine import registry as roots
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from timm.models._manipulate import group_parameters
from torch import nn

from hgkd.openmmlab.backbone import TimmBackbone
from hgkd.registry import OPTIM_WRAPPER_CONSTRUCTORS


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class DownstreamLayerDecayConstructor:
    """Optimiser whose learning rate falls from the head to the stem; no weight decay on one-dimensional parameters.

    Args:
        optim_wrapper_cfg: config of the wrapper, with ``optimizer``.
        paramwise_cfg: ``decay_rate`` in (0, 1], the factor from one layer to the one before it; and ``coarse``, a layer is a
            whole stage (default False: a block).

    Raises:
        ValueError: unknown keys, a rate out of range, or a model whose backbone is no ``TimmBackbone``.
    """

    def __init__(self, optim_wrapper_cfg: Mapping[str, Any], paramwise_cfg: Mapping[str, Any] | None = None) -> None:
        options = dict(paramwise_cfg or {})
        self.decay_rate = float(options.pop("decay_rate", 1.0))
        self.coarse = bool(options.pop("coarse", False))
        if options or not 0.0 < self.decay_rate <= 1.0:
            raise ValueError(
                "DownstreamLayerDecayConstructor takes paramwise_cfg=dict(decay_rate=..., coarse=...) with decay_rate in "
                f"(0, 1], got {dict(paramwise_cfg or {})}"
            )
        self.wrapper_cfg = dict(optim_wrapper_cfg)
        self.optimizer_cfg = dict(self.wrapper_cfg.pop("optimizer"))

    def __call__(self, model: nn.Module) -> OptimWrapper:
        model = getattr(model, "module", model)
        scales = self.layer_scales(model)
        groups: dict[tuple[float, bool], dict[str, Any]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            key = (scales.get(name, 1.0), parameter.ndim > 1)
            decay = {} if key[1] else {"weight_decay": 0.0}
            group = groups.setdefault(key, {"params": [], "lr": self.optimizer_cfg["lr"] * key[0], **decay})
            group["params"].append(parameter)
        optimizer = dict(self.optimizer_cfg)
        cls: Any = roots.OPTIMIZERS.get(optimizer.pop("type"))
        wrapper: OptimWrapper = roots.OPTIM_WRAPPERS.build(
            {"type": "OptimWrapper", **self.wrapper_cfg, "optimizer": cls(list(groups.values()), **optimizer)}
        )
        print_log(f"learning rates from {min(scales.values()):.3g} (stem) to 1 (head) times lr", "current")
        return wrapper

    def layer_scales(self, model: nn.Module) -> dict[str, float]:
        """Factor of the learning rate by parameter, for the backbone's parameters."""
        found = {name: part for name, part in model.named_modules() if isinstance(part, TimmBackbone)}
        if not found:
            raise ValueError(
                "layer-wise learning-rate decay reads the layers of a hgkd.TimmBackbone, and this model has none; use it, or "
                "the default constructor"
            )
        scales: dict[str, float] = {}
        for path, backbone in found.items():
            network: Any = backbone.network
            grouped = group_parameters(network, network.group_matcher(coarse=self.coarse), reverse=True)
            # what is not trained, a head's norm say, would count as a layer behind the last
            layer_of = {key: layer for key, layer in grouped.items() if network.get_parameter(key).requires_grad}
            last = max(layer_of.values())
            scales |= {f"{path}.network.{key}": self.decay_rate ** (last + 1 - layer) for key, layer in layer_of.items()}
        return scales
