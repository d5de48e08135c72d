"""Measure a backbone on labelled images: k-NN, linear probe, few-shot, fine-tuning."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray

from hgkd.api.train import train as launch
from hgkd.data import LabelledImages
from hgkd.data.images import shared_images
from hgkd.data.sources import is_source
from hgkd.errors import DataError, InvalidValueError, unknown_name_message
from hgkd.evaluation import FeatureExtractor, FeatureSet, extract, few_shot, linear_probe, load_extractor
from hgkd.evaluation.fewshot import DEFAULT_SHOTS, check_shots
from hgkd.evaluation.knn import knn_predictions
from hgkd.evaluation.linear import DEFAULT_GRID
from hgkd.evaluation.records import CLASSIFIER, make_result
from hgkd.weights.files import reading_once

METHODS = ("knn", "linear", "fewshot", "finetune")
RECIPE = "downstream/classification/resnet18_10e_cifar128"  # for any network
# ends of config keys that say which images there are: a network would be tuned for others than it is tested on
_OF_IMAGES = frozenset({"data_root", "list_file", "image_size", "value_range", "in_chans", "num_classes", "limit_per_class"})


@reading_once()  # fine-tuning starts from the file that the features were extracted with
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
    shots: Sequence[int] = DEFAULT_SHOTS,
    draws: int = 10,
    finetune_options: Mapping[str, Any] | None = None,
    data_root: str | None = None,
    value_range: Sequence[float] | None = None,
    batch_size: int = 64,
    workers: int = 2,
    device: str = "auto",
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Extract the features once and run every method of ``methods`` on them; fine-tuning starts from the same weights.

    Args:
        methods: of 'knn', 'linear', 'fewshot', 'finetune'.
        backbone, checkpoint, block, pretrained: see ``hgkd.evaluation.load_extractor``.
        train, test: folders with the same class folders, lists, or Parquet and Arrow files (see ``hgkd.data.LabelledImages``)
            with the same classes.
        ks: neighbours; ``top1`` is that of the first.
        shots, draws: see ``hgkd.evaluation.few_shot``; ``top1`` is that of the first number.
        finetune_options: config options of the recipe, e.g. epochs, lr, batch_size; student where a MAE file is fine-tuned.
            Which images there are, and their size, the arguments above say.
        data_root: folder below which the paths of lists are; None: each list's own.
        value_range: (low, high), the values of black and white in images of more than 8 bits.
        seed: of random weights, the held-out images, the draws and the bootstrap.

    Returns:
        method -> result, as ``--json`` writes it, see ``hgkd.evaluation.records``. k-NN, linear probe and fine-tuning add
        ``predicted``, the class index of every test image (of the first k); the linear probe ``sweep`` (C -> percent on
        held-out training images), ``chosen_c`` and ``converged``.

    Raises:
        ValueError: a method that does not exist, or ``methods`` is one text; something in the other arguments is wrong.
    """
    check_methods(methods)
    check_finetune_options(finetune_options)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    extractor = load_extractor(backbone, checkpoint, block, pretrained=pretrained, seed=seed)
    in_chans = extractor.reads_channels
    bank = _labelled(train, data_root, image_size, limit_per_class, value_range, in_chans)
    queries = _labelled(test, data_root, image_size, test_limit_per_class, value_range, in_chans)
    if list(bank.classes) != list(queries.classes):
        only = sorted(set(bank.classes) ^ set(queries.classes))
        raise DataError(
            "test-classes-differ", f"{train} and {test} must have the same classes; {only[:5]} are in one of them only"
        )
    if "knn" in methods and not 1 <= min(ks) <= max(ks) <= len(bank):
        raise InvalidValueError(
            "neighbours-out-of-range", f"k must lie in 1 .. {len(bank)}, the number of training images, got {list(ks)}"
        )

    both = shared_images(bank, queries)
    if both:
        told = f"{both} of the {len(queries)} test images are training images, too, so the results are too good"
        print(f"evaluate: warning: {told}", file=sys.stderr)

    if "fewshot" in methods:
        check_shots(shots, bank.labels)

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
        elif method == "linear":
            correct, extra, settings = _linear(known, asked, c_grid, seed)
        elif method == "fewshot":
            correct, extra, settings = _few_shot(known, asked, shots, draws, seed)
        else:
            root, list_file = _root_and_list(train, data_root)
            data = {"limit_per_class": limit_per_class, **({} if list_file is None else {"list_file": list_file})}
            options = {"data_root": root, "image_size": image_size, "workers": workers, "seed": seed}
            options["value_range"] = bank.value_range
            if in_chans is not None:
                network: Any = getattr(extractor, "teacher", extractor)
                options["in_chans"] = in_chans
                options["model.classifier.normalize"] = [network.mean.flatten().tolist(), network.std.flatten().tolist()]
                options["train_dataloader.dataset.transform"] = {"kind": "train", "scale": [0.35, 1.0]}  # timm's is for RGB
            options |= {f"train_dataloader.dataset.{key}": value for key, value in data.items()}
            model = fine_tune(extractor, len(bank.classes), {**options, **(finetune_options or {})})
            predictions = extract(model, queries, batch_size, workers, device)
            correct, extra, settings = _fine_tuned(predictions, model.settings["epochs"], finetune_options or {})
        results[method] = make_result(
            method,
            backbone,
            correct,
            queries,
            asked.indices.tolist(),
            len(known.labels),
            {**shared, **settings},
            seed,
            **extra,
        )
    return results


def check_methods(methods: Sequence[str]) -> None:
    """Refuse names that are not in ``METHODS``.

    Raises:
        ValueError: names the first of them, or one text was given instead of a list.
    """
    if isinstance(methods, str):  # its letters would be the methods
        raise InvalidValueError("methods-not-a-list", f"methods={methods!r} is one text, expected a list; write [{methods!r}]")
    for method in methods:
        if method not in METHODS:
            raise InvalidValueError("method-unknown", unknown_name_message("method", method, METHODS))


