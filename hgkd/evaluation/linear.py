"""Linear probe of frozen features: multinomial logistic regression on standardised features, fitted by L-BFGS (scikit-learn).

As in Kornblith et al., "Do Better ImageNet Models Transfer Better?" (arXiv 1805.08974), with the regularisation chosen on a
held-out part of the training images, never on the test images. Small problems are fitted by one thread: with more, the thread
pools of torch, BLAS and scikit-learn wait for one another (measured: 28 s instead of 0.7 s, docs/howto/evaluation.md).
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor

from hgkd.errors import InvalidValueError
from hgkd.evaluation.accuracy import per_class_accuracy, percent
from hgkd.features import channel_statistics

DEFAULT_GRID = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
_WORK_OF_A_THREAD = 2**26  # multiplications in one pass over the features that are worth a thread


@dataclass
class LinearResult:
    """Result of a linear probe.

    Attributes:
        predictions: predicted class of every test image (N,).
        correct: whether it is right (N,), bool.
        top1: share of right ones in percent.
        per_class: class index -> percent, classes of the test images only.
        chosen_c: scikit-learn's C (inverse strength of the L2 penalty) of the final fit.
        sweep: C -> accuracy in percent on the held-out part of the training images.
        converged: whether L-BFGS converged in the final fit.
    """

    predictions: NDArray[np.int64]
    correct: NDArray[np.bool_]
    top1: float
    per_class: dict[int, float]
    chosen_c: float
    sweep: dict[float, float] = field(default_factory=dict)
    converged: bool = True


def linear_probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    grid: Sequence[float] = DEFAULT_GRID,
    holdout: float = 0.2,
    seed: int = 0,
    max_iter: int = 1000,
) -> LinearResult:
    """Fit a linear classifier on the training features and measure it on the test features.

    Args:
        train, test: features (N, C); both are standardised with the mean and std of ``train``.
        train_labels, test_labels: classes (N,).
        grid: candidates of C. The best on the held-out part wins, the smallest (strongest penalty) among equals; the
            final fit then uses all training images. A single candidate is taken as it is.
        holdout: share of every class's training images that is held out, at least one of each class with two or more.
        seed: of the choice of the held-out images.
        max_iter: limit of L-BFGS steps a fit.

    Raises:
        ValueError: fewer than two classes, no class with two images, NaN features, or a bad grid or share.
    """
    x, y = train.double().cpu(), train_labels.cpu().numpy()
    x_test, y_test = test.double().cpu(), test_labels.cpu().numpy()
    _check(x, y, x_test, y_test, grid, holdout)
    mean, std = channel_statistics(x)
    features = ((x - mean) / std).numpy()
    test_features = ((x_test - mean) / std).numpy()

    threads = min(os.cpu_count() or 1, max(1, features.size * len(np.unique(y)) // _WORK_OF_A_THREAD))

    sweep: dict[float, float] = {}
    chosen = grid[0]
    with threadpool_limits(threads):
        if len(grid) > 1:
            held = _held_out(y, holdout, seed)
            for c in sorted(grid):
                model, _ = _fit(features[~held], y[~held], c, max_iter)
                sweep[c] = percent(model.predict(features[held]) == y[held])
            chosen = max(sweep, key=lambda c: sweep[c])  # the first of equals: the smallest C
        model, converged = _fit(features, y, chosen, max_iter)
        predictions = np.asarray(model.predict(test_features), dtype=np.int64)
    correct = predictions == y_test
    return LinearResult(
        predictions=predictions,
        correct=correct,
        top1=percent(correct),
        per_class=per_class_accuracy(correct, y_test),
        chosen_c=float(chosen),
        sweep=sweep,
        converged=converged,
    )


def _check(
    x: Tensor, y: NDArray[np.int64], x_test: Tensor, y_test: NDArray[np.int64], grid: Sequence[float], holdout: float
) -> None:
    shapes_fit = x.ndim == x_test.ndim == 2 and x.shape[1] == x_test.shape[1]
    if not shapes_fit or len(x) != len(y) or len(x_test) != len(y_test) or len(y_test) == 0:
        raise InvalidValueError(
            "probe-features-shape",
            f"expected features (N, C) with labels (N,), got training {tuple(x.shape)} with {y.shape} "
            f"and test {tuple(x_test.shape)} with {y_test.shape}",
        )
    if not (x.isfinite().all() and x_test.isfinite().all()):
        raise InvalidValueError(
            "features-not-finite", "some features are NaN or infinite; the network has diverged or its weights are damaged"
        )
    if not grid or not all(0 < c < math.inf for c in grid):
        raise InvalidValueError(
            "probe-costs-not-positive", f"the candidates of C must be above 0, got {list(grid)}; the default is {DEFAULT_GRID}"
        )
    if not 0 < holdout < 1:
        raise InvalidValueError(
            "probe-holdout-out-of-range", f"holdout is the share of training images that chooses C, in (0, 1), got {holdout}"
        )
    classes, counts = np.unique(y, return_counts=True)
    if len(classes) < 2:
        raise InvalidValueError(
            "too-few-classes", f"a linear probe needs training images of two classes or more, got {len(classes)}"
        )
    if len(grid) > 1 and counts.max() < 2:
        raise InvalidValueError(
            "no-image-to-hold-out",
            "every class has a single training image, so none can be held out to choose C; "
            "give more images a class, or one value of C",
        )


def _held_out(labels: NDArray[np.int64], share: float, seed: int) -> NDArray[np.bool_]:
    """Which training images choose C (N,), bool; every class keeps at least one image to train on."""
    rng = np.random.default_rng(seed)
    held = np.zeros(len(labels), dtype=bool)
    for c in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == c))
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held[members[:count]] = True
    return held


def _fit(features: NDArray[np.float64], labels: NDArray[np.int64], c: float, max_iter: int) -> tuple[LogisticRegression, bool]:
    model = LogisticRegression(C=c, solver="lbfgs", max_iter=max_iter)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(features, labels)
    return model, not any(issubclass(w.category, ConvergenceWarning) for w in caught)
