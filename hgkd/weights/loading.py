"""Loading weights strictly, with a report: all or nothing, and what is not finite is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from hgkd.errors import WeightsError, abbreviate


class NoPlainNumbersError(WeightsError):
    """A weight is quantised, sparse, complex, an integer or without data, where a network has floating-point numbers."""


@dataclass(frozen=True)
class LoadReport:
    """How a set of weights met a network.

    Attributes:
        source: where the weights are from.
        total: entries of the network.
        matched: entries that were loaded.
        missing: entries of the network without weights.
        unexpected: weights without an entry.
        mismatched: 'name: shape found, expected shape' of entries whose shapes differ.
        ignored: names that the caller declared irrelevant and that were passed over.
    """

    source: str
    total: int
    matched: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    ignored: tuple[str, ...] = field(default=())

    @property
    def complete(self) -> bool:
        """Everything found its place and nothing is left over."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        return self.summary("loaded")

    def summary(self, done: str) -> str:
        """One line; ``done`` says what was done with the entries that matched."""
        parts = [f"{self.source}: {self.matched} of {self.total} entries {done}"]
        for what, names in (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("of another shape", self.mismatched),
            ("ignored", self.ignored),
        ):
            if names:
                parts.append(f"{len(names)} {what}: {abbreviate(names, 5)}")
        return "; ".join(parts)


def match(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str,
    ignore_missing: Sequence[str] = (),
    ignore_unexpected: Sequence[str] = (),
) -> LoadReport:
    """How weights would meet a network; nothing is loaded. Arguments and errors: see :func:`load_strict`."""
    own = module.state_dict()
    unfit = [f"{key} ({kind})" for key in own if key in state and (kind := _no_plain_numbers(state[key], own[key]))]
    if unfit:
        raise NoPlainNumbersError(
            "weights-not-floating-point",
            f"{source} holds {len(unfit)} weights that are no plain floating-point numbers, e.g. {unfit[0]}; it is a quantised "
            "or incomplete file: save the state_dict of the ordinary network",
        )
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    ignored = [key for key in missing if key.startswith(tuple(ignore_missing))] if ignore_missing else []
    ignored += [key for key in unexpected if key.startswith(tuple(ignore_unexpected))] if ignore_unexpected else []
    skipped = set(ignored)
    mismatched = {
        key: f"{key}: {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    }
    report = LoadReport(
        source=source,
        total=len(own),
        matched=len(own) - len(missing) - len(mismatched),
        missing=tuple(key for key in missing if key not in skipped),
        unexpected=tuple(key for key in unexpected if key not in skipped),
        mismatched=tuple(mismatched.values()),
        ignored=tuple(ignored),
    )
    if not report.complete:
        raise WeightsError(
            "weights-do-not-fit", f"the weights do not fit {type(module).__name__}: {report.summary('would fit')}"
        )
    return report


def _no_plain_numbers(value: Tensor, place: Tensor) -> str | None:
    """What kind of tensor a file has where a network has plain numbers; None when it has the same."""
    if value.device.type == "meta" and place.device.type != "meta":  # two networks without data are compared by shapes
        return "without data: the meta device"
    if value.layout != torch.strided or value.is_quantized:
        return str(value.dtype if value.is_quantized else value.layout)
    return str(value.dtype) if place.is_floating_point() and not value.is_floating_point() else None


def load_strict(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str,
    ignore_missing: Sequence[str] = (),
    ignore_unexpected: Sequence[str] = (),
    finite: bool = True,
    tell: bool = True,
) -> LoadReport:
    """Load weights into a network, all or nothing, and log the report.

    Args:
        module: its floating-point precision is kept; fp16 files are converted.
        source: name of the file, for the report.
        ignore_missing, ignore_unexpected: beginnings of names that may be absent, or left over.
        finite: refuse NaN and inf in what is loaded.
        tell: log the report; False: the caller logs it with more.

    Raises:
        WeightsError: anything missing, left over, of another shape or not finite; the network is unchanged then.
    """
    report = match(module, state, source=source, ignore_missing=ignore_missing, ignore_unexpected=ignore_unexpected)
    own = module.state_dict()
    broken = [key for key in own if finite and key in state and not bool(torch.isfinite(state[key]).all())]
    if broken:
        raise WeightsError(
            "weights-not-finite",
            f"{source}: {len(broken)} of its entries hold NaN or inf: {abbreviate(broken, 5)}. The training that wrote "
            "it had diverged, or the file is damaged; take an earlier checkpoint, or get the file again",
        )
    module.load_state_dict({key: value for key, value in state.items() if key in own}, strict=False)
    if tell:
        print_log(str(report), "current")
    return report


def check_finite(path: Path, state: Mapping[str, Tensor]) -> None:
    """Raise WeightsError when a weight is NaN or infinite."""
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise WeightsError(
            "weights-not-finite",
            f"{path} holds NaN or infinite values in {len(broken)} of its weights, e.g. {broken[0]}; "
            "training has diverged, export an earlier checkpoint",
        )
