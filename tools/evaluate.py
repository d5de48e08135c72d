"""How good a backbone's frozen features are: k-NN and linear probe on two folders of labelled images.

    python tools/evaluate.py knn linear --backbone work_dirs/run/epoch_100.pth --train DIR/train --test DIR/test \\
        --image-size 96 --json result.json

A backbone is a checkpoint of tools/train.py, a folder of tools/export.py, a timm name (random weights unless
--checkpoint or --pretrained), or mae:FILE. Images are centre-cropped; a class is a sub-folder.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hgkd.data import LabelledImages
from hgkd.errors import USER_ERRORS, DataError
from hgkd.evaluation import FeatureSet, bootstrap_interval, extract, linear_probe, load_extractor
from hgkd.evaluation.knn import knn_predictions
from hgkd.evaluation.linear import DEFAULT_GRID, per_class_accuracy, percent

METHODS = ("knn", "linear")
CSV_COLUMNS = (
    "method",
    "backbone",
    "checkpoint",
    "block",
    "image_size",
    "train_images",
    "test_images",
    "top1",
    "ci95_low",
    "ci95_high",
)


def evaluate(
    methods: Sequence[str],
    backbone: str,
    train: str,
    test: str,
    *,
    checkpoint: str | None = None,
    block: int | None = None,
    pretrained: bool = False,
    image_size: int = 224,
    limit_per_class: int | None = None,
    test_limit_per_class: int | None = None,
    ks: Sequence[int] = (20,),
    temperature: float = 0.07,
    standardise: bool = True,
    c_grid: Sequence[float] = DEFAULT_GRID,
    batch_size: int = 64,
    workers: int = 2,
    device: str = "auto",
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Extract the features once and run every method of ``methods`` on them.

    Args:
        methods: of 'knn', 'linear'.
        backbone, checkpoint, block, pretrained: see ``hgkd.evaluation.load_extractor``.
        train, test: folders with the same class folders.
        ks: neighbours; ``top1`` is that of the first.
        seed: of random weights, the held-out images and the bootstrap.

    Returns:
        method -> result, as ``--json`` writes it: method, backbone, top1 (percent), ci95, per_class (percent),
        train_images, test_images, settings; k-NN adds top1_by_k, the linear probe sweep (C -> percent on held-out
        training images), chosen_c and converged.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    bank = LabelledImages(train, image_size=image_size, limit_per_class=limit_per_class, split="bank")
    queries = LabelledImages(test, image_size=image_size, limit_per_class=test_limit_per_class, split="query")
    if list(bank.classes) != list(queries.classes):
        only = sorted(set(bank.classes) ^ set(queries.classes))
        raise DataError(f"{train} and {test} must have the same class folders; {only[:5]} are in one of them only")
    if "knn" in methods and not 1 <= min(ks) <= max(ks) <= len(bank):
        raise ValueError(f"k must lie in 1 .. {len(bank)}, the number of training images, got {list(ks)}")

    extractor = load_extractor(backbone, checkpoint, block, pretrained=pretrained, seed=seed)
    known, asked = (extract(extractor, part, batch_size, workers, device) for part in (bank, queries))

    shared = {
        "image_size": image_size,
        "limit_per_class": limit_per_class,
        "test_limit_per_class": test_limit_per_class,
        "train": str(train),
        "test": str(test),
        "seed": seed,
        "skipped_images": known.skipped + asked.skipped,
        "extractor": extractor.settings,
    }
    results: dict[str, dict[str, Any]] = {}
    for method in methods:
        if method == "knn":
            correct, extra, settings = _knn(known, asked, ks, temperature, standardise)
        else:
            correct, extra, settings = _linear(known, asked, c_grid, seed)
        per_class = per_class_accuracy(correct, asked.labels.numpy())
        results[method] = {
            "method": method,
            "backbone": backbone,
            "top1": percent(correct),
            "ci95": list(bootstrap_interval(correct, seed=seed)),
            "per_class": {queries.classes[label]: value for label, value in per_class.items()},
            "train_images": len(known.labels),
            "test_images": len(asked.labels),
            **extra,
            "settings": {**shared, **settings},
        }
    return results


def _knn(
    known: FeatureSet, asked: FeatureSet, ks: Sequence[int], temperature: float, standardise: bool
) -> tuple[NDArray[np.bool_], dict[str, Any], dict[str, Any]]:
    predicted = knn_predictions(
        known.features, known.labels, asked.features, ks=ks, temperature=temperature, standardise=standardise
    )
    correct = {k: (labels == asked.labels).numpy() for k, labels in predicted.items()}
    by_k = {str(k): percent(values) for k, values in correct.items()}
    return correct[ks[0]], {"top1_by_k": by_k}, {"k": ks[0], "temperature": temperature, "standardise": standardise}


def _linear(
    known: FeatureSet, asked: FeatureSet, c_grid: Sequence[float], seed: int
) -> tuple[NDArray[np.bool_], dict[str, Any], dict[str, Any]]:
    found = linear_probe(known.features, known.labels, asked.features, asked.labels, grid=c_grid, seed=seed)
    sweep = {str(c): value for c, value in found.sweep.items()}
    extra = {"sweep": sweep, "chosen_c": found.chosen_c, "converged": found.converged}
    return found.correct, extra, {"c_grid": list(c_grid)}


def write_json(results: dict[str, dict[str, Any]], file: str) -> None:
    """One result as it is; several under their methods' names."""
    content = next(iter(results.values())) if len(results) == 1 else results
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def append_csv(results: dict[str, dict[str, Any]], file: str) -> None:
    """One line a method; the column names first when the file is new."""
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    with open(path, "a", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, CSV_COLUMNS)
        if new:
            writer.writeheader()
        for result in results.values():
            used = result["settings"]["extractor"]
            writer.writerow(
                {
                    **{key: result[key] for key in ("method", "backbone", "train_images", "test_images")},
                    "checkpoint": used.get("weights"),
                    "block": used.get("block"),
                    "image_size": result["settings"]["image_size"],
                    "top1": f"{result['top1']:.2f}",
                    "ci95_low": f"{result['ci95'][0]:.2f}",
                    "ci95_high": f"{result['ci95'][1]:.2f}",
                }
            )


