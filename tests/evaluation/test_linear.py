"""Linear probe on data with a known answer, choice of C."""

import pytest
import torch
from refusals import refused
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_info, threadpool_limits

from hgkd.evaluation import linear_probe


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


@pytest.mark.parametrize(
    ("labels", "options", "refusal"),
    [
        ([1, 1, 1, 1], {}, ("too-few-classes", "1")),
        ([0, 1, 2, 3], {}, ("no-image-to-hold-out",)),
        ([0, 0, 1, 1], {"grid": [0.0, 1.0]}, ("probe-costs-not-positive", "0")),
        ([0, 0, 1, 1], {"grid": [1.0, float("nan")]}, ("probe-costs-not-positive", "0")),
        ([0, 0, 1, 1], {"holdout": 1.0}, ("probe-holdout-out-of-range", "(0, 1)", "1.0")),
        ([0, 0, 1], {}, ("probe-features-shape",)),
    ],
)
def test_refusals(labels: list[int], options: dict, refusal: tuple[str, ...]) -> None:
    x = torch.randn(4, 3)
    with refused(ValueError, *refusal):
        linear_probe(x, torch.tensor(labels), x, torch.zeros(4), **options)


def test_nan_features_are_refused() -> None:
    x, y = blobs(3, 1.0, 0)
    broken = x.clone()
    broken[0, 0] = float("nan")
    with refused(ValueError, "features-not-finite"):
        linear_probe(broken, y, x, y)


def test_threads_are_limited_while_fitting_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[int]] = []

    def threads() -> set[int]:
        return {pool["num_threads"] for pool in threadpool_info()}

    def fit(self: LogisticRegression, *data: object) -> LogisticRegression:
        seen.append(threads())
        return plain(self, *data)

    plain = LogisticRegression.fit
    monkeypatch.setattr(LogisticRegression, "fit", fit)
    with threadpool_limits(2):  # whatever OMP_NUM_THREADS says
        before = threads()
        linear_probe(*blobs(5, 0.5, 1), *blobs(5, 0.5, 2))
        assert threads() == before
    assert seen == [{1}] * 6  # five of the sweep, and the final one
