"""The one rule by which proofs compare: NaN, infinity and other shapes are never a small difference."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hgkd.differences import largest_difference

NUMBERS = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=8)


@given(NUMBERS, NUMBERS)
def test_by_hand(a: list, b: list) -> None:
    count = min(len(a), len(b))
    a, b = a[:count], b[:count]
    expected = max(abs(x - y) for x, y in zip(a, b, strict=True)) / max(1e-12, *map(abs, b))
    tensors = (torch.tensor(values, dtype=torch.float64) for values in (a, b))
    assert largest_difference(*tensors) == pytest.approx(expected)


@given(NUMBERS, st.sampled_from([math.nan, math.inf, -math.inf]), st.booleans(), st.data())
def test_what_is_not_finite_fails_wherever_it_stands(values: list, broken: float, in_found: bool, data: st.DataObject) -> None:
    good, bad = torch.tensor(values), torch.tensor(values)
    bad[data.draw(st.integers(0, len(values) - 1))] = broken
    pair = (bad, good) if in_found else (good, bad)
    assert largest_difference(*pair) == math.inf
    assert largest_difference(bad, bad) == math.inf
    assert max(0.0, largest_difference(*pair)) == math.inf  # max(0.0, nan) would be 0.0


def test_shapes_and_nothing() -> None:
    assert largest_difference(torch.ones(2), torch.ones(2, 1)) == math.inf
    assert largest_difference(torch.ones(0), torch.ones(0)) == 0.0
    assert largest_difference(torch.tensor([1e-6]), torch.zeros(1), least=1.0) == pytest.approx(1e-6)
