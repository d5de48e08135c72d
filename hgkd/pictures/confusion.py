"""The report of a classifier: accuracy by class as JSON, the confusion matrix as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hgkd.evaluation.classification import class_accuracy
from hgkd.writing import written_beside, written_whole

_NAMED = 40  # classes whose names fit on a picture


def write_class_report(folder: str | Path, confusion: NDArray[np.int64], classes: Sequence[str]) -> None:
    """Write ``per_class.json`` (accuracy in percent and number of images by class) and ``confusion.png`` into a folder."""
    folder = Path(folder)
    accuracy = class_accuracy(confusion)
    table = {
        name: {"accuracy": None if np.isnan(value) else round(float(value), 3), "images": int(total)}
        for name, value, total in zip(classes, accuracy, confusion.sum(1), strict=True)
    }
    with written_beside(folder / "per_class.json") as beside:
        beside.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    with written_whole(folder / "confusion.png") as stream:
        confusion_picture(confusion, classes).savefig(stream, format="png", dpi=110)


def confusion_picture(confusion: NDArray[np.int64], classes: Sequence[str]) -> Figure:
    """Rows: right class, columns: prediction, colour: share of the row; up to 40 classes are named and up to 20 numbered."""
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    few = len(classes) <= _NAMED
    side = 2.5 + 0.32 * len(classes) if few else 9.0
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    axes.set_xlabel("prediction")
    axes.set_ylabel("right class")
    if few:
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= 20:
        for row, column in np.argwhere(confusion > 0):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(confusion[row, column]), ha="center", va="center", color=colour, fontsize=7)
    figure.colorbar(image, label="share of the class's images", shrink=0.8)
    return figure
