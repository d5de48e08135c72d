"""Linear probe on data with a known answer, choice of C, bootstrap intervals."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from hgkd.evaluation import bootstrap_interval, linear_probe
from hgkd.evaluation.linear import per_class_accuracy


def blobs(per_class: int, spread: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.tensor([[10.0, 0, 0], [0, 10, 0], [0, 0, 10], [10, 10, 10]])
    labels = torch.arange(4).repeat_interleave(per_class)
    return centres[labels] + spread * torch.randn(len(labels), 3, generator=generator), labels


def test_separable_data_is_learnt_whole() -> None:
    result = linear_probe(*blobs(20, 0.5, 1), *blobs(10, 0.5, 2))
    assert result.top1 == 100.0
    assert result.per_class == {0: 100.0, 1: 100.0, 2: 100.0, 3: 100.0}
    assert result.converged
    assert result.correct.shape == (40,)


def test_final_fit_is_scikit_learns_on_all_training_images() -> None:
    (x, y), (x_test, y_test) = blobs(15, 6.0, 3), blobs(25, 6.0, 4)
    result = linear_probe(x, y, x_test, y_test)
    mean, std = x.double().mean(0), x.double().std(0, unbiased=False)
    plain = LogisticRegression(C=result.chosen_c, max_iter=1000).fit(((x.double() - mean) / std).numpy(), y.numpy())
    expected = plain.predict(((x_test.double() - mean) / std).numpy())
    assert (result.predictions == expected).all()
    assert 30 < result.top1 < 100  # overlapping classes: neither blind nor perfect
    assert result.top1 == pytest.approx(100 * (expected == y_test.numpy()).mean())


def test_c_comes_from_training_images_only() -> None:
    (x, y), (x_test, y_test) = blobs(15, 6.0, 3), blobs(10, 6.0, 4)
    first = linear_probe(x, y, x_test, y_test)
    shuffled = linear_probe(x, y, x_test.flip(0), y_test)
    assert sorted(first.sweep) == [1e-3, 1e-2, 1e-1, 1.0, 10.0]
    assert first.sweep == shuffled.sweep
    best = max(first.sweep.values())
    assert first.chosen_c == min(c for c, accuracy in first.sweep.items() if accuracy == best)


def test_noise_wants_a_strong_penalty() -> None:
    # one channel tells the class, 60 are noise: with 32 images a weak penalty overfits
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(n) % 2
        noise = torch.randn(n, 60, generator=generator)
        return torch.cat([(labels * 2.0 - 1)[:, None] + 0.8 * torch.randn(n, 1, generator=generator), noise], 1), labels

    train, test = draw(32), draw(400)
    chosen = linear_probe(*train, *test)
    assert chosen.chosen_c < 10
    assert chosen.top1 >= linear_probe(*train, *test, grid=[1e4]).top1


def test_short_fit_is_reported_as_not_converged() -> None:
    assert not linear_probe(*blobs(20, 5.0, 1), *blobs(5, 5.0, 2), grid=[10.0], max_iter=1).converged


def test_per_class_accuracy() -> None:
    correct, labels = np.array([True, False, True, True]), np.array([0, 0, 2, 2])
    assert per_class_accuracy(correct, labels) == {0: 50.0, 2: 100.0}


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([1, 1, 1, 1], {}, "two classes or more, got 1"),
        ([0, 1, 2, 3], {}, "none can be held out"),
        ([0, 0, 1, 1], {"grid": [0.0, 1.0]}, "must be above 0"),
        ([0, 0, 1, 1], {"holdout": 1.0}, "in \\(0, 1\\), got 1.0"),
        ([0, 0, 1], {}, "expected features"),
    ],
)
def test_refusals(labels: list[int], options: dict, message: str) -> None:
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match=message):
        linear_probe(x, torch.tensor(labels), x, torch.zeros(4), **options)


def test_nan_features_are_refused() -> None:
    x, y = blobs(3, 1.0, 0)
    broken = x.clone()
    broken[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite"):
        linear_probe(broken, y, x, y)


def test_bootstrap_matches_the_normal_approximation() -> None:
    correct = np.arange(1000) % 4 != 0  # 75 %
    low, high = bootstrap_interval(correct)
    half = 100 * 1.96 * np.sqrt(0.75 * 0.25 / 1000)
    assert low == pytest.approx(75 - half, abs=0.25)
    assert high == pytest.approx(75 + half, abs=0.25)
    assert (low, high) == bootstrap_interval(correct)
    assert (low, high) != bootstrap_interval(correct, seed=1)
    inner = bootstrap_interval(correct, level=0.5)
    assert low < inner[0] < 75 < inner[1] < high


def test_bootstrap_equals_drawing_images() -> None:
    correct = np.arange(60) % 3 != 0
    rng = np.random.default_rng(5)
    drawn = [100 * correct[rng.integers(0, 60, 60)].mean() for _ in range(4000)]
    low, high = bootstrap_interval(correct, n=20000)
    assert low == pytest.approx(np.percentile(drawn, 2.5), abs=2)
    assert high == pytest.approx(np.percentile(drawn, 97.5), abs=2)


def test_bootstrap_edges() -> None:
    assert bootstrap_interval(np.ones(9, dtype=bool)) == (100.0, 100.0)
    with pytest.raises(ValueError, match="1 or more test images"):
        bootstrap_interval(np.zeros(0, dtype=bool))
