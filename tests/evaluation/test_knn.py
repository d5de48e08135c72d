"""Weighted k-NN against values by hand and a plain loop; the metrics through mmengine's own Evaluator."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.evaluator import Evaluator
from refusals import refused
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from hgkd.evaluation import FeatureHealthMetric, FeatureSample, KNNMetric, knn_accuracy, knn_scores
from hgkd.evaluation.knn import knn_predictions, nearest_neighbours
from hgkd.features import effective_rank, feature_spread


def at(degrees: float, length: float = 1.0) -> list[float]:
    return [length * math.cos(math.radians(degrees)), length * math.sin(math.radians(degrees))]


def test_scores_by_hand() -> None:
    # neighbours of the query at 0 degrees: class 0 at cosine 1, class 1 twice at cosine 0.5; lengths must not matter
    bank = torch.tensor([at(0, 7.0), at(60), at(-60, 0.1), at(180)])
    labels = torch.tensor([0, 1, 1, 2])
    scores = knn_scores(bank, labels, torch.tensor([at(0, 3.0)]), k=3, temperature=0.5, standardise=False)
    near, far = math.exp(1 / 0.5), 2 * math.exp(0.5 / 0.5)
    expected = torch.tensor([[near / (near + far), far / (near + far), 0.0]])
    torch.testing.assert_close(scores, expected)


def test_weight_decides_against_majority_at_low_temperature() -> None:
    bank = torch.tensor([at(0), at(60), at(-60)])
    labels = torch.tensor([0, 1, 1])
    query, truth = torch.tensor([at(0)]), torch.tensor([0])
    # exp(1/T) > 2 exp(0.5/T) exactly when T < 0.5 / ln 2 = 0.72
    assert knn_accuracy(bank, labels, query, truth, ks=[3], temperature=0.7, standardise=False) == {3: 100.0}
    assert knn_accuracy(bank, labels, query, truth, ks=[3], temperature=0.75, standardise=False) == {3: 0.0}


def brute_force(bank: Tensor, labels: Tensor, queries: Tensor, k: int, temperature: float, classes: int) -> list[int]:
    mean = bank.mean(0)
    std = ((bank - mean) ** 2).mean(0).sqrt()
    out = []
    for query in (queries - mean) / std:
        cosines = []
        for row, label in zip((bank - mean) / std, labels, strict=True):
            cosine = float(query @ row) / (float(query @ query) ** 0.5 * float(row @ row) ** 0.5)
            cosines.append((cosine, int(label)))
        votes = [0.0] * classes
        for cosine, label in sorted(cosines, reverse=True)[:k]:
            votes[label] += math.exp(cosine / temperature)
        out.append(votes.index(max(votes)))
    return out


def test_matches_a_plain_loop_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hgkd.evaluation.knn._CHUNK_ELEMENTS", 40 * 7)  # 7 queries a chunk
    bank, queries = torch.randn(40, 6) * torch.tensor([1.0, 5, 0.1, 1, 1, 1]) + 3, torch.randn(25, 6) + 3
    labels = torch.randint(0, 4, (40,))
    found = knn_predictions(bank, labels, queries, ks=(1, 5, 40), temperature=0.1, num_classes=4)
    for k, predicted in found.items():
        assert predicted.tolist() == brute_force(bank, labels, queries, k, 0.1, 4), k


def test_standardising_ignores_scale_and_offset_of_channels() -> None:
    bank, queries, labels = torch.randn(30, 5), torch.randn(8, 5), torch.randint(0, 3, (30,))
    scale, offset = torch.tensor([100.0, 1, 1e-3, 3, 1]), torch.tensor([1.0, -50, 0, 2, 7])
    before = knn_scores(bank, labels, queries, k=5)
    after = knn_scores(bank * scale + offset, labels, queries * scale + offset, k=5)
    torch.testing.assert_close(before, after, rtol=1e-3, atol=1e-4)
    plain = knn_scores(bank * scale + offset, labels, queries * scale + offset, k=5, standardise=False)
    assert not torch.allclose(before, plain, atol=0.05)


def test_constant_channel_says_nothing() -> None:
    bank, queries, labels = torch.randn(30, 5), torch.randn(8, 5), torch.randint(0, 3, (30,))
    constant = torch.full((1, 1), 0.1)
    with_constant = knn_scores(
        torch.cat([bank, constant.expand(30, 1)], 1), labels, torch.cat([queries, constant.expand(8, 1)], 1), k=5
    )
    torch.testing.assert_close(with_constant, knn_scores(bank, labels, queries, k=5))


def test_tiny_temperature_stays_finite() -> None:
    scores = knn_scores(torch.eye(3), torch.arange(3), torch.eye(3), k=3, temperature=1e-4, standardise=False)
    torch.testing.assert_close(scores, torch.eye(3))


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"k": 11}, ("neighbours-out-of-range", "1 .. 10", "[11]")),
        ({"k": 0}, ("neighbours-out-of-range", "1 .. 10")),
        ({"temperature": 0.0}, ("temperature-not-positive", "0")),
        ({"temperature": float("nan")}, ("temperature-not-positive", "0", "nan")),
        ({"bank_labels": torch.full((10,), -1)}, ("knn-label-out-of-range", "-1")),
        ({"num_classes": 2}, ("knn-label-out-of-range", "0 .. 1", "0 .. 2")),
        ({"queries": torch.randn(4, 5)}, ("knn-shapes",)),
        ({"queries": torch.full((4, 3), float("nan"))}, ("features-not-finite", "4", "query")),
        ({"queries": torch.randn(0, 3)}, ("knn-no-query",)),
        ({"bank_labels": torch.zeros(0, dtype=torch.long)}, ("knn-bank-empty", "k-NN")),
    ],
)
def test_refusals(change: dict, refusal: tuple[str, ...]) -> None:
    arguments = {
        "bank": torch.randn(10, 3),
        "bank_labels": torch.arange(10) % 3,
        "queries": torch.randn(4, 3),
        "k": 2,
    }
    with refused(ValueError, *refusal):
        knn_scores(**{**arguments, **change})


def test_effective_rank_of_known_matrices() -> None:
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(torch.ones(5, 9)) == pytest.approx(1)  # one singular value
    assert effective_rank(torch.zeros(4, 3)) == 0
    # singular values 3 and 1: exp(-(3/4 ln 3/4 + 1/4 ln 1/4))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    rotated = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0][:, :2] * torch.tensor([3.0, 1.0])
    assert effective_rank(rotated) == pytest.approx(math.exp(entropy))
    assert effective_rank(rotated.T) == pytest.approx(math.exp(entropy))


def test_feature_spread_of_known_features() -> None:
    assert feature_spread(torch.ones(6, 4) * 5) == pytest.approx(0, abs=1e-7)
    # +-e_i for each axis: every channel has mean 0 and variance 1/C
    assert feature_spread(torch.cat([torch.eye(4), -torch.eye(4)]) * 9) == pytest.approx(1)


def samples(features: Tensor, labels: Tensor, split: str) -> list[FeatureSample]:
    return [FeatureSample(f, int(y), i, split) for i, (f, y) in enumerate(zip(features, labels, strict=True))]


def test_metrics_through_the_evaluator() -> None:
    bank, queries = torch.randn(12, 4), torch.randn(6, 4)
    labels, truth = torch.arange(12) % 3, torch.arange(6) % 3
    evaluator = Evaluator([dict(type="hgkd.KNNMetric", k=[3, 5]), dict(type="hgkd.FeatureHealthMetric")])
    mixed = samples(bank, labels, "bank") + samples(queries, truth, "query")
    for start in range(0, 18, 5):
        evaluator.process(mixed[start : start + 5])
    found = evaluator.evaluate(18)
    expected = knn_accuracy(bank, labels, queries, truth, ks=[3, 5])
    assert found.pop("knn/top1") == expected[3]
    assert found.pop("knn/top1_k3") == expected[3]
    assert found.pop("knn/top1_k5") == expected[5]
    everything = torch.cat([bank, queries])
    assert found.pop("health/feature_std") == pytest.approx(feature_spread(everything))
    assert found.pop("health/effective_rank") == pytest.approx(effective_rank(everything - everything.mean(0)))
    assert not found


def test_an_image_in_the_place_of_an_unreadable_one_counts_once() -> None:
    """A data set gives the next readable image with that image's own index, which then comes twice."""
    bank, queries = torch.randn(12, 4), torch.randn(6, 4)
    labels, truth = torch.arange(12) % 3, torch.arange(6) % 3
    found = []
    for twice in (False, True):
        evaluator = Evaluator([dict(type="hgkd.KNNMetric", k=3), dict(type="hgkd.FeatureHealthMetric")])
        rows = samples(bank, labels, "bank") + samples(queries, truth, "query")
        rows += [rows[4], rows[13], rows[13]] if twice else []
        evaluator.process(rows)
        found.append(evaluator.evaluate(len(rows)))
    assert found[0] == found[1]


