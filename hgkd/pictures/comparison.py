"""The runs of a comparison as a picture: final scores and learning curves."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from hgkd.evaluation.comparison import Run, value_of
from hgkd.writing import written_whole


def write_picture(runs: Sequence[Run], file: str | os.PathLike[str]) -> None:
    """Bars of the final scores, and the runs' first curve over images and over processor seconds, as PNG.

    Whiskers and bands are the std over seeds; a bar of a single seed is hatched, its whisker the interval over test
    images. Validations are taken to lie evenly in time and images. A run that was interrupted has no curve over seconds.
    """
    rows: dict[str, list[Run]] = {}
    for run in runs:
        rows.setdefault(run["row"], []).append(run)
    names = list(dict.fromkeys(name for run in runs for name in run["scores"]))
    curves = {
        "training images": {row: _curve(members, "images") for row, members in rows.items()},
        "training, CPU s": {
            row: _curve([run for run in members if not run.get("resumed")], "train_cpu_seconds")
            for row, members in rows.items()
        },
    }
    curves = {label: found for label, found in curves.items() if any(found.values())}
    figure = Figure(figsize=(5 * (1 + len(curves)), max(3.4, 0.35 * len(rows) * len(names) + 1.2)), layout="constrained")
    axes = figure.subplots(1, 1 + len(curves), squeeze=False)[0]
    _draw_bars(axes[0], rows, names)
    colours = {row: f"C{i % 10}" for i, row in enumerate(rows)}
    for axis, (label, found) in zip(axes[1:], curves.items(), strict=True):
        for row, points in found.items():
            if points:
                x, mean, std = zip(*points, strict=True)
                axis.plot(x, mean, marker=".", label=row, color=colours[row])
                low, high = ([m + sign * d for m, d in zip(mean, std, strict=True)] for sign in (-1, 1))
                axis.fill_between(x, low, high, alpha=0.2, color=colours[row], linewidth=0)
        axis.set_xlabel(label)
        axis.set_ylabel(f"{next(iter(_curves(_first_with_curve(runs))))} during training")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    with written_whole(file) as stream:
        figure.savefig(stream, format="png", dpi=110)


def _draw_bars(axis: Any, rows: Mapping[str, Sequence[Run]], names: Sequence[str]) -> None:
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        for place, members in enumerate(rows.values()):
            scores = [run["scores"][name] for run in members if name in run["scores"]]
            if not scores:
                continue
            values = [value_of(score) for score in scores]
            mean, single = statistics.mean(values), len(values) == 1
            error: tuple[float, float] = (0.0, 0.0)
            if not single:
                error = (statistics.stdev(values),) * 2
            elif "ci95" in scores[0]:
                low, high = scores[0]["ci95"]
                error = (max(mean - low, 0.0), max(high - mean, 0.0))
            axis.barh(
                place + (i - (len(names) - 1) / 2) * width,
                mean,
                width,
                xerr=[[error[0]], [error[1]]],
                color=f"C{i % 10}",
                alpha=0.8,
                hatch="//" if single else None,
                capsize=3,
                label=name if place == 0 else None,
            )
    axis.set_yticks(range(len(rows)), [f"{row} ({len(members)})" for row, members in rows.items()])
    axis.invert_yaxis()
    axis.set_xlabel("final score (seeds in brackets; hatched: one)")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize=8)


def _curves(run: Run) -> Mapping[str, Sequence[Sequence[float]]]:
    if "curves" in run:
        return {name: curve for name, curve in run["curves"].items() if curve}
    return {"knn": run["curve"]} if run.get("curve") else {}


def _first_with_curve(runs: Sequence[Run]) -> Run:
    return next(run for run in runs if _curves(run))


def _curve(members: Sequence[Run], total: str) -> list[tuple[float, float, float]]:
    """(x, mean, std over seeds) of the first curve of a row's runs; x is the step's share of ``run[total]``."""
    known = [run for run in members if _curves(run) and run.get(total)]
    values: dict[float, list[float]] = {}
    ends = []
    for run in known:
        curve = next(iter(_curves(run).values()))
        last = curve[-1][0]
        ends.append(run[total])
        for step, value in curve:
            values.setdefault(step / last, []).append(value)
    if not known:
        return []
    end = statistics.mean(ends)
    return [
        (share * end, statistics.mean(found), statistics.stdev(found) if len(found) > 1 else 0.0)
        for share, found in sorted(values.items())
    ]
