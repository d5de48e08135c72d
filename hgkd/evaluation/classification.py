"""How often a classifier is right, and which classes it confuses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mmengine.evaluator import BaseMetric
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix

from hgkd.errors import InvalidValueError
from hgkd.evaluation.accuracy import bootstrap_interval
from hgkd.registry import METRICS
from hgkd.structures import ClassSample


@METRICS.register_module()
class ClassificationMetric(BaseMetric):
    """``accuracy/top1``, ``top5`` and ``mean_class`` (the mean over classes) in percent.

    ``accuracy/ci95_low`` and ``ci95_high`` are the 95 % bootstrap interval of ``top1`` over the images.
    With K < 5 classes ``top5`` is 100. An image that is met twice (in place of an unreadable one) counts once.

    Attributes:
        confusion: int64 (K, K) of the last evaluation, a row a right class, a column a prediction; only in the main process.
        predictions: of the last evaluation, place of an image in its data set -> class index; only in the main process.
    """

    default_prefix = "accuracy"

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.confusion: NDArray[np.int64] | None = None
        self.predictions: dict[int, int] = {}

    def process(self, data_batch: object, data_samples: Sequence[ClassSample]) -> None:
        """Keep each image's five best classes.

        Raises:
            ValueError: a score is NaN or infinite, so no class is the best.
        """
        for sample in data_samples:
            if not sample.scores.isfinite().all():
                raise InvalidValueError(
                    "scores-not-finite",
                    f"the scores of image {sample.index} are NaN or infinite, so it has no answer; the network has diverged or "
                    "its weights are damaged: use an earlier checkpoint",
                )
            best = sample.scores.topk(min(5, len(sample.scores))).indices.tolist()
            self.results.append((sample.index, sample.label, best, len(sample.scores)))

    def compute_metrics(self, results: list[tuple[int, int, list[int], int]]) -> dict[str, float]:
        rows = {index: (label, best) for index, label, best, _ in reversed(results)}
        labels = np.array([label for label, _ in rows.values()])
        predictions = np.array([best[0] for _, best in rows.values()])
        self.confusion = confusion_matrix(labels, predictions, labels=range(results[0][3]))
        self.predictions = dict(sorted((index, best[0]) for index, (_, best) in rows.items()))
        correct = labels == predictions
        low, high = bootstrap_interval(correct)
        among = np.mean([label in best for label, best in rows.values()])
        return {
            "top1": 100.0 * float(correct.mean()),
            "top5": 100.0 * float(among),
            "mean_class": float(np.nanmean(class_accuracy(self.confusion))),
            "ci95_low": low,
            "ci95_high": high,
        }


def class_accuracy(confusion: NDArray[np.int64]) -> NDArray[np.float64]:
    """Percent of each class's images that are right, (K,); nan for a class without images."""
    totals = confusion.sum(1)
    shares: NDArray[np.float64] = np.full(len(totals), np.nan)
    np.divide(100.0 * confusion.diagonal(), totals, out=shares, where=totals > 0)
    return shares