def test_metric_uses_the_whole_of_a_small_bank() -> None:
    metric = KNNMetric(k=20)
    metric.process(None, samples(torch.eye(3), torch.arange(3), "bank"))
    metric.process(None, samples(torch.eye(3), torch.arange(3), "query"))
    assert metric.evaluate(6) == {"knn/top1": 100.0}


def test_health_of_collapsed_features_is_zero() -> None:
    metric = FeatureHealthMetric()
    metric.process(None, samples(torch.full((8, 5), 0.3), torch.zeros(8), "bank"))
    found = metric.evaluate(8)
    assert found["health/feature_std"] == pytest.approx(0, abs=1e-7)
    assert found["health/effective_rank"] == 0


def test_metric_refusals() -> None:
    with refused(ValueError, "count-not-positive", "1"):
        KNNMetric(k=0)
    metric = KNNMetric(k=1)
    with refused(TypeError, "samples-of-other-kind", "FeatureSamples", "dict"):
        metric.process(None, [{"features": 1}])
    metric.process(None, samples(torch.eye(3), torch.arange(3), "train"))
    with refused(ValueError, "knn-splits-missing", "bank", "query", "train"):
        metric.evaluate(3)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_agrees_with_scikit_learn(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    labels = torch.arange(60) % 4
    centres = torch.randn(4, 8, generator=generator)
    bank = centres[labels] + torch.randn(60, 8, generator=generator)
    queries = centres[labels] + torch.randn(60, 8, generator=generator)
    other = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    expected = other.fit(bank.numpy(), labels.numpy()).predict_proba(queries.numpy())
    found = knn_scores(bank, labels, queries, k, standardise=False)
    torch.testing.assert_close(found, torch.from_numpy(expected).float(), atol=1e-4, rtol=1e-3)
    assert 0.25 < (expected.argmax(1) == labels.numpy()).mean() < 1


@given(st.integers(0, 1000), st.integers(1, 9), st.floats(0.02, 2.0))
@settings(max_examples=25, deadline=None)
def test_votes_do_not_depend_on_the_order_of_the_bank(seed: int, k: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    bank, queries = torch.randn(9, 4, generator=generator), torch.randn(5, 4, generator=generator)
    labels, order = torch.arange(9) % 3, torch.randperm(9, generator=generator)
    scores = knn_scores(bank, labels, queries, k, temperature)
    torch.testing.assert_close(scores.sum(1), torch.ones(5))
    torch.testing.assert_close(knn_scores(bank[order], labels[order], queries, k, temperature), scores, atol=1e-4, rtol=1e-3)


def test_nearest_neighbours_by_hand() -> None:
    bank = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    cosines, places = nearest_neighbours(bank, torch.tensor([[3.0, 0.1], [0.0, 5.0]]), 2, standardise=False)
    assert places.tolist() == [[0, 2], [1, 2]]
    torch.testing.assert_close(cosines[1], torch.tensor([1.0, 0.5**0.5]))
    with refused(ValueError, "neighbours-out-of-range", "1 .. 3"):
        nearest_neighbours(bank, bank, 4)
