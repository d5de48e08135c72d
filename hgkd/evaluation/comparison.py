"""The runs of a comparison (``hgkd compare``) as a CSV and as a picture: final results and learning curves.

A run is a dict: ``row`` (runs of one row differ by ``seed``), ``scores`` (name -> ``top1`` and ``ci95``, or ``value``),
``curves`` (name -> [[step, value], ...] of its validations; older ones: ``curve``, of the k-NN), and of what was trained
``images``, ``train_seconds``, ``train_cpu_seconds``, ``images_per_s``, ``teacher_share`` and ``command``.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from typing import Any

Run = Mapping[str, Any]
_FACTS = ("images", "train_seconds", "train_cpu_seconds", "images_per_s", "teacher_share")


def trained(checkpoint: str | os.PathLike[str]) -> tuple[int | None, str]:
    """Facts of a finished run in one process, from its checkpoint.

    Returns:
        How many images (repeats counted) it had seen when it wrote the checkpoint (None: the file does not say), and the
        checkpoint as ``hgkd evaluate`` takes it.
    """
    from hgkd.weights.identify import identify
    from hgkd.weights.run_file import literal_config

    meta = identify(checkpoint).meta
    batch = (literal_config(meta.get("cfg")).get("train_dataloader") or {}).get("batch_size")
    images = int(meta["iter"]) * int(batch) if "iter" in meta and batch else None
    return images, os.fspath(checkpoint)


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


def value_of(score: Mapping[str, Any]) -> float:
    """The number that a run is compared by: top-1 of an evaluation, or the value that it logged itself."""
    return float(score["top1"] if "top1" in score else score["value"])
