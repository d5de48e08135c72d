"""What the runtimes of small devices share."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator

from hgkd.export.job import ExportError

TOLERANCE = 1e-4  # kernels of another library (Winograd's products, fused activations) round in another order
_OPERATOR = re.compile(r"\b(?:torch\.ops\.)?aten(?:\.|::)\w+(?:\.\w+)?|(?:\bop '|fx node \w+, kind )(\w+)")


def suffix(precision: str) -> str:
    """What a file of a precision is called by, after its stem."""
    return "" if precision == "fp32" else f"_{precision}"


def lacking(runtime: str, error: Exception) -> ExportError:
    """The error of a converter that stopped, with the operators that its text names, or else with its last line."""
    named = sorted({found[1] or found[0].removeprefix("torch.ops.") for found in _OPERATOR.finditer(str(error))})
    lines = str(error).strip().splitlines() or [""]
    what = f"it lacks {', '.join(named)}" if named else f"it says {type(error).__name__}: {lines[-1].strip()[:300]}"
    return ExportError("operator-not-in-target", f"{runtime} cannot hold this network: {what}; use --to onnx or openvino")


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without the progress that converters print."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
