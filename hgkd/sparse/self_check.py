"""Do the fused kernels compute the right numbers on the device at hand? Asked once a process for each device and type.

Two images with uneven masks, numbers of channels, outputs and points that no tile divides, 9 and 25 taps; the product and both
gradients against fp64, in memory that held NaN before and has NaN behind its last row, twice for equal bits. A device that
fails gets torch's kernels, and one warning with the numbers.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hgkd.sparse.choice import kernels_mode
from hgkd.sparse.hardware import capability, has_tensor_cores, is_capturing, name_of
from hgkd.sparse.layout import CellLayout

# error allowed, norm over norm: that of rounding both factors to the type, with room
LIMITS = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 2e-3}
_CHANNELS, _WIDTH, _SIDE = 40, 130, 5


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Attributes:
        ok: the kernels may be used.
        why: in words, for messages.
        errors: largest error of each quantity, norm over norm; infinite for values that are not finite.
    """

    ok: bool
    why: str
    errors: dict[str, float] = field(default_factory=dict)


_verdicts: dict[tuple[torch.device, torch.dtype], Verdict] = {}


def passed(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the fused kernels may be used; checked when first asked. While a CUDA graph is recorded nothing is checked."""
    if kernels_mode() == "fused":
        return True
    if (device, dtype) not in _verdicts and is_capturing(device):
        return False
    return verdict(device, dtype).ok


def verdict(device: torch.device, dtype: torch.dtype) -> Verdict:
    """The check's result, warned of once when it is bad."""
    if (device, dtype) not in _verdicts:
        _verdicts[device, dtype] = found = check(device, dtype)
        if not found.ok:
            warnings.warn(f"the fused kernels are not used in {dtype} on {device}: {found.why}; torch's serve", stacklevel=2)
    return _verdicts[device, dtype]


def check(device: torch.device, dtype: torch.dtype, sizes: Sequence[int] = (3, 5)) -> Verdict:
    """Run the check for kernels of some sizes; whatever goes wrong in a compiler or on the device is an answer."""
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
            errors, repeatable = _measure(device, dtype, sizes)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return Verdict(False, f"they do not run ({error})")
    numbers = ", ".join(f"{name} {value:.1e}" for name, value in errors.items())
    wrong = [name for name, value in errors.items() if not value <= LIMITS[dtype]]
    if wrong:
        return Verdict(False, f"wrong numbers, errors {numbers}, allowed {LIMITS[dtype]:.0e}", errors)
    if not repeatable:
        return Verdict(False, f"two runs differ (errors {numbers})", errors)
    return Verdict(True, f"checked, errors {numbers}, allowed {LIMITS[dtype]:.0e}", errors)


def describe(device: torch.device) -> list[str]:
    """A line a type on what the fused kernels do on a device, for ``hgkd doctor``."""
    if device.type != "cuda":
        return [f"{name_of(device)}: torch's kernels; the fused ones are for GPUs"]
    if importlib.util.find_spec("triton") is None:
        return [f"{name_of(device)}: torch's kernels; Triton is not installed"]
    if not has_tensor_cores(device):
        major, minor = capability(device) or (0, 0)
        return [f"{name_of(device)}: torch's kernels; compute capability {major}.{minor} is below 8.0, where Triton has no "
                "tensor-core products"]  # fmt: skip
    from hgkd.sparse import fused

    lines = []
    for dtype in LIMITS:
        if not fused.serves(dtype, device):
            lines.append(f"{name_of(device)}, {dtype}: torch's kernels; TF32 is not allowed")
        elif kernels_mode() in ("torch", "fused"):
            lines.append(f"{name_of(device)}, {dtype}: {kernels_mode()} kernels, as HGKD_KERNELS says")
        else:
            found = verdict(device, dtype)
            lines.append(f"{name_of(device)}, {dtype}: {'fused' if found.ok else 'torch'} kernels; {found.why}")
    return lines


def _measure(device: torch.device, dtype: torch.dtype, sizes: Sequence[int]) -> tuple[dict[str, float], bool]:
    visible = torch.tensor([[[1, 0, 1], [1, 1, 0], [0, 1, 1]], [[0, 0, 0], [0, 1, 0], [1, 0, 0]]], device=device).bool()
    layout = CellLayout(visible, _SIDE)
    generator = torch.Generator().manual_seed(0)
    errors: dict[str, float] = {"product": 0.0, "input gradient": 0.0, "weight gradient": 0.0}
    repeatable = True
    for size in sizes:
        offsets = tuple(range(-(size // 2), size // 2 + 1))
        index, back = (layout.neighbours(_SIDE, _SIDE, 1, along, along) for along in (offsets, offsets[::-1]))
        taps, points = size * size, index.shape[0]
        source, grad = (_poisoned(points, width, dtype, device, generator) for width in (_CHANNELS, _WIDTH))
        matrix, turned = (
            (torch.randn(taps * a, b, generator=generator) / (taps * a) ** 0.5).to(device, dtype)
            for a, b in ((_CHANNELS, _WIDTH), (_WIDTH, _CHANNELS))
        )
        for name, compute, expected in _cases(source, grad, index, back, matrix, turned):
            first, again = _in_poisoned_memory(compute, expected), _in_poisoned_memory(compute, expected)
            repeatable &= torch.equal(first, again)
            errors[name] = max(errors[name], _error(first, expected))
    return errors, repeatable


def _cases(
    source: Tensor, grad: Tensor, index: Tensor, back: Tensor, matrix: Tensor, turned: Tensor
) -> list[tuple[str, Callable[[], Tensor], Tensor]]:
    from hgkd.sparse import fused

    def columns(rows: Tensor, at: Tensor) -> Tensor:
        return torch.cat([rows.double(), rows.new_zeros(1, rows.shape[1]).double()])[at].flatten(1)

    return [
        ("product", lambda: fused.gather_multiply(source, index, matrix), columns(source, index) @ matrix.double()),
        ("input gradient", lambda: fused.gather_multiply(grad, back, turned), columns(grad, back) @ turned.double()),
        ("weight gradient", lambda: fused.weight_gradient(source, index, grad), grad.double().t() @ columns(source, index)),
    ]


def _poisoned(rows: int, width: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    """Random rows with NaN behind the last one: what is read there, though it should not be, shows in every sum."""
    memory = torch.full((rows + 256, width), float("nan"), dtype=dtype, device=device)
    memory[:rows] = torch.randn(rows, width, generator=generator).to(device, dtype)
    return memory[:rows]


def _in_poisoned_memory(compute: Callable[[], Tensor], like: Tensor) -> Tensor:
    """The result, in memory that the allocator is likely to hand out with NaN in it; waits, so that a fault appears here."""
    junk = [torch.full(like.shape, float("nan"), device=like.device) for _ in range(4)]
    del junk
    out = compute()
    if out.is_cuda:
        torch.cuda.synchronize(out.device)
    return out


def _error(found: Tensor, expected: Tensor) -> float:
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    return float((found.double() - expected).norm() / expected.norm())
