"""Visible cells: how many, which polarity, seeds, grids, refusals by message."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hgkd.masking import RandomMask, grid_of, visible_count
from hgkd.registry import MODELS

SIDES = st.integers(1, 16)
RATIOS = st.floats(0.0, 0.99)
ROUNDINGS = st.sampled_from(["round", "floor"])


@pytest.mark.parametrize(
    ("ratio", "rounding", "expected"),
    [(0.6, "round", 20), (0.6, "floor", 19), (0.75, "round", 12), (0.75, "floor", 12), (0.0, "floor", 49)],
)
def test_counts_on_the_7_x_7_grid(ratio: float, rounding: str, expected: int) -> None:
    assert visible_count(7, 7, ratio, rounding) == expected


def test_floating_point_does_not_lose_a_cell() -> None:
    assert visible_count(5, 5, 0.8, "floor") == 5  # 25 * (1 - 0.8) is 4.999...
    assert visible_count(1, 10, 0.75, "round") == 3  # 2.5: halves go up


def available(h: int, w: int, ratio: float, rounding: str) -> bool:
    return h * w * (1 - ratio) >= (0.51 if rounding == "round" else 1.01)


@settings(max_examples=60, deadline=None)
@given(h=SIDES, w=SIDES, ratio=RATIOS, rounding=ROUNDINGS)
def test_count_is_within_one_of_the_exact_share(h: int, w: int, ratio: float, rounding: str) -> None:
    exact = h * w * (1 - ratio)
    if not available(h, w, ratio, rounding):
        return
    count = visible_count(h, w, ratio, rounding)
    assert 1 <= count <= h * w
    assert abs(count - exact) <= (0.5 + 1e-5 if rounding == "round" else 1 + 1e-5)
    if rounding == "floor":
        assert count <= math.ceil(exact)


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(1, 5), h=SIDES, w=SIDES, ratio=RATIOS, rounding=ROUNDINGS, seed=st.integers(0, 99))
def test_masks(batch: int, h: int, w: int, ratio: float, rounding: str, seed: int) -> None:
    if not available(h, w, ratio, rounding):
        return
    mask = RandomMask(ratio, rounding)
    mask.check((h, w))
    first, again = (mask(batch, (h, w), device="cpu", generator=torch.Generator().manual_seed(seed)) for _ in range(2))
    assert first.shape == (batch, h, w)
    assert first.dtype == torch.bool
    assert first.flatten(1).sum(1).tolist() == [visible_count(h, w, ratio, rounding)] * batch
    assert first.equal(again)


def test_true_is_visible() -> None:
    assert RandomMask(0.0)(2, (3, 4), device="cpu").all()
    assert RandomMask(0.9)(8, (10, 10), device="cpu").float().mean().item() == pytest.approx(0.1)


def test_images_and_steps_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    one = RandomMask(0.5)(2, (8, 8), device="cpu", generator=generator)
    two = RandomMask(0.5)(2, (8, 8), device="cpu", generator=generator)
    assert not one[0].equal(one[1])
    assert not one.equal(two)


def test_every_cell_is_equally_likely() -> None:
    visible = RandomMask(0.75)(4000, (4, 4), device="cpu", generator=torch.Generator().manual_seed(0))
    share = visible.float().mean(0)
    assert (share - 0.25).abs().max() < 0.03  # four deviations: sqrt(0.25 * 0.75 / 4000) = 0.007


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5])
def test_ratio_outside_its_range_is_refused_when_built(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"mask_ratio must be in \[0, 1\), got"):
        RandomMask(ratio)


def test_no_visible_cell_is_refused_with_the_largest_ratio() -> None:
    with pytest.raises(ValueError, match=r"leaves no visible cell on a 2 x 2 grid; use at most 0\.750"):
        RandomMask(0.9).check((2, 2))


def test_unknown_rounding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rounding must be 'round' .* got 'ceil'"):
        RandomMask(0.5, "ceil")


def test_is_registered() -> None:
    assert isinstance(MODELS.build({"type": "RandomMask", "mask_ratio": 0.75}), RandomMask)


@settings(max_examples=40, deadline=None)
@given(h=SIDES, w=SIDES, cell=st.integers(1, 64))
def test_grid_of_whole_multiples(h: int, w: int, cell: int) -> None:
    assert grid_of((h * cell, w * cell), cell) == (h, w)


@pytest.mark.parametrize(
    ("size", "near"),
    [
        ((100, 100), "96 x 96 or 128 x 128"),
        ((96, 100), "96 x 96 or 96 x 128"),
        ((224, 230), "224 x 224 or 224 x 256"),
        ((20, 64), "32 x 64"),
    ],
)
def test_grid_of_names_the_nearest_sizes(size: tuple[int, int], near: str) -> None:
    with pytest.raises(ValueError, match=f"nearest sizes that are: {near}$"):
        grid_of(size, 32)


def test_a_ratio_that_falls_during_training():
    mask = RandomMask(0.75, final_mask_ratio=0.25)
    mask.check((4, 4))
    counts = []
    for mask.progress in (0.0, 0.25, 0.5, 1.0):
        counts.append(mask(2, (4, 4), device="cpu").flatten(1).sum(1).tolist())
    assert counts == [[4, 4], [6, 6], [8, 8], [12, 12]]


def test_a_final_ratio_that_no_grid_can_serve_is_refused_at_once():
    with pytest.raises(ValueError, match=r"mask_ratio must be in \[0, 1\), got 1.0"):
        RandomMask(0.5, final_mask_ratio=1.0)
    with pytest.raises(ValueError, match=r"mask_ratio 0\.9 leaves no visible cell on a 2 x 2 grid"):
        RandomMask(0.5, final_mask_ratio=0.9).check((2, 2))
