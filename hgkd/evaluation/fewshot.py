"""Few-shot classification of frozen features: the nearest class mean of a handful of labelled images.

Wang et al., "SimpleShot: Revisiting Nearest-Neighbor Classification for Few-Shot Learning" (arXiv 1911.04623): features are
centred and brought to length 1, a class is the mean of its images, and a query belongs to the nearest mean (Euclidean). There
is nothing to tune, which with one image a class could not be done honestly.

What differs: the centre is the mean of all training images instead of those of other classes, and channels are brought to
std 1 too, as in our k-NN. No label is needed for either.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hgkd.errors import InvalidValueError
from hgkd.features import channel_statistics

DEFAULT_SHOTS = (1, 5, 10)


def check_shots(shots: Sequence[int], labels: NDArray[np.int64]) -> None:
    """Refuse more shots than the smallest class has images.

    Raises:
        ValueError: so many, none, or fewer than one.
    """
    smallest = np.unique(labels, return_counts=True)[1].min()
    if not shots or min(shots) < 1 or max(shots) > smallest:
        raise InvalidValueError(
            "shots-out-of-range",
            f"shots must lie in 1 .. {smallest}, the number of training images of the smallest class, got {list(shots)}",
        )


def few_shot(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    shots: Sequence[int] = DEFAULT_SHOTS,
    draws: int = 10,
    seed: int = 0,
) -> dict[int, NDArray[np.bool_]]:
    """Whether each test image is classified rightly from few labelled ones, draw by draw.

    Args:
        train, test: features (N, C).
        train_labels, test_labels: classes (N,).
        shots: labelled images of each class. Within one draw, those of a smaller number are among those of a larger.
        draws: how often they are drawn.
        seed: of the draws.

    Returns:
        shots -> bool (draws, number of test images).

    Raises:
        ValueError: fewer than two classes, features that are not finite or do not fit, fewer than two draws, or more shots
            than the smallest class has images.
    """
    train, test = train.double().cpu(), test.double().cpu()
    labels, truth = train_labels.cpu().numpy(), test_labels.cpu().numpy()
    if train.ndim != 2 or test.ndim != 2 or train.shape[1] != test.shape[1] or not len(test):
        raise InvalidValueError(
            "probe-features-shape",
            f"expected features (N, C) of training and test, got {tuple(train.shape)} and {tuple(test.shape)}",
        )
    if not (train.isfinite().all() and test.isfinite().all()):
        raise InvalidValueError(
            "features-not-finite", "some features are NaN or infinite; the network has diverged or its weights are damaged"
        )
    classes = np.unique(labels)
    if len(classes) < 2:
        raise InvalidValueError(
            "too-few-classes", f"few-shot classification needs training images of two classes or more, got {len(classes)}"
        )
    if draws < 2:
        raise InvalidValueError("too-few-draws", f"draws must be 2 or more, else there is no std over them, got {draws}")
    check_shots(shots, labels)
    mean, std = channel_statistics(train)
    known, asked = (F.normalize((features - mean) / std, dim=1) for features in (train, test))

    rng = np.random.default_rng(seed)
    found: dict[int, list[NDArray[np.bool_]]] = {count: [] for count in shots}
    for _ in range(draws):
        order = [rng.permutation(np.flatnonzero(labels == c)) for c in classes]
        for count in found:
            means = torch.stack([known[members[:count]].mean(dim=0) for members in order])
            nearest = torch.cdist(asked, means).argmin(dim=1).numpy()
            found[count].append(classes[nearest] == truth)
    return {count: np.stack(rows) for count, rows in found.items()}
