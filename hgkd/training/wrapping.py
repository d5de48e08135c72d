"""The model inside its data-parallel wrapper."""

from __future__ import annotations

from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn


def plain_model(runner: Runner) -> nn.Module:
    """The model without its data-parallel wrapper."""
    model: nn.Module = runner.model.module if is_model_wrapper(runner.model) else runner.model
    return model
