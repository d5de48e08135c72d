"""What the runtimes of small devices share."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

TOLERANCE = 1e-4  # kernels of another library (Winograd's products, fused activations) round in another order


def suffix(precision: str) -> str:
    """What a file of a precision is called by, after its stem."""
    return "" if precision == "fp32" else f"_{precision}"


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without the progress that converters print."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
