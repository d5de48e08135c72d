"""Getting at a model inside its wrappers, and using it without leaving traces."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from mmengine.model import BaseModel, is_model_wrapper
from mmengine.runner import Runner
from torch import nn


def plain_model(runner: Runner) -> BaseModel:
    """The model without its data-parallel wrapper."""
    model: BaseModel = runner.model.module if is_model_wrapper(runner.model) else runner.model
    return model


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Context after which the model's buffers, and the random numbers of Python, NumPy and torch, are what they were."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
