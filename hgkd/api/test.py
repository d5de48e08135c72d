"""Measure a trained classifier, detector or segmentor on its config's test images."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.runner import Runner

from hgkd.api.train import load_config
from hgkd.errors import InvalidValueError, MissingFileError, StoppedError
from hgkd.evaluation import ClassificationMetric
from hgkd.evaluation.records import CLASSIFIER, append_csv, check_outputs, make_result, write_json
from hgkd.openmmlab.config import drop_teacher, is_downstream
from hgkd.openmmlab.deployment import ExportedModel, is_exported_model
from hgkd.registry import build_runner
from hgkd.training.wrapping import plain_model
from hgkd.weights.run_folder import checkpoint_file, read_run_checkpoint
from hgkd.writing import written_beside


def run_test(
    config: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    work_dir: str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
    launcher: str = "none",
    json_file: str | os.PathLike[str] | None = None,
    csv_file: str | os.PathLike[str] | None = None,
) -> dict[str, float]:
    """Run the config's test loop on a checkpoint.

    Args:
        config, options, launcher: as for training.
        checkpoint: of that config's model; of a work folder the last; or an export of the whole model to a graph. Of a
            distilled detector or segmentor the student is measured, without its teacher.
        work_dir: folder for the log; None: a temporary one.
        json_file, csv_file: see the module's header; the CSV grows by a line, a classifier's only.

    Returns:
        name of a metric -> value, as the config's evaluator gives them (e.g. 'coco/bbox_mAP', 'mIoU').

    Raises:
        FileNotFoundError: no such checkpoint, or files of the data are missing.
        ValueError: the checkpoint is of another model, or the config has nothing to test.
        WriteError: the disk does not take a result.
        StoppedError: a detector without a single detection, of which mmdet measures nothing.
    """
    exported = is_exported_model(checkpoint)
    checkpoint = Path(checkpoint).expanduser() if exported else checkpoint_file(checkpoint)
    if not exported and not checkpoint.is_file():
        raise MissingFileError("checkpoint-missing", f"checkpoint does not exist: {checkpoint}")
    with tempfile.TemporaryDirectory(prefix="hgkd-test-") as folder:
        cfg = load_config(config, work_dir or folder, False, False, options, launcher)
        for part in ("dataloader", "cfg", "evaluator"):
            if cfg.get(f"test_{part}") is None:
                cfg[f"test_{part}"] = cfg.get(f"val_{part}")
        if cfg.test_evaluator is None:
            raise InvalidValueError(
                "no-test-evaluator",
                f"{config} has no test_evaluator; a classifier's takes its images with val_root (--cfg-options val_root=DIR); "
                "hgkd evaluate measures a backbone by its features",
            )
        if is_downstream(cfg):
            drop_teacher(cfg)
        # what only a training needs
        cfg.update(train_dataloader=None, train_cfg=None, optim_wrapper=None, param_scheduler=None)
        cfg.update(val_dataloader=None, val_cfg=None, val_evaluator=None)
        cfg.load_from = None if exported else str(checkpoint)
        classifier = cfg.model.type == "ClassifierTraining"
        if classifier:
            _without_teacher(cfg)
        elif csv_file is not None:
            raise InvalidValueError(
                "csv-needs-classifier", f"--csv={csv_file} takes classifiers; of a {cfg.model.type} write --json"
            )
        check_outputs(json_file, csv_file)
        if exported and not is_downstream(cfg):
            raise InvalidValueError(
                "exported-model-of-another-task", f"{checkpoint} is a detector or segmentor, {config} is no config of one"
            )
        runner = build_runner(cfg)
        if exported:
            runner.model = ExportedModel(checkpoint, cfg, runner.test_dataloader.dataset.metainfo["classes"])
        metrics = {name: float(value) for name, value in runner.test().items()}
    if not metrics:
        raise StoppedError(
            "nothing-detected",
            f"no metric: the model of {checkpoint} found nothing in any test image; look at some of them with "
            "'hgkd visualize predictions', and train for longer",
        )
    if not is_main_process():
        return metrics
    if not classifier:
        if json_file is not None:
            with written_beside(json_file) as beside:
                beside.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    elif json_file is not None or csv_file is not None:
        results = {"finetune": classifier_result(runner, checkpoint, metrics)}
        if json_file is not None:
            write_json(results, json_file)
        if csv_file is not None:
            append_csv(results, csv_file)
    return metrics


def _without_teacher(cfg: Config) -> None:
    """Leave out of a classifier's config what only its training needs, in place."""
    cfg.model.update(teacher=None, objectives=None, label_weight=1.0)
    cfg.model.classifier.update(backbone=None)


def classifier_result(runner: Runner, checkpoint: str | os.PathLike[str], metrics: Mapping[str, float]) -> dict[str, Any]:
    """The result of a tested classifier as :mod:`hgkd.evaluation.records` has it."""
    metric = next(part for part in runner.test_loop.evaluator.metrics if isinstance(part, ClassificationMetric))
    images = runner.test_dataloader.dataset
    indices, predicted = list(metric.predictions), list(metric.predictions.values())
    correct = np.asarray(predicted) == np.asarray(images.labels)[indices]
    model = plain_model(runner)
    spec = model.classifier.spec
    settings = {
        "image_size": spec.image_size,
        "train": None,  # the checkpoint does not say
        "test": images.data_root,
        "seed": 0,
        "epochs": read_run_checkpoint(checkpoint)["meta"]["epoch"],
        "extractor": {"kind": "classifier", "name": spec.name, "weights": os.fspath(checkpoint)},
    }
    extra: dict[str, Any] = {"predicted": predicted, "metrics": dict(metrics)}
    by_setting = {CLASSIFIER: correct[None]}
    return make_result("finetune", os.fspath(checkpoint), by_setting, images, indices, None, settings, **extra)
