"""Visible cells: how many, which polarity, seeds, grids, refusals by message."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operation_counts import CountingOperations
from refusals import refused

from hgkd.errors import code_of
from hgkd.masking import (
    AttentionMask,
    BlockMask,
    CountedMask,
    RandomMask,
    Randomness,
    RectangleMask,
    UniformNumbers,
    expand,
    grid_of,
    highest,
    ids_keep_of,
    visible_count,
)
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
@pytest.mark.parametrize("kind", [RandomMask, BlockMask, AttentionMask])
def test_masks(kind: type[CountedMask], batch: int, h: int, w: int, ratio: float, rounding: str, seed: int) -> None:
    if not available(h, w, ratio, rounding):
        return
    mask = kind(ratio, rounding=rounding)
    mask.check((h, w))
    scores = torch.rand(batch, h, w)
    first, again = (
        mask(batch, (h, w), device="cpu", generator=torch.Generator().manual_seed(seed), scores=scores) for _ in range(2)
    )
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
    with refused(ValueError, "mask-ratio-out-of-range", "mask_ratio", "0", "1"):
        RandomMask(ratio)


def test_no_visible_cell_is_refused_with_the_largest_ratio() -> None:
    with refused(ValueError, "mask-ratio-too-high", "2 x 2", "0.7500"):
        RandomMask(0.9).check((2, 2))


@given(h=st.integers(1, 40), w=st.integers(1, 40), rounding=st.sampled_from(["round", "floor"]))
def test_the_largest_ratio_of_the_message_works_when_it_is_typed(h: int, w: int, rounding: str) -> None:
    with refused(ValueError, "mask-ratio-too-high") as caught:
        visible_count(h, w, 0.99999, rounding)
    typed = re.search(r"use at most ([\d.]+)", str(caught.value))
    assert typed
    assert visible_count(h, w, float(typed[1]), rounding) >= 1


@pytest.mark.parametrize("ratio", ["60%", "0.6", True, None])
def test_a_ratio_that_is_no_number_is_refused(ratio: object) -> None:
    with refused(ValueError, "mask-ratio-not-a-number", "0", "1", "0.6"):
        RandomMask(ratio)  # type: ignore[arg-type]


def test_unknown_rounding_is_refused() -> None:
    with refused(ValueError, "rounding-unknown", "round", "ceil"):
        RandomMask(0.5, rounding="ceil")


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
    with refused(ValueError, "image-size-not-divided", near):
        grid_of(size, 32)


def test_a_ratio_that_falls_during_training():
    mask = RandomMask(0.75, final_mask_ratio=0.25)
    mask.check((4, 4))
    counts = []
    for mask.progress in (0.0, 0.25, 0.5, 1.0):
        counts.append(mask(2, (4, 4), device="cpu").flatten(1).sum(1).tolist())
    assert counts == [[4, 4], [6, 6], [8, 8], [12, 12]]


def test_a_final_ratio_that_no_grid_can_serve_is_refused_at_once():
    with refused(ValueError, "mask-ratio-out-of-range", "mask_ratio", "0", "1", "1.0"):
        RandomMask(0.5, final_mask_ratio=1.0)
    with refused(ValueError, "mask-ratio-too-high", "mask_ratio", "0.9", "2 x 2"):
        RandomMask(0.5, final_mask_ratio=0.9).check((2, 2))


def neighbours_alike(visible: torch.Tensor) -> float:
    """Share of horizontal and vertical neighbours that are both hidden or both visible."""
    across = (visible[:, :, 1:] == visible[:, :, :-1]).float().mean()
    down = (visible[:, 1:] == visible[:, :-1]).float().mean()
    return ((across + down) / 2).item()


def test_blocks_hang_together() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = BlockMask(0.5, min_cells=16)(50, (14, 14), device="cpu", generator=generator)
    single = RandomMask(0.5)(50, (14, 14), device="cpu", generator=generator)
    assert neighbours_alike(single) < 0.55  # half of them by chance
    assert neighbours_alike(blocks) > 0.75


def test_one_block_is_a_rectangle_of_the_asked_shape() -> None:
    # as many cells as the smallest block may have: one rectangle, unless its sides do not divide them
    square = BlockMask(0.25, min_cells=16, min_aspect=1.0)(20, (8, 8), device="cpu")
    for visible in square:
        rows, columns = (~visible).nonzero().unbind(1)
        assert rows.max() - rows.min() == columns.max() - columns.min() == 3


@settings(max_examples=80, deadline=None)
@given(
    h=SIDES, w=SIDES, ratio=RATIOS, rounding=ROUNDINGS, seed=st.integers(0, 999),
    min_aspect=st.floats(1e-6, 1.0), min_cells=st.integers(1, 20),
)  # fmt: skip
def test_blocks_of_any_shape_hide_what_was_asked(h, w, ratio, rounding, seed, min_aspect, min_cells) -> None:
    """A tall block of few cells has no more rows than cells."""
    if available(h, w, ratio, rounding):
        mask = BlockMask(ratio, rounding, min_cells=min_cells, min_aspect=min_aspect)
        shown = mask(8, (h, w), device="cpu", generator=torch.Generator().manual_seed(seed)).flatten(1).sum(1)
        assert shown.tolist() == [visible_count(h, w, ratio, rounding)] * 8


def test_every_cell_is_hidden_sooner_or_later() -> None:
    shown = BlockMask(0.5)(400, (6, 6), device="cpu", generator=torch.Generator().manual_seed(0)).float().mean(0)
    assert 0.2 < shown.min() <= shown.max() < 0.9


@pytest.mark.parametrize(("hide", "expected"), [("high", [[1, 1], [0, 0]]), ("low", [[0, 0], [1, 1]])])
def test_attention_without_temperature_hides_the_extremes(hide: str, expected: list[list[int]]) -> None:
    scores = torch.tensor([[[0.1, 0.2], [0.3, 0.4]]])
    visible = AttentionMask(0.5, hide=hide, temperature=0.0)(1, (2, 2), device="cpu", scores=scores)
    assert visible.int().tolist() == [expected]


def test_attention_with_temperature_draws_in_proportion() -> None:
    scores = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]).expand(4000, 1, 4) / 10
    mask = AttentionMask(0.25, temperature=1.0)  # one of four cells is hidden
    visible = mask(4000, (1, 4), device="cpu", scores=scores, generator=torch.Generator().manual_seed(0))
    hidden = (~visible).float().mean((0, 1))
    torch.testing.assert_close(hidden, torch.tensor([0.1, 0.2, 0.3, 0.4]), rtol=0, atol=0.03)


def test_highest() -> None:
    assert highest(torch.tensor([[[3.0, 1.0], [2.0, 4.0]]]), 2).tolist() == [[[True, False], [False, True]]]


@pytest.mark.parametrize(
    ("mask", "equal"),
    [
        (AttentionMask(0.5, temperature=0.0), True),
        (AttentionMask(0.5, temperature=0.1), False),
        (AttentionMask([0.25, 0.75], temperature=0.0), False),
        (RandomMask(0.0), True),
        (RandomMask(0.5), False),
        (RandomMask(0.5, final_mask_ratio=0.0), False),
        (RandomMask([0.0, 0.0]), True),
    ],
)
def test_masks_of_one_image_that_are_always_equal_are_told(mask, equal):
    assert (mask.why_masks_are_equal((4, 4)) is not None) == equal
    scores = torch.rand(2, 4, 4)
    drawn = {str(mask(2, (4, 4), device="cpu", scores=scores).tolist()) for _ in range(20)}
    assert (len(drawn) == 1) == equal


@pytest.mark.parametrize("kind", [BlockMask, AttentionMask])
def test_the_ratio_of_every_kind_follows_the_training(kind: type[CountedMask]) -> None:
    mask = kind(0.75, final_mask_ratio=0.25)
    counts = []
    for mask.progress in (0.0, 0.5, 1.0):
        counts.append(int(mask(1, (4, 4), device="cpu", scores=torch.rand(1, 4, 4)).sum()))
    assert counts == [4, 8, 12]


@pytest.mark.parametrize(
    ("kind", "options", "refusal"),
    [
        (BlockMask, {"min_cells": 0}, ("min-cells-not-positive", "min_cells", "1", "0")),
        (BlockMask, {"min_aspect": 1.5}, ("min-aspect-out-of-range", "min_aspect", "0", "1", "1.5")),
        (AttentionMask, {"hide": "most"}, ("hide-unknown", "high", "low")),
        (AttentionMask, {"temperature": -1.0}, ("temperature-negative",)),
        (AttentionMask, {"temperature": math.nan}, ("temperature-negative", "nan")),
        (AttentionMask, {"temperature": math.inf}, ("temperature-negative", "inf")),
        (BlockMask, {"mask_ratio": 1.0}, ("mask-ratio-out-of-range", "mask_ratio", "0", "1")),
    ],
)
def test_refused_options(kind: type[CountedMask], options: dict[str, float], refusal: tuple[str, ...]) -> None:
    with refused(ValueError, *refusal):
        kind(**options)


def test_a_guided_mask_without_attention_is_refused() -> None:
    with refused(ValueError, "attention-scores-shape", "(2, 4, 4)", "None"):
        AttentionMask()(2, (4, 4), device="cpu")


@pytest.mark.parametrize(
    ("ratio", "rounding", "count"), [(0.9, "floor", 19), (0.95, "floor", 9), (0.98, "floor", 3), (0.98, "round", 4)]
)
@pytest.mark.parametrize("kind", [RandomMask, BlockMask])
def test_dmaes_extreme_ratios(kind: type[CountedMask], ratio: float, rounding: str, count: int) -> None:
    visible = kind(ratio, rounding=rounding)(3, (14, 14), device="cpu")
    assert visible.flatten(1).sum(1).tolist() == [count] * 3


@pytest.mark.parametrize("grid", [(4, 4), (7, 7), (2, 2), (14, 14), (3, 5)])
@pytest.mark.parametrize("rounding", ["round", "floor"])
def test_the_largest_ratio_that_a_message_names_is_allowed(grid: tuple[int, int], rounding: str) -> None:
    with refused(ValueError, "mask-ratio-too-high") as caught:
        visible_count(*grid, 0.9999, rounding)
    named = re.search(r"use at most ([\d.]+\d)", str(caught.value))
    assert named is not None
    assert visible_count(*grid, float(named[1]), rounding) >= 1


def test_a_ratio_that_is_a_text_is_refused() -> None:
    with refused(ValueError, "mask-ratio-not-a-number", "0", "1", "60%", "0.6"):
        RandomMask(mask_ratio="60%")


@settings(max_examples=30, deadline=None)
@given(h=st.integers(1, 5), w=st.integers(1, 5), rows=st.integers(1, 3), columns=st.integers(1, 3), seed=st.integers(0, 99))
def test_cells_on_a_finer_grid_and_the_indices_of_the_visible_ones(h: int, w: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    visible = RandomMask(0.4)(2, (h, w), device="cpu", generator=generator) if h * w > 1 else torch.ones(2, h, w).bool()
    fine = expand(visible, (rows, columns))
    for y in range(h * rows):
        for x in range(w * columns):
            assert torch.equal(fine[:, y, x], visible[:, y // rows, x // columns])
    if rows == columns:
        assert torch.equal(fine, expand(visible, rows))
    patches = fine.flatten(1)
    expected = [[i for i, seen in enumerate(row) if seen] for row in patches.tolist()]
    assert ids_keep_of(patches).tolist() == expected


def test_a_generator_of_ones_own_gives_draw_alone() -> None:
    class Checkerboard(CountedMask):
        def draw(self, batch: int, grid: tuple[int, int], at: Randomness, scores: torch.Tensor | None) -> torch.Tensor:
            cells = torch.arange(grid[0])[:, None] + torch.arange(grid[1])
            return (cells % 2 == 0).expand(batch, *grid).to(at.device)

    drawn = Checkerboard(0.5)(2, (4, 4), device="cpu", generator=torch.Generator())
    assert drawn.sum((1, 2)).tolist() == [8, 8]
    with pytest.raises(NotImplementedError):
        CountedMask(0.5)(1, (4, 4), device="cpu")


# a ratio for each image


@settings(max_examples=30, deadline=None)
@given(h=SIDES, w=SIDES, low=RATIOS, high=RATIOS, rounding=ROUNDINGS, seed=st.integers(0, 99))
@pytest.mark.parametrize("kind", [RandomMask, BlockMask, AttentionMask])
def test_each_image_has_a_ratio_between_the_two(
    kind: type[CountedMask], h: int, w: int, low: float, high: float, rounding: str, seed: int
) -> None:
    low, high = sorted((low, high))
    if not available(h, w, high, rounding):
        return
    mask = kind([low, high], rounding=rounding)
    mask.check((h, w))
    drawn = mask(8, (h, w), device="cpu", generator=torch.Generator().manual_seed(seed), scores=torch.rand(8, h, w))
    counts = drawn.flatten(1).sum(1)
    assert counts.min() >= visible_count(h, w, high, rounding)
    assert counts.max() <= visible_count(h, w, low, rounding)


def test_ratios_of_images_are_even() -> None:
    counts = RandomMask([0.0, 0.75]).counts(20000, (8, 8), Randomness("cpu", torch.Generator().manual_seed(0)))
    assert (counts.min().item(), counts.max().item()) == (16, 64)
    # evenly between 16 and 64: mean 40, std 48 / sqrt(12) = 13.9
    assert counts.double().mean().item() == pytest.approx(40.0, abs=0.4)
    assert counts.double().std().item() == pytest.approx(13.86, abs=0.3)
    assert RandomMask([0.0, 0.75]).current_ratio == pytest.approx(0.375)


def test_a_pair_of_equal_ratios_is_one_ratio() -> None:
    one, pair = (
        RandomMask(ratio)(3, (7, 7), device="cpu", generator=torch.Generator().manual_seed(1)) for ratio in (0.6, [0.6, 0.6])
    )
    assert one.equal(pair)


@pytest.mark.parametrize(
    ("given", "values"), [([0.1, 0.2, 0.3], "3 numbers"), ([0.7, 0.1], "[0.1, 0.7]"), ([0.2], "1 numbers")]
)
def test_a_pair_that_is_none_is_refused(given: list[float], values: str) -> None:
    with pytest.raises(ValueError, match=re.escape(values)) as caught:
        RandomMask(given)
    assert code_of(caught.value) == "mask-ratio-pair"


def test_a_pair_and_a_final_ratio_are_refused() -> None:
    with pytest.raises(ValueError, match=r"final_mask_ratio=0\.9 .* leave out one of the two"):
        RandomMask([0.1, 0.2], final_mask_ratio=0.9)


def test_who_needs_one_ratio_refuses_a_pair() -> None:
    with pytest.raises(ValueError, match=r"mask_ratio=\[0\.1, 0\.2\] draws one for each; give one number"):
        RandomMask([0.1, 0.2]).count((7, 7))


# an unmasked end


@pytest.mark.parametrize("ratio", [0.6, [0.2, 0.6]])
@pytest.mark.parametrize("kind", [RandomMask, BlockMask, AttentionMask, RectangleMask])
def test_nothing_is_hidden_in_the_last_share_of_the_steps(kind: type[CountedMask], ratio: float) -> None:
    mask = kind(ratio, unmasked_share=0.25)
    seen = []
    for step in range(8):  # as MaskScheduleHook tells it
        mask.progress = step / 7
        seen.append(bool(mask(2, (7, 7), device="cpu", scores=torch.rand(2, 7, 7)).all()))
        assert (mask.current_ratio == 0.0) == seen[-1]
    assert seen == [False] * 6 + [True] * 2


@pytest.mark.parametrize("share", [-0.1, 1.0, "half", True])
def test_a_share_that_is_none_is_refused(share: object) -> None:
    with pytest.raises(
        ValueError, match=r"unmasked_share is a share of the training steps in \[0, 1\), got .*; write e\.g\. 0\.2"
    ):
        RandomMask(0.6, unmasked_share=share)  # type: ignore[arg-type]


# rectangles


def bounds(visible: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of the smallest rectangle around the visible cells."""
    rows, columns = visible.any(1).nonzero(), visible.any(0).nonzero()
    return int(rows.max() - rows.min() + 1), int(columns.max() - columns.min() + 1)


