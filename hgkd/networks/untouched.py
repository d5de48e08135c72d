"""Using a model without leaving traces."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Context after which the model's buffers, and the random numbers of Python, NumPy and torch, are what they were."""
    buffers = list(model.buffers())
    before = [buffer.clone() for buffer in buffers]
    python, numpy = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if buffers:
            with torch.no_grad():
                torch._foreach_copy_(buffers, before)
