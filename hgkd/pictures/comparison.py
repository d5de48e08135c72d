"""The runs of a comparison as a picture: final scores and learning curves."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from hgkd.evaluation.comparison import Run, value_of
from hgkd.writing import written_whole

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

Points = Sequence[tuple[float, float, float]]  # x, mean and std over seeds
_TOTALS = {"training images": "images", "training, CPU s": "train_cpu_seconds"}  # label of an axis -> the fact at its end


def write_picture(runs: Sequence[Run], file: str | os.PathLike[str]) -> None:
    """Bars of the final scores, and the runs' first curve over images and over processor seconds, as PNG.

    Whiskers and bands are the std over seeds; a bar of a single seed is hatched, its whisker the interval over test
    images. Curves of one quantity share their panels; another quantity has panels of its own below. Validations are taken
    to lie evenly in time and images. A run that was interrupted has no curve over seconds.
    """
    rows: dict[str, list[Run]] = {}
    for run in runs:
        rows.setdefault(run["row"], []).append(run)
    panels = _panels(rows)
    labels = [label for label in _TOTALS if any(label in found for found in panels.values())]
    bars = sum(len(_names(members)) for members in rows.values())
    size = 5 * (1 + len(labels)), max(3.4, 0.35 * bars + 1.2, 3.2 * len(panels))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.add_gridspec(max(1, len(panels)), 1 + len(labels))
    _draw_bars(figure.add_subplot(grid[:, 0]), rows)
    palette = colormaps["tab10" if len(rows) <= 10 else "tab20"]
    colours = {row: palette(i % palette.N) for i, row in enumerate(rows)}
    for line, (quantity, found) in enumerate(panels.items()):
        handles: dict[str, Artist] = {}
        for column, label in enumerate(labels):
            if label in found:
                axis = figure.add_subplot(grid[line, 1 + column])
                handles |= _draw_curves(axis, found[label], colours)
                axis.set_xlabel(label)
                axis.set_ylabel(f"{quantity} during training")
        # once a line, beside the curves: looking for a free place among many of them takes seconds
        axis.legend(handles.values(), handles, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    with written_whole(file) as stream:
        figure.savefig(stream, format="png", dpi=110)


def _names(members: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in members for name in run["scores"]))


def _draw_bars(axis: Axes, rows: Mapping[str, Sequence[Run]]) -> None:
    """A group of bars a row: the scores that it has, one colour a kind of score."""
    kinds = _names([run for members in rows.values() for run in members])
    colours = {name: f"C{i % 10}" for i, name in enumerate(kinds)}
    handles: dict[str, Any] = {}
    ticks, place, width = [], 0.0, 0.4
    for members in rows.values():
        start = place
        for name in _names(members):
            scores = [run["scores"][name] for run in members if name in run["scores"]]
            values = [value_of(score) for score in scores]
            mean, single = statistics.mean(values), len(values) == 1
            error: tuple[float, float] = (0.0, 0.0)
            if not single:
                error = (statistics.stdev(values),) * 2
            elif "ci95" in scores[0]:
                low, high = scores[0]["ci95"]
                error = (max(mean - low, 0.0), max(high - mean, 0.0))
            drawn = axis.barh(
                place + width / 2,
                mean,
                width,
                xerr=[[error[0]], [error[1]]],
                color=colours[name],
                alpha=0.8,
                hatch="//" if single else None,
                capsize=3,
            )
            handles.setdefault(name, drawn)
            place += width
        ticks.append((start + place) / 2)
        place += 0.2
    axis.set_yticks(ticks, [f"{row} ({len(members)})" for row, members in rows.items()])
    axis.invert_yaxis()
    axis.set_xlabel("final score (seeds in brackets; hatched: one)")
    axis.grid(axis="x", alpha=0.3)
    # above the bars, which reach into any corner
    axis.legend(handles.values(), handles, fontsize=8, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=4)


def _draw_curves(axis: Axes, curves: Mapping[str, Points], colours: Mapping[str, Any]) -> dict[str, Artist]:
    """One line a row, and the std around it; returned are the lines."""
    drawn: dict[str, Artist] = {}
    for row, points in curves.items():
        x, mean, std = zip(*points, strict=True)
        (drawn[row],) = axis.plot(x, mean, marker=".", color=colours[row])
        low, high = ([m + sign * d for m, d in zip(mean, std, strict=True)] for sign in (-1, 1))
        axis.fill_between(x, low, high, alpha=0.2, color=colours[row], linewidth=0)
    axis.grid(alpha=0.3)
    return drawn


def _panels(rows: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, dict[str, Points]]]:
    """What is drawn beside the bars: quantity -> label of the x axis -> row -> points, without what has none."""
    panels: dict[str, dict[str, dict[str, Points]]] = {}
    for row, members in rows.items():
        quantity = next((name for run in members for name in _curves(run)), None)
        for label, total in _TOTALS.items():
            # processor seconds of an interrupted run are those of its last part
            counted = [run for run in members if total == "images" or not run.get("resumed")]
            if quantity is not None and (points := _curve(counted, total)):
                panels.setdefault(quantity, {}).setdefault(label, {})[row] = points
    return panels


def _curves(run: Run) -> Mapping[str, Sequence[Sequence[float]]]:
    if "curves" in run:
        return {name: curve for name, curve in run["curves"].items() if curve}
    return {"knn": run["curve"]} if run.get("curve") else {}


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