@settings(max_examples=40, deadline=None)
@given(h=SIDES, w=SIDES, ratio=RATIOS, seed=st.integers(0, 99))
def test_visible_cells_fill_one_rectangle(h: int, w: int, ratio: float, seed: int) -> None:
    mask = RectangleMask(ratio)
    try:
        mask.check((h, w))
    except ValueError:
        return
    for image in mask(4, (h, w), device="cpu", generator=torch.Generator().manual_seed(seed)):
        rows, columns = bounds(image)
        assert int(image.sum()) == rows * columns == mask.count((h, w))
        assert min(rows, columns) >= 0.3 * max(rows, columns) or (rows, columns) == (h, w)


@pytest.mark.parametrize(
    ("grid", "ratio", "shapes"),
    [((4, 4), 0.6, {(2, 3), (3, 2)}), ((7, 7), 0.6, {(4, 5), (5, 4)}), ((7, 7), 0.755, {(3, 4), (4, 3), (2, 6), (6, 2)}),
     ((3, 9), 0.0, {(3, 9)})],
)  # fmt: skip
def test_all_shapes_of_the_area_are_drawn(grid: tuple[int, int], ratio: float, shapes: set[tuple[int, int]]) -> None:
    generator, mask = torch.Generator().manual_seed(0), RectangleMask(ratio)
    drawn = [mask(3, grid, device="cpu", generator=generator) for _ in range(60)]
    assert {bounds(image) for batch in drawn for image in batch} == shapes
    assert all(len({bounds(image) for image in batch}) == 1 for batch in drawn), "a batch has one shape"
    views = mask.draw_views(3, 2, grid, Randomness("cpu", generator))
    assert len(views) == 6
    assert len({bounds(image) for image in views}) == 1


def test_a_rectangle_that_no_grid_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no rectangle on a 1 x 16 grid shows about 8 cells .* nearest shows 1 x 3"):
        RectangleMask(0.5).check((1, 16))
    with refused(ValueError, "min-aspect-out-of-range", "min_aspect", "0", "1"):
        RectangleMask(0.5, min_aspect=0)


class TestUniformNumbers:
    @pytest.mark.parametrize("seeded", [False, True])
    def test_are_those_of_single_calls_and_leave_the_generator_there(self, seeded: bool) -> None:
        found = []
        for ahead in (True, False):
            generator = torch.Generator() if seeded else torch.default_generator
            generator.manual_seed(5)
            given = generator if seeded else None
            if ahead:
                with UniformNumbers(given) as numbers:
                    taken = [x for _ in range(1500) for x in numbers.take(4)]
            else:
                taken = [x for _ in range(1500) for x in torch.rand(4, generator=given).tolist()]
            found.append((taken, torch.rand(3, generator=given).tolist()))
        assert found[0] == found[1]

    def test_blocks_are_drawn_without_an_operation_an_image(self) -> None:
        with CountingOperations() as counted:
            BlockMask(0.6)(64, (7, 7), device="cpu")
        assert sum(counted.seen.values()) < 15
