"""Accuracy per class, its bootstrap interval, and paired tests between two runs.

Interval: Efron's percentile bootstrap ("Bootstrap methods: another look at the jackknife", Annals of Statistics 1979).
Paired test: McNemar's, exact (McNemar, Psychometrika 1947): of the images on which two runs differ, how many each has right.

Both speak about another draw of *test images*. What another training seed would change they do not know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hgkd.errors import InvalidValueError


def percent(correct: NDArray[Any]) -> float:
    """Share of right predictions (N,), bool or shares in [0, 1], in percent."""
    return 100.0 * float(correct.sum()) / correct.size


def per_class_accuracy(correct: NDArray[Any], labels: NDArray[np.int64]) -> dict[int, float]:
    """Class index -> percent of its images that are right, for the classes that occur in ``labels``."""
    return {int(c): percent(correct[labels == c]) for c in np.unique(labels)}


def bootstrap_interval(correct: NDArray[Any], seed: int = 0, n: int = 2000, level: float = 0.95) -> tuple[float, float]:
    """Percentile-bootstrap interval of an accuracy, in percent.

    With every prediction right (or wrong) no resampling can differ, and the interval is a point.

    Args:
        correct: whether each test image was classified rightly (N,), bool; or in what share of several draws, in [0, 1].
        seed: of the resampling.
        n: number of resampled test sets.
        level: share of them inside the interval.

    Raises:
        ValueError: no images, or not one value each.
    """
    values = np.asarray(correct, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise InvalidValueError(
            "outcomes-empty", f"expected one bool for each of 1 or more test images, got shape {values.shape}"
        )
    low, high = np.percentile(100.0 * _resampled_means(values, seed, n), [50.0 * (1.0 - level), 50.0 * (1.0 + level)])
    return float(low), float(high)


def _resampled_means(values: NDArray[np.float64], seed: int, n: int) -> NDArray[np.float64]:
    """Means (n,) of n draws of N from N values, with replacement.

    Only how often each distinct value is drawn matters, which is multinomial: no index needs to be drawn.
    """
    distinct, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(values.size, counts / values.size, size=n)
    means: NDArray[np.float64] = drawn @ distinct / values.size
    return means


@dataclass(frozen=True)
class PairedTest:
    """How two runs differ on the same test images.

    Attributes:
        difference: accuracy of the first minus that of the second, in points.
        ci95: bootstrap interval of it; images are drawn in pairs.
        first_only: images that the first has right and the second wrong (with shares: right more often).
        second_only: the other way round.
        p_value: two-sided, of the exact McNemar test: were both equally good, how often would ``first_only`` and
            ``second_only`` be at least so unequal.
    """

    difference: float
    ci95: tuple[float, float]
    first_only: int
    second_only: int
    p_value: float


def paired_test(first: NDArray[Any], second: NDArray[Any], seed: int = 0) -> PairedTest:
    """Compare two runs image by image.

    Args:
        first, second: whether each test image was classified rightly (N,), bool or shares in [0, 1] as in
            :func:`bootstrap_interval`, both in the same order. With shares the test is the sign test, which McNemar's is
            with bools.
        seed: of the bootstrap.

    Raises:
        ValueError: different numbers of images, or none.
    """
    from scipy.stats import binomtest  # takes a second to import

    a, b = (np.asarray(values, dtype=np.float64) for values in (first, second))
    if a.shape != b.shape or a.ndim != 1 or a.size == 0:
        raise InvalidValueError(
            "paired-images-differ", f"a paired test needs the same test images of both runs, got shapes {a.shape} and {b.shape}"
        )
    gain = a - b
    first_only, second_only = int((gain > 0).sum()), int((gain < 0).sum())
    unequal = first_only + second_only
    low, high = bootstrap_interval(gain, seed)
    p_value = float(binomtest(first_only, unequal).pvalue) if unequal else 1.0
    return PairedTest(percent(gain), (low, high), first_only, second_only, p_value)
