"""What the device at hand may and can compute with: TF32, tensor cores, whether the stream is being captured."""

from __future__ import annotations

import platform
from collections.abc import Callable

import torch
from torch import Tensor

# Triton has no tensor-core products below: it compiles them to scalar code, half a minute a kernel (triton PR 5066)
TENSOR_CORES_FROM = (8, 0)


def tf32_allowed(what: str) -> bool:
    """Whether torch may round fp32 factors to TF32 on CUDA, by either of its two settings.

    Args:
        what: 'matmul' (off unless the user says so) or 'conv' (on unless the user says so).
    """
    backend = torch.backends.cuda.matmul if what == "matmul" else torch.backends.cudnn
    new = getattr(backend, "conv", backend)
    # the newer setting is read first: with it in use, reading the older one raises RuntimeError
    precision = getattr(new, "fp32_precision", None)
    if precision in (None, "none"):
        precision = getattr(torch.backends, "fp32_precision", None)
    if precision is not None:
        return bool(precision == "tf32")
    return bool(backend.allow_tf32)


def capability(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA GPU; None of every other device, AMD's included."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def has_tensor_cores(device: torch.device) -> bool:
    """Whether Triton multiplies matrices by tensor cores on a GPU; of AMD's it is taken to be so."""
    found = capability(device)
    return device.type == "cuda" and (found is None or found >= TENSOR_CORES_FROM)


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded: nothing runs then, so nothing may be measured, checked or kept."""
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def require(fits: Tensor, error: Callable[[], Exception]) -> None:
    """Raise an error unless a flag on a device is set. A GPU ends the process itself, so that the host waits for nothing."""
    if fits.device.type != "cpu":
        torch._assert_async(fits)
    elif not bool(fits):
        raise error()


def name_of(device: torch.device) -> str:
    """Name of the processor behind a device, for messages and for files that hold what was measured on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()} {cpu_model()} {torch.get_num_threads()} threads"
    return device.type


def cpu_model() -> str:
    """Name of this machine's processor, as the system has it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            found = next((line.partition(":")[2] for line in lines if line.startswith(("model name", "CPU part"))), "")
    except OSError:
        found = ""
    return " ".join((found or platform.processor() or platform.machine() or "unknown").split())
