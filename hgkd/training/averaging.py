"""The moving average of the weights that ``EMAHook`` keeps: of updates, in a few launches in place of one a tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from mmengine.hooks import EMAHook as PlainHook
from mmengine.model import ExponentialMovingAverage as PlainAverage
from mmengine.runner import Runner
from torch import Tensor, nn

from hgkd.registry import HOOKS, MODELS


@HOOKS.register_module()
class EMAHook(PlainHook):
    """mmengine's hook, under its name, that averages after every update; arguments as of mmengine's.

    A step whose gradients are only accumulated, or that is left out, changes no weight. mmengine's hook averages after it, too,
    so with ``accumulative_counts=4`` the average would follow the weights four times as fast as ``momentum`` says.
    """

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: dict[str, Any] | None = None
    ) -> None:
        guard = getattr(runner.train_loop, "guard", None)  # of trainings by steps there is none
        if guard is None or guard.updated:
            super().after_train_iter(runner, batch_idx, data_batch, outputs)


@MODELS.register_module()
class ExponentialMovingAverage(PlainAverage):
    """mmengine's average, under its name, with the same numbers: ``EMAHook`` takes this one in hgkd's scope.

    A ResNet-50 has 161 parameters, and as many buffers that are copied; a GPU gets one launch for each group of one type.
    """

    def update_parameters(self, model: nn.Module) -> None:
        """Average in the parameters of a model, or take them over at the first call."""
        source = model.state_dict() if self.update_buffers else dict(model.named_parameters())
        pairs = [(average.data, source[name].data) for name, average in self.avg_parameters.items()]
        if self.steps == 0:
            _copy(pairs)
        elif self.steps % self.interval == 0:
            floats = (pair for pair in pairs if pair[0].dtype.is_floating_point)
            for averages, values in _grouped(floats):
                torch._foreach_lerp_(averages, values, self.momentum)
        if not self.update_buffers:
            buffers = zip(self.module.buffers(), model.buffers(), strict=True)
            _copy((average.data, value.data) for average, value in buffers)
        self.steps += 1


def _grouped(pairs: Iterable[tuple[Tensor, Tensor]]) -> Iterable[tuple[list[Tensor], list[Tensor]]]:
    """Pairs of tensors, those of one type and device together: only they share a launch; the second moves to the first."""
    groups: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for into, value in pairs:
        for values, one in zip(groups[into.dtype, into.device], (into, value.to(into.device)), strict=True):
            values.append(one)
    return groups.values()


def _copy(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    for into, values in _grouped(pairs):
        torch._foreach_copy_(into, values)
