"""Accuracies, bootstrap intervals and the paired test against hand-computed and independent results."""

from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from scipy import stats

from hgkd.evaluation import bootstrap_interval, paired_test
from hgkd.evaluation.accuracy import per_class_accuracy

outcomes = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def test_per_class_accuracy() -> None:
    correct, labels = np.array([True, False, True, True]), np.array([0, 0, 2, 2])
    assert per_class_accuracy(correct, labels) == {0: 50.0, 2: 100.0}


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
    with refused(ValueError, "outcomes-empty", "1"):
        bootstrap_interval(np.zeros(0, dtype=bool))


def test_bootstrap_of_shares_equals_drawing_images() -> None:
    shares = np.array([0.0, 0.2, 0.2, 0.6, 1.0] * 16)
    rng = np.random.default_rng(3)
    drawn = [100 * shares[rng.integers(0, 80, 80)].mean() for _ in range(4000)]
    low, high = bootstrap_interval(shares, n=20000)
    assert low == pytest.approx(np.percentile(drawn, 2.5), abs=1)
    assert high == pytest.approx(np.percentile(drawn, 97.5), abs=1)


def test_mcnemar_by_hand() -> None:
    # 9 images only the first has right, 2 only the second, on 39 they agree
    first = np.array([1] * 9 + [0] * 2 + [1] * 30 + [0] * 9, dtype=bool)
    second = np.array([0] * 9 + [1] * 2 + [1] * 30 + [0] * 9, dtype=bool)
    found = paired_test(first, second)
    assert (found.first_only, found.second_only) == (9, 2)
    assert found.difference == pytest.approx(100 * 7 / 50)
    assert found.p_value == pytest.approx(2 * sum(comb(11, i) for i in range(3)) / 2**11)  # 0.0654
    assert found.ci95[0] < found.difference < found.ci95[1]


@given(outcomes)
@settings(max_examples=40, deadline=None)
def test_paired_test_properties(pairs: list[tuple[bool, bool]]) -> None:
    a, b = np.array(pairs, dtype=bool).T
    there, back = paired_test(a, b), paired_test(b, a)
    assert there.difference == pytest.approx(100 * (a.mean() - b.mean()))
    assert back.difference == pytest.approx(-there.difference)
    assert (back.first_only, back.second_only) == (there.second_only, there.first_only)
    assert back.p_value == pytest.approx(there.p_value)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    expected = min(1.0, 2 * stats.binom.cdf(min(only_a, only_b), only_a + only_b, 0.5)) if only_a + only_b else 1.0
    assert there.p_value == pytest.approx(expected)


def test_paired_interval_equals_drawing_pairs_and_is_narrower_than_unpaired() -> None:
    rng = np.random.default_rng(0)
    first = rng.random(400) < 0.6
    second = np.where(rng.random(400) < 0.1, ~first, first)  # mostly the same answers
    low, high = paired_test(first, second).ci95
    places = rng.integers(0, 400, (3000, 400))
    drawn = 100 * (first[places].mean(1) - second[places].mean(1))
    assert low == pytest.approx(np.percentile(drawn, 2.5), abs=0.5)
    assert high == pytest.approx(np.percentile(drawn, 97.5), abs=0.5)
    alone = bootstrap_interval(first)
    assert high - low < alone[1] - alone[0]


def test_equal_runs_do_not_differ() -> None:
    same = np.array([True, False, True])
    found = paired_test(same, same)
    assert (found.difference, found.ci95, found.p_value) == (0.0, (0.0, 0.0), 1.0)


def test_shares_are_compared_by_their_sign() -> None:
    found = paired_test(np.array([0.5, 0.4, 1.0, 0.0]), np.array([0.4, 0.5, 0.2, 0.0]))
    assert (found.first_only, found.second_only) == (2, 1)
    assert found.difference == pytest.approx(20.0)


def test_other_numbers_of_images_are_refused() -> None:
    with refused(ValueError, "paired-images-differ", "(3,)", "(4,)"):
        paired_test(np.ones(3), np.ones(4))
