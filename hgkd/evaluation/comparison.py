"""The runs of a comparison (``hgkd compare``) as a CSV and as a picture: final results and learning curves.

A run is a dict: ``row`` (runs of one row differ by ``seed``), ``scores`` (name -> ``top1`` and ``ci95``, or ``value``),
``curves`` (name -> [[step, value], ...] of its validations; older ones: ``curve``, of the k-NN), and of what was trained
``images``, ``train_seconds``, ``train_cpu_seconds``, ``images_per_s``, ``teacher_share`` and ``command``.
"""

from __future__ import annotations

import csv
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hgkd.evaluation.report import Figure

Run = Mapping[str, Any]
_FACTS = ("images", "train_seconds", "train_cpu_seconds", "images_per_s", "teacher_share")


def trained(checkpoint: str | os.PathLike[str]) -> tuple[int | None, str]:
    """What a run in one process leaves behind.

    Returns:
        How many images (repeats counted) it had seen when it wrote the checkpoint (None: the file does not say), and the
        checkpoint as ``hgkd evaluate`` takes it: of a ViT student ``mae:FILE``.
    """
    from hgkd.engine.weights import read_checkpoint
    from hgkd.export.source import literal_config

    content = read_checkpoint(checkpoint)
    meta = content.get("meta") if isinstance(content, Mapping) else None
    meta = meta if isinstance(meta, Mapping) else {}
    batch = (literal_config(meta.get("cfg")).get("train_dataloader") or {}).get("batch_size")
    images = int(meta["iter"]) * int(batch) if "iter" in meta and batch else None
    return images, f"mae:{checkpoint}" if "mae" in (meta.get("hgkd") or {}) else os.fspath(checkpoint)


def write_csv(runs: Sequence[Run], file: str | os.PathLike[str]) -> None:
    """One line a run: row, seed, every score with its interval where it has one, images, seconds, command."""
    names = list(dict.fromkeys(name for run in runs for name in run["scores"]))
    columns = [
        *("row", "seed"),
        *(column for name in names for column in (name, f"{name} ci95_low", f"{name} ci95_high")),
        *_FACTS,
        *("resumed", "command"),
    ]
    with open(file, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, columns, restval="")
        writer.writeheader()
        for run in runs:
            line = {"row": run["row"], "seed": run["seed"], "resumed": bool(run.get("resumed"))}
            line["command"] = run.get("command") or run.get("evaluate_command", "")
            line |= {fact: run[fact] for fact in _FACTS if run.get(fact) is not None}
            for name, score in run["scores"].items():
                line[name] = value_of(score)
                if "ci95" in score:
                    line[f"{name} ci95_low"], line[f"{name} ci95_high"] = score["ci95"]
            writer.writerow(line)


def write_picture(runs: Sequence[Run], file: str | os.PathLike[str]) -> None:
    """Bars of the final scores, and the runs' first curve over images and over processor seconds, as PNG.

    Whiskers and bands are the deviation over seeds; a bar of a single seed is hatched, its whisker the interval over test
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
                x, mean, deviation = zip(*points, strict=True)
                axis.plot(x, mean, marker=".", label=row, color=colours[row])
                low, high = ([m + sign * d for m, d in zip(mean, deviation, strict=True)] for sign in (-1, 1))
                axis.fill_between(x, low, high, alpha=0.2, color=colours[row], linewidth=0)
        axis.set_xlabel(label)
        axis.set_ylabel(f"{next(iter(_curves(_first_with_curve(runs))))} during training")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(Path(file), format="png", dpi=110)


def value_of(score: Mapping[str, Any]) -> float:
    """What a run is compared by: top-1 of an evaluation, or the value that it logged itself."""
    return float(score["top1"] if "top1" in score else score["value"])


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
    """(x, mean, deviation over seeds) of the first curve of a row's runs; x is the step's share of ``run[total]``."""
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