def check_finetune_options(options: Mapping[str, Any] | None) -> None:
    """Refuse options that would tune a network for other images, or another size, than it is tested on.

    Raises:
        ValueError: names the first of them.
    """
    for key, value in (options or {}).items():
        if key.rpartition(".")[2] in _OF_IMAGES:
            raise InvalidValueError(
                "finetune-option-of-images",
                f"finetune_options has {key}={value!r}, but the fine-tuned network is tested on the images of the evaluation: "
                "leave it out, and set train, image_size, value_range and limit_per_class of the evaluation itself "
                "(--train, --image-size, ...)",
            )


class FineTuned(FeatureExtractor):
    """A fine-tuned classifier; its feature is the logits."""

    def __init__(self, classifier: Any, epochs: int) -> None:
        super().__init__("classifier", {"name": classifier.spec.name, "epochs": epochs})
        self.classifier = classifier

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classifier.predict(self.classifier.normalise(images))
        return logits


def fine_tune(extractor: FeatureExtractor, num_classes: int, options: Mapping[str, Any]) -> FineTuned:
    """Let hgkd train fine-tune the extractor's network from its weights by ``RECIPE``, in a temporary folder.

    Raises:
        ValueError: a MAE file without ``student``, the timm name of its network.
    """
    name, weights, stem = (extractor.settings.get(key) for key in ("name", "weights", "stem"))
    if name == "mae" and "student" not in options:
        raise InvalidValueError(
            "network-name-missing",
            "a MAE file does not say its network's timm name; give it, e.g. --finetune-options student=vit_tiny_patch16_224",
        )
    start: dict[str, Any] = {"student": name, "num_classes": num_classes, "val_root": None}
    start["default_hooks.checkpoint.save_best"] = None
    if stem:
        start["model.classifier.stem"] = stem
    kwargs: Mapping[str, Any] = extractor.settings.get("kwargs") or {}
    start |= {f"model.classifier.{key}": value for key, value in kwargs.items() if key != "drop_path_rate"}
    with tempfile.TemporaryDirectory(prefix="hgkd-finetune-") as folder:
        if weights == "timm":  # downloaded by timm
            weights = f"{folder}/timm.pth"
            torch.save(timm.create_model(str(name), pretrained=True).state_dict(), weights)
        start["backbone"] = None if str(weights).startswith("random") else weights
        runner = launch(RECIPE, f"{folder}/run", options={**start, **options})
        return FineTuned(runner.model.classifier, runner.max_epochs)


def _root_and_list(source: str, data_root: str | None) -> tuple[str, str | None]:
    """``data_root`` and ``list_file`` of a data set that a user has named by one word."""
    if is_source(source) or not Path(source).expanduser().is_file():
        return source, None
    return (str(Path(source).expanduser().parent) if data_root is None else data_root), source


def _labelled(
    source: str,
    data_root: str | None,
    image_size: int,
    limit_per_class: int | None,
    value_range: Sequence[float] | None,
    in_chans: int | None,
) -> LabelledImages:
    root, list_file = _root_and_list(source, data_root)
    return LabelledImages(
        root, image_size, limit_per_class=limit_per_class, list_file=list_file, value_range=value_range, in_chans=in_chans
    )


_Found = tuple[dict[str, NDArray[np.bool_]], dict[str, Any], dict[str, Any]]
"""Setting -> whether each test image is right (draws, N); further entries of the result; entries of its settings."""


def _knn(known: FeatureSet, asked: FeatureSet, ks: Sequence[int], temperature: float, standardise: bool) -> _Found:
    predicted = knn_predictions(
        known.features, known.labels, asked.features, ks=ks, temperature=temperature, standardise=standardise
    )
    correct = {f"k={k}": (labels == asked.labels).numpy()[None] for k, labels in predicted.items()}
    extra = {"predicted": predicted[ks[0]].tolist()}
    return correct, extra, {"temperature": temperature, "standardise": standardise}


def _linear(known: FeatureSet, asked: FeatureSet, c_grid: Sequence[float], seed: int) -> _Found:
    found = linear_probe(known.features, known.labels, asked.features, asked.labels, grid=c_grid, seed=seed)
    sweep = {str(c): value for c, value in found.sweep.items()}
    extra = {"predicted": found.predictions.tolist(), "sweep": sweep, "chosen_c": found.chosen_c, "converged": found.converged}
    return {"C by sweep" if sweep else f"C={found.chosen_c:g}": found.correct[None]}, extra, {"c_grid": list(c_grid)}


def _few_shot(known: FeatureSet, asked: FeatureSet, shots: Sequence[int], draws: int, seed: int) -> _Found:
    correct = few_shot(known.features, known.labels, asked.features, asked.labels, shots, draws, seed)
    return {f"{count} a class": drawn for count, drawn in correct.items()}, {}, {"draws": draws}


def _fine_tuned(logits: FeatureSet, epochs: int, options: Mapping[str, Any]) -> _Found:
    broken = int((~logits.features.isfinite()).any(dim=1).sum())
    if broken:
        raise InvalidValueError(
            "logits-not-finite",
            f"the fine-tuned network gives NaN or infinite logits for {broken} of {len(logits.features)} test images: it has "
            "diverged; lower the rate, e.g. --finetune-options lr=1e-4",
        )
    predicted = logits.features.argmax(1)
    correct = {CLASSIFIER: (predicted == logits.labels).numpy()[None]}
    return correct, {"predicted": predicted.tolist()}, {"epochs": epochs, "finetune_options": dict(options)}
