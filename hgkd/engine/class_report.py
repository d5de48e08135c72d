"""What a run that trains a classifier checks before it starts, and leaves behind after a validation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.runner import Runner

from hgkd.engine.hooks import plain_model
from hgkd.evaluation.classification import ClassificationMetric, write_class_report
from hgkd.registry import HOOKS


@HOOKS.register_module()
class ClassReportHook(Hook):
    """Compares the classes of images, model and teacher, and writes ``work_dir/per_class.json`` and ``confusion.png``.

    Both are of the last validation, or of a test.
    """

    priority = "VERY_HIGH"  # what does not fit is told before anything else starts

    def before_train(self, runner: Runner) -> None:
        model: Any = plain_model(runner)
        classes = _classes(runner.train_dataloader)
        model.set_classes(classes)
        model.check_heads()
        if runner.val_loop is not None:
            _compare(_classes(runner.val_dataloader), classes, "validation")

    def before_test(self, runner: Runner) -> None:
        model: Any = plain_model(runner)
        model.set_classes(_classes(runner.test_dataloader))

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self._write(runner, runner.val_loop)

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self._write(runner, runner.test_loop)

    @master_only
    def _write(self, runner: Runner, loop: Any) -> None:
        model: Any = plain_model(runner)
        for metric in loop.evaluator.metrics:
            if isinstance(metric, ClassificationMetric) and metric.confusion is not None:
                write_class_report(Path(runner.work_dir), metric.confusion, model.classifier.spec.classes)


def _classes(loader: Any) -> Sequence[str]:
    return tuple(loader.dataset.metainfo["classes"])


def _compare(found: Sequence[str], expected: Sequence[str], what: str) -> None:
    if found != expected:
        differ = sorted(set(found) ^ set(expected))[:5]
        raise ValueError(
            f"the classes of the {what} images ({len(found)}) are not those of the training images ({len(expected)}), e.g. "
            f"{', '.join(differ)}; the folders must have the same names"
        )