def table_of(results: dict[str, dict[str, Any]]) -> Table:
    first = next(iter(results.values()))
    table = Table(title=f"{escape(first['backbone'])}: {first['train_images']} training, {first['test_images']} test images")
    for column in ("method", "top-1 %", "95 % interval", "worst class", "setting"):
        table.add_column(column)
    for method, result in results.items():
        worst = min(result["per_class"], key=result["per_class"].get)
        if method == "knn":
            setting = ", ".join(f"k={k}: {value:.1f}" for k, value in result["top1_by_k"].items())
        else:
            setting = f"C={result['chosen_c']:g}" + ("" if result["converged"] else ", not converged")
        table.add_row(
            method,
            f"{result['top1']:.1f}",
            "{:.1f} .. {:.1f}".format(*result["ci95"]),
            f"{escape(worst)} {result['per_class'][worst]:.1f}",
            setting,
        )
    return table


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+", choices=METHODS, help="one or both; features are extracted once")
    parser.add_argument("--backbone", required=True, help="checkpoint .pth, export folder, timm name or mae:FILE")
    parser.add_argument("--train", required=True, help="folder of training images, one sub-folder a class")
    parser.add_argument("--test", required=True, help="folder of test images with the same sub-folders")
    parser.add_argument("--checkpoint", help="weight file for a timm name, loaded strictly")
    parser.add_argument("--block", type=int, help="ViT: block whose patch tokens are averaged, 0 = first; default last")
    parser.add_argument("--pretrained", action="store_true", help="let timm download its weights")
    parser.add_argument("--image-size", type=int, default=224, help="pixels of the centre crop")
    parser.add_argument("--limit-per-class", type=int, help="training images of a class, all by default")
    parser.add_argument("--test-limit-per-class", type=int, help="test images of a class, all by default")
    parser.add_argument("--k", type=int, nargs="+", default=[20], dest="ks", help="neighbours; top1 is the first's")
    parser.add_argument("--temperature", type=float, default=0.07, help="k-NN: the smaller, the more the nearest counts")
    parser.add_argument("--no-standardise", action="store_false", dest="standardise", help="k-NN on features as they are")
    parser.add_argument("--c-grid", type=float, nargs="+", default=list(DEFAULT_GRID), help="linear probe: values of C")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2, help="processes that read images")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--seed", type=int, default=0, help="random weights, held-out images, bootstrap")
    parser.add_argument("--json", help="file to write the results to")
    parser.add_argument("--csv", help="file to append one line a method to")
    args = parser.parse_args(argv)
    args.methods = list(dict.fromkeys(args.methods))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = vars(parse_args(argv))
    json_file, csv_file = args.pop("json"), args.pop("csv")
    try:
        results = evaluate(**args)
    except USER_ERRORS as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 2
    if json_file:
        write_json(results, json_file)
    if csv_file:
        append_csv(results, csv_file)
    Console().print(table_of(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
