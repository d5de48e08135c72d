"""How far two tensors are apart, where NaN and infinity are failures: one rule for every proof."""

from __future__ import annotations

import math

from torch import Tensor


def largest_difference(found: Tensor, expected: Tensor, least: float = 1e-12) -> float:
    """The largest difference of two tensors, relative to the largest magnitude of ``expected``; never NaN.

    Args:
        least: magnitude that ``expected`` is taken to have at least.

    Returns:
        0 for equal or empty tensors; infinity where the shapes differ or a value is NaN or infinite. So neither ``max``, which
        drops NaN (``max(0.0, nan)`` is 0.0), nor a comparison with a tolerance passes over it.
    """
    if found.shape != expected.shape or not (found.isfinite().all() and expected.isfinite().all()):
        return math.inf
    if not expected.numel():
        return 0.0
    return (found - expected).detach().abs().max().item() / max(expected.detach().abs().max().item(), least)
