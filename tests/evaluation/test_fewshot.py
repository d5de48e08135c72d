"""Few-shot classification against scikit-learn's nearest centroid, its draws, and what it refuses."""

import numpy as np
import pytest
import torch
from refusals import refused
from sklearn.neighbors import NearestCentroid
from torch import Tensor

from hgkd.evaluation import few_shot


def clusters(per_class: int, seed: int, spread: float = 2.0, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(classes, 6, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(classes).repeat(per_class)
    return centres[labels] + spread * torch.randn(len(labels), 6, generator=generator), labels


def test_all_images_as_shots_is_the_nearest_centroid() -> None:
    (x, y), (x_test, y_test) = clusters(12, 1), clusters(25, 2)
    mean, std = x.double().mean(0), x.double().std(0, unbiased=False)
    known, asked = ((f.double() - mean) / std for f in (x, x_test))
    known, asked = (f / f.norm(dim=1, keepdim=True) for f in (known, asked))
    expected = NearestCentroid().fit(known.numpy(), y.numpy()).predict(asked.numpy()) == y_test.numpy()
    found = few_shot(x, y, x_test, y_test, shots=[12], draws=2)[12]
    assert found.shape == (2, 100)
    assert (found == expected).all()  # whatever the draw
    assert 0.3 < expected.mean() < 1.0


def test_one_shot_by_hand() -> None:
    # one image a class: the nearest of the two, by angle from the mean
    x = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    test = torch.tensor([[0.1, 0.8], [0.9, 0.3], [0.4, 0.6]])
    found = few_shot(x, torch.tensor([5, 7]), test, torch.tensor([5, 7, 7]), shots=[1], draws=3)[1]
    assert found.tolist() == [[True, True, False]] * 3


def test_draws_follow_the_seed_and_more_shots_help() -> None:
    data = (*clusters(40, 3, spread=3.0), *clusters(60, 4, spread=3.0))
    first, again, other = (few_shot(*data, shots=(1, 5, 10), draws=8, seed=seed) for seed in (0, 0, 1))
    for count in (1, 5, 10):
        assert np.array_equal(first[count], again[count])
    assert not np.array_equal(first[1], other[1])
    accuracy = {count: rows.mean() for count, rows in first.items()}
    assert accuracy[1] < accuracy[5] < accuracy[10]
    std = {count: rows.mean(axis=1).std() for count, rows in first.items()}
    assert std[10] < std[1]
    # a number of shots alone is drawn as beside others
    assert np.array_equal(few_shot(*data, shots=(5,), draws=8)[5], first[5])


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"shots": (1, 5)}, ("shots-out-of-range", "1 .. 3", "[1, 5]")),
        ({"shots": (0,)}, ("shots-out-of-range", "1 .. 3")),
        ({"shots": (1,), "draws": 1}, ("too-few-draws", "2")),
    ],
)
def test_refusals(options: dict, refusal: tuple[str, ...]) -> None:
    with refused(ValueError, *refusal):
        few_shot(*clusters(3, 0), *clusters(3, 1), **options)


def test_one_class_and_broken_features_are_refused() -> None:
    x, y = clusters(3, 0)
    with refused(ValueError, "too-few-classes", "1"):
        few_shot(x, torch.zeros_like(y), x, y)
    broken = x.clone()
    broken[0, 0] = float("inf")
    with refused(ValueError, "features-not-finite"):
        few_shot(x, y, broken, y)
    with refused(ValueError, "probe-features-shape"):
        few_shot(x, y, x[:, :3], y)
