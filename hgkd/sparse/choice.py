"""Which kernel computes a layer, and whether a whole network is computed sparse at all: the rules, and where they are kept.

What is measured (:mod:`hgkd.sparse.measured`) is kept in a file of the user's cache folder for each processor and version, so
that a run that goes on, or the next of the same network, computes with the same kernels, to the same bits.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from hgkd.errors import InvalidValueError
from hgkd.sparse.hardware import name_of
from hgkd.writing import replacing, user_cache

MODES = ("rule", "measure", "torch", "fused")
# a layer leaves its rule, and a network the sparse computation, only for a gain that is more than noise
KERNEL_GAIN = 0.10
BACKEND_GAIN = 0.05
# how much longer than the ordinary dense network's a step may take
PROMISE = 1.05
_default = "rule"
_say: Callable[[str], object] | None = None


def kernels_mode() -> str:
    """How kernels are chosen: what ``HGKD_KERNELS`` says, else what :func:`use_kernels` has set, else 'rule'.

    - 'rule': by the layer's shape; fused kernels after their self-check.
    - 'measure': by what is the fastest on the device, measured at the first training step.
    - 'torch', 'fused': as 'rule', but without fused kernels, or with them unchecked.

    Raises:
        ValueError: the variable says something else.
    """
    return _checked(os.environ.get("HGKD_KERNELS") or _default, "HGKD_KERNELS")


@contextmanager
def use_kernels(mode: str, say: Callable[[str], object] | None = None) -> Iterator[None]:
    """Context in which kernels are chosen in a way, where ``HGKD_KERNELS`` is not set; see :func:`kernels_mode`.

    Args:
        mode: 'rule', 'measure', 'torch' or 'fused'.
        say: is called with a line for each choice that is measured.

    Raises:
        ValueError: unknown mode.
    """
    global _default, _say
    before = _default, _say
    _default, _say = _checked(mode, "kernels"), say
    try:
        yield
    finally:
        _default, _say = before


def tell(line: str) -> None:
    """Say what was measured, to whoever wants to know."""
    if _say is not None:
        _say(line)


def _checked(mode: str, name: str) -> str:
    if mode not in MODES:
        raise InvalidValueError("kernels-unknown", f"{name}={mode!r}; known are {', '.join(MODES)}")
    return mode


@dataclass(frozen=True)
class Choice:
    """How a network is computed on a device.

    Attributes:
        backend: 'gather' or 'masked'.
        why: in words.
        step_ms: backend, and 'dense' for the ordinary network on whole images -> a step, milliseconds.
        layers: layer -> kernel, where it is not the rule's.
        layer_ms: layer -> kernel -> forward and backward, milliseconds.
    """

    backend: str = "gather"
    why: str = "by rule"
    step_ms: Mapping[str, float] = field(default_factory=dict)
    layers: Mapping[str, str] = field(default_factory=dict)
    layer_ms: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def fastest_kernel(ms: Mapping[str, float], rule: str) -> str:
    """The kernel to take: the rule's, unless another gains more than :data:`KERNEL_GAIN`."""
    best = min(ms, key=lambda name: ms[name])
    return best if ms[best] < (1 - KERNEL_GAIN) * ms.get(rule, float("inf")) else rule


def fastest_backend(ms: Mapping[str, float]) -> tuple[str, str]:
    """The backend to take, and why, from the steps of 'gather', 'masked' and 'dense'.

    'gather' stays unless 'masked' gains more than :data:`BACKEND_GAIN`, or is the one that keeps the promise: no step takes
    more than :data:`PROMISE` of the dense network's.
    """
    gather, masked, limit = ms["gather"], ms["masked"], PROMISE * ms.get("dense", float("inf"))
    gains = masked < (1 - BACKEND_GAIN) * gather
    keeps = masked < gather and gather > limit
    backend = "masked" if gains or keeps else "gather"
    other = "gather" if backend == "masked" else "masked"
    why = f"faster than {other}" if ms[backend] < ms[other] else f"kept, within {BACKEND_GAIN:.0%} of {other}"
    if ms[backend] > limit:
        why += f", though {ms[backend] / ms['dense']:.2f} of the dense network's step: nothing exact is faster here"
    return backend, why


def cache_file(device: torch.device) -> Path:
    """Where the choices for a processor are kept: ``HGKD_KERNELS_CACHE``, else ``hgkd/kernels`` of the user's cache folder."""
    versions = [f"{name}-{_version(name)}" for name in ("hgkd", "torch", "triton")]
    name = "_".join(re.sub(r"[^\w.+-]+", "-", part) for part in (name_of(device), *versions))
    return user_cache("HGKD_KERNELS_CACHE", "kernels") / f"{name}.json"


def _version(package: str) -> str:
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return "absent"


def kept(device: torch.device) -> dict[str, Choice]:
    """Network and shape -> choice, as kept on disk; a file that cannot be read, or not understood, holds nothing."""
    try:
        found = json.loads(cache_file(device).read_text(encoding="utf-8"))
        return {str(key): Choice(**value) for key, value in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def keep(device: torch.device, key: str, choice: Choice) -> bool:
    """Add a choice to the file; False where the disk does not take it, which costs no more than measuring again."""
    path = cache_file(device)
    all_of_them = {name: asdict(value) for name, value in kept(device).items()} | {key: asdict(choice)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            beside.write_text(json.dumps(all_of_them, indent=1), encoding="utf-8")
    except OSError:
        return False
    return True


def describe(key: str, choice: Choice) -> str:
    """A choice in one line."""
    # dense is no candidate: it computes what is hidden, too
    named = {"dense": "the whole image, dense:"}
    times = ", ".join(f"{named.get(name, name)} {ms:.1f} ms" for name, ms in choice.step_ms.items())
    layers = "; ".join(f"{layer}: {kernel}" for layer, kernel in choice.layers.items()) or "all by rule"
    return f"{key}: {choice.backend}, {choice.why} ({times or 'not measured'}); layers: {layers}"
