"""Which kernel computes a layer, and whether a whole network is computed sparse at all."""

from __future__ import annotations

import os

from hgkd.errors import InvalidValueError

MODES = ("rule", "measure", "torch", "fused")


def kernels_mode() -> str:
    """What ``HGKD_KERNELS`` says: 'rule' (the default), 'measure', 'torch' (no Triton) or 'fused' (Triton unchecked).

    Raises:
        ValueError: it says something else.
    """
    found = os.environ.get("HGKD_KERNELS") or "rule"
    if found not in MODES:
        raise InvalidValueError("kernels-unknown", f"HGKD_KERNELS={found!r}; known are {', '.join(MODES)}")
    return found
