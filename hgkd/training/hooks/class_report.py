"""Checks of classes before a classifier is trained, and reports after a validation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from mmengine.dataset import BaseDataset
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.runner import BaseLoop, Runner
from torch.utils.data import DataLoader

from hgkd.errors import InvalidValueError
from hgkd.evaluation.classification import ClassificationMetric
from hgkd.pictures.confusion import write_class_report
from hgkd.registry import HOOKS
from hgkd.training.wrapping import plain_model
from hgkd.weights.identify import hgkd_of


@HOOKS.register_module()
class ClassReportHook(Hook):
    """Compares the classes of images, model and teacher, and writes ``work_dir/per_class.json`` and ``confusion.png``.

    Both are of the last validation, or of a test. A test's classes, and those of a
    training that is resumed, are compared with those that the checkpoint names.
    """

    priority = "VERY_HIGH"  # what does not fit is told before anything else starts

    def __init__(self) -> None:
        self._in_file: Sequence[str] = ()

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        self._in_file = (hgkd_of(checkpoint).get("classifier") or {}).get("classes") or ()

    def before_train(self, runner: Runner) -> None:
        model = plain_model(runner)
        classes = _classes(runner.train_dataloader)
        model.set_classes(classes)
        model.check_heads()
        if self._in_file and runner._resume:
            _compare("the training images", classes, "the checkpoint", self._in_file)
        if runner.val_loop is not None:
            _compare("the validation images", _classes(runner.val_dataloader), "the training images", classes)

    def before_test(self, runner: Runner) -> None:
        model = plain_model(runner)
        classes = _classes(runner.test_dataloader)
        if self._in_file:
            _compare("the test images", classes, "the checkpoint", self._in_file)
        model.set_classes(classes)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self._write(runner, runner.val_loop)

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self._write(runner, runner.test_loop)

    @master_only
    def _write(self, runner: Runner, loop: BaseLoop) -> None:
        model = plain_model(runner)
        for metric in loop.evaluator.metrics:
            if isinstance(metric, ClassificationMetric) and metric.confusion is not None:
                write_class_report(Path(runner.work_dir), metric.confusion, model.classifier.spec.classes)


def _classes(loader: DataLoader[Any]) -> Sequence[str]:
    return tuple(cast(BaseDataset, loader.dataset).metainfo["classes"])


def _compare(what: str, found: Sequence[str], other: str, expected: Sequence[str]) -> None:
    if tuple(found) != tuple(expected):
        differ = sorted(set(found) ^ set(expected))[:5]
        raise InvalidValueError(
            "report-classes-differ",
            f"the classes of {what} ({len(found)}) are not those of {other} ({len(expected)}), e.g. {', '.join(differ)}; the "
            "folders must have the same names",
        )
