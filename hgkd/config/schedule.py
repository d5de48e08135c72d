"""The two halves of a learning rate's schedule in a config: a warm-up, and what follows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def rate_entries(schedule: object) -> tuple[int | None, int | None]:
    """Indices of the warm-up and of the main part in a ``param_scheduler``; None where there is no such part.

    Of two entries that change the learning rate the first is the warm-up; one alone is the main part.
    """
    if not isinstance(schedule, (list, tuple)):
        return None, None
    rates = [i for i, entry in enumerate(schedule) if isinstance(entry, Mapping) and _changes_rate(entry)]
    if len(rates) < 2:
        return None, rates[0] if rates else None
    return rates[0], rates[1]


def _changes_rate(entry: Mapping[str, Any]) -> bool:
    kind = entry.get("type")
    name = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
    return name.endswith("LR") or entry.get("param_name") == "lr"


def shorter_warmup(epochs: float, whole: bool) -> float:
    """A tenth of the training, for a warm-up that is not shorter than the training any more.

    Args:
        whole: only whole epochs can be taken; then 0, no warm-up, below 10 epochs.
    """
    return epochs // 10 if whole else epochs / 10


def without_empty_warmup(schedule: Sequence[Any], steps: int) -> Sequence[Any]:
    """The schedule without a warm-up that is shorter than a step, which mmengine cannot build.

    Args:
        schedule: as in a config.
        steps: of an epoch.
    """
    warm, _ = rate_entries(schedule)
    if warm is None or not isinstance(schedule, Sequence):
        return schedule
    entry = schedule[warm]
    converted = entry.get("convert_to_iter_based") and entry.get("by_epoch", True)
    if not converted or int(entry.get("end", 1) * steps) > int(entry.get("begin", 0) * steps):
        return schedule
    return [*schedule[:warm], *schedule[warm + 1 :]]
