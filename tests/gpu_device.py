"""Where the tests marked ``gpu`` run: a CUDA device, or what HGKD_TEST_DEVICE names (cpu: to try the tests themselves)."""

import os

import pytest
import torch

DEVICE = torch.device(os.environ.get("HGKD_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
if ON_GPU and torch.cuda.is_available():
    DEVICE = torch.device("cuda", torch.cuda.current_device())

# of a module: pytestmark = ON_THE_DEVICE
ON_THE_DEVICE = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="no CUDA device"),
]
gpu_only = pytest.mark.skipif(not ON_GPU, reason="only a CUDA device has it")
