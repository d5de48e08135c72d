"""H-GKD's loss by hand on grids of four positions, its geometry, gradients and refusals."""

from types import SimpleNamespace

import pytest
import torch
from refusals import refused
from torch import Tensor, nn

from hgkd.objectives import Setup
from hgkd.objectives.alignment import fit_grid
from hgkd.objectives.distances import layer_norm0, smooth_l1_by_position
from hgkd.objectives.loss_terms import LossTerm
from hgkd.objectives.masked.hgkd import HGKD, centred_target
from hgkd.registry import MASKED_OBJECTIVES
from hgkd.sparse import CellLayout
from hgkd.structures import StudentOutput, TeacherInfo, TeacherOutput

INFO = TeacherInfo(kind="mae", width=2, depth=12, patch_size=16, decoder_width=3, decoder_depth=8)
# one image, 2 x 2 cells of 4 px: upper left and lower right are visible
VISIBLE = torch.tensor([[[True, False], [False, True]]])
LAYOUT = CellLayout(VISIBLE, 4)
# two channels: LN0 of (a, b) is (1, -1) where a > b, (-1, 1) where a < b
TOKENS = torch.tensor([[[[5.0, 0.0], [9.0, 0.0]], [[1.0, 3.0], [2.0, 7.0]]]])
LN_TOKENS = torch.tensor([[[[1.0, -1.0], [1.0, -1.0]], [[-1.0, 1.0], [-1.0, 1.0]]]])


def student(channels: int = 2, out_stride: int = 4, cell: int = 4) -> SimpleNamespace:
    return SimpleNamespace(decoded_channels=channels, out_stride=out_stride, cell=cell)


def prepared(channels: int = 2, info: TeacherInfo = INFO, grid: tuple[int, int] = (2, 2), **options: object) -> HGKD:
    objective = HGKD(**options)
    objective.prepare(Setup(student(channels), info, grid, (2, 2)))
    return objective


def identity(objective: HGKD, term: str) -> None:
    conv = objective.projectors[term]
    assert isinstance(conv, nn.Conv2d)
    with torch.no_grad():
        conv.weight.copy_(torch.eye(*conv.weight.shape[:2])[:, :, None, None])
        conv.bias.zero_()


def offsets(values: list[list[float]]) -> Tensor:
    """A prediction that misses the target by the given amount in the first channel of each position."""
    return LN_TOKENS + torch.stack([torch.tensor(values), torch.zeros(2, 2)]).unsqueeze(0)


class TestFunctions:
    def test_layer_norm0_by_hand(self) -> None:
        # (0, 3, 6): mean 3, population variance 6
        tokens = torch.tensor([0.0, 3.0, 6.0]).view(1, 3, 1, 1)
        expected = torch.tensor([-3.0, 0.0, 3.0]) / 6.0**0.5
        torch.testing.assert_close(layer_norm0(tokens).flatten(), expected)

    def test_layer_norm0_is_torchs_without_affine(self) -> None:
        tokens = torch.randn(2, 5, 3, 4)
        expected = nn.functional.layer_norm(tokens.permute(0, 2, 3, 1), (5,), eps=1e-6).permute(0, 3, 1, 2)
        torch.testing.assert_close(layer_norm0(tokens), expected)

    def test_layer_norm0_ignores_scale_and_shift(self) -> None:
        tokens = torch.randn(2, 8, 3, 3)
        torch.testing.assert_close(layer_norm0(tokens * 7 + 3), layer_norm0(tokens), atol=1e-5, rtol=1e-5)

    def test_layer_norm0_computes_in_fp32(self) -> None:
        tokens = (torch.randn(1, 8, 2, 2) * 100 + 1000).half()
        assert layer_norm0(tokens).dtype == torch.float32
        torch.testing.assert_close(layer_norm0(tokens), layer_norm0(tokens.float()))

    def test_layer_norm0_of_nothing_is_zero(self) -> None:
        assert not layer_norm0(torch.zeros(1, 4, 2, 2)).any()

    @pytest.mark.parametrize(
        ("difference", "expected"),
        [(0.0, 0.0), (1.0, 0.25), (-1.0, 0.25), (1.9, 0.9025), (2.0, 1.0), (3.0, 2.0), (-5.0, 4.0)],
    )
    def test_smooth_l1_turns_at_beta(self, difference: float, expected: float) -> None:
        # beta 2: d^2 / 4 below, |d| - 1 from there on
        got = smooth_l1_by_position(torch.full((1, 1, 1, 1), difference), torch.zeros(1, 1, 1, 1), beta=2.0)
        assert got.item() == pytest.approx(expected)

    def test_smooth_l1_averages_channels(self) -> None:
        got = smooth_l1_by_position(torch.tensor([1.0, 3.0]).view(1, 2, 1, 1), torch.zeros(1, 2, 1, 1))
        assert got.shape == (1, 1, 1)
        assert got.item() == pytest.approx((0.25 + 2.0) / 2)

    def test_smooth_l1_refuses_shapes_that_broadcast(self) -> None:
        with refused(ValueError, "shapes-differ"):
            smooth_l1_by_position(torch.zeros(2, 3, 2, 2), torch.zeros(1, 3, 2, 2))

    def test_loss_counts_the_given_places(self) -> None:
        prediction = offsets([[1.0, 3.0], [0.0, 1.0]])  # per position over 2 channels: 0.125, 1, 0, 0.125
        positions = torch.tensor([[[True, True], [False, False]]])
        term = LossTerm(prediction, layer_norm0(TOKENS), positions, positions.sum(), smooth_l1_by_position)
        assert term.loss().item() == pytest.approx((0.125 + 1.0) / 2, abs=1e-5)


class TestFullTarget:
    # 0.125 and 0 at the visible positions, 1 and 0.25 at the masked ones
    DECODED = offsets([[1.0, 3.0], [2.0**0.5, 0.0]])

    @pytest.mark.parametrize(("supervise", "expected"), [("masked", 1.25 / 2), ("visible", 0.125 / 2), ("all", 1.375 / 4)])
    def test_hand_value(self, supervise: str, expected: float) -> None:
        objective = prepared(supervise=supervise)
        identity(objective, "distill")
        losses = objective(StudentOutput(self.DECODED), TeacherOutput({11: TOKENS}, (2, 2)), LAYOUT)
        assert list(losses) == ["distill"]
        assert losses["distill"].shape == ()
        assert losses["distill"].dtype == torch.float32
        assert losses["distill"].item() == pytest.approx(expected, abs=1e-5)

    @pytest.mark.parametrize("supervise", ["masked", "visible", "all"])
    def test_zero_at_the_target(self, supervise: str) -> None:
        objective = prepared(supervise=supervise)
        identity(objective, "distill")
        losses = objective(StudentOutput(LN_TOKENS), TeacherOutput({11: TOKENS}, (2, 2)), LAYOUT)
        assert losses["distill"].item() == pytest.approx(0.0, abs=1e-9)

    @pytest.mark.parametrize(("supervise", "other"), [("masked", VISIBLE), ("visible", ~VISIBLE)])
    def test_unsupervised_places_do_not_count(self, supervise: str, other: Tensor) -> None:
        objective = prepared(supervise=supervise)
        teacher = TeacherOutput({11: TOKENS}, (2, 2))
        worse = torch.where(other.unsqueeze(1), torch.full_like(self.DECODED, float("nan")), self.DECODED)
        torch.testing.assert_close(
            objective(StudentOutput(worse), teacher, LAYOUT),
            objective(StudentOutput(self.DECODED), teacher, LAYOUT),
        )

    def test_teacher_grid_finer_than_the_mask_grid(self) -> None:
        objective = prepared(grid=(4, 4), supervise="masked")
        identity(objective, "distill")
        tokens = torch.randn(1, 2, 4, 4)
        decoded = torch.randn(1, 2, 4, 4)
        losses = objective(StudentOutput(decoded), TeacherOutput({11: tokens}, (4, 4)), LAYOUT)
        by_position = smooth_l1_by_position(decoded, layer_norm0(tokens))[0]
        expected = (by_position[:2, 2:].sum() + by_position[2:, :2].sum()) / 8  # the two hidden cells, 2 x 2 tokens each
        torch.testing.assert_close(losses["distill"], expected)

    def test_gradient_reaches_the_student_and_not_the_teacher(self) -> None:
        objective = prepared(channels=5, projector="mlp")
        decoded = torch.randn(1, 5, 2, 2, requires_grad=True)
        tokens = torch.randn(1, 2, 2, 2, requires_grad=True)
        objective(StudentOutput(decoded), TeacherOutput({11: tokens}, (2, 2)), LAYOUT)["distill"].backward()
        assert tokens.grad is None
        assert decoded.grad is not None
        assert all(p.grad is not None and p.grad.any() for p in objective.parameters())
        assert (decoded.grad.abs().sum(1) > 0).equal(~VISIBLE)

    def test_predict_covers_every_place(self) -> None:
        objective = prepared(channels=5, grid=(4, 6))
        assert objective.predict(StudentOutput(torch.randn(3, 5, 2, 3))).shape == (3, 2, 4, 6)


class TestInferredTarget:
    DECODED_TEACHER = torch.tensor([0.0, 3.0, 6.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    TEACHER = TeacherOutput({11: TOKENS}, (2, 2), decoded=DECODED_TEACHER)

    def run(self, supervise: str) -> dict[str, float]:
        objective = prepared(target="inferred", supervise=supervise)
        for term in objective.terms:
            with torch.no_grad():  # predict (0, 0) or (0, 0, 0)
                objective.projectors[term].weight.zero_()
                objective.projectors[term].bias.zero_()
        losses = objective(StudentOutput(torch.randn(1, 2, 2, 2)), self.TEACHER, LAYOUT)
        return {name: value.item() for name, value in losses.items()}

    # visible: |target| is 1 in both channels -> 0.25; masked: squares 1.5, 0, 1.5, over 4, mean -> 0.25
    @pytest.mark.parametrize(
        ("supervise", "expected"),
        [("visible", {"visible": 0.25}), ("masked", {"masked": 0.25}), ("all", {"visible": 0.125, "masked": 0.125})],
    )
    def test_hand_value(self, supervise: str, expected: dict[str, float]) -> None:
        assert self.run(supervise) == pytest.approx(expected, abs=1e-5)

    def test_each_target_at_its_own_places(self) -> None:
        objective = prepared(target="inferred", supervise="all")
        student_out = StudentOutput(torch.randn(1, 2, 2, 2))
        tokens = torch.where(VISIBLE.unsqueeze(1), TOKENS, torch.nan)
        decoded = torch.where(VISIBLE.unsqueeze(1), torch.nan, self.DECODED_TEACHER)
        got = objective(student_out, TeacherOutput({11: tokens}, (2, 2), decoded=decoded), LAYOUT)
        torch.testing.assert_close(got, objective(student_out, self.TEACHER, LAYOUT))

    def test_terms_sum_to_the_mean_over_all_places(self) -> None:
        layout = CellLayout(torch.tensor([[[True, False], [False, False]]]), 4)
        objective = prepared(target="inferred", supervise="all")
        student_out = StudentOutput(torch.randn(1, 2, 2, 2))
        losses = objective(student_out, self.TEACHER, layout)
        visible = smooth_l1_by_position(objective.predict(student_out, "visible"), layer_norm0(TOKENS))
        masked = smooth_l1_by_position(objective.predict(student_out, "masked"), layer_norm0(self.DECODED_TEACHER))
        expected = torch.where(layout.visible, visible, masked).mean()
        torch.testing.assert_close(losses["visible"] + losses["masked"], expected)

    @pytest.mark.parametrize(
        ("supervise", "blocks", "decoder_block"), [("masked", (), 7), ("visible", (9,), None), ("all", (9,), 7)]
    )
    def test_asks_for_nothing_it_does_not_use(self, supervise: str, blocks: tuple[int, ...], decoder_block: int | None) -> None:
        objective = prepared(target="inferred", supervise=supervise, block=-3)
        assert objective.needs.blocks == blocks
        assert objective.needs.decoder_block == decoder_block
        assert objective.needs.visible_only
        assert len(objective.projectors) == len(objective.terms)

    def test_every_projector_has_a_gradient_with_nothing_hidden(self) -> None:
        objective = prepared(target="inferred", supervise="all")
        layout = CellLayout(torch.ones_like(VISIBLE), 4)
        sum(objective(StudentOutput(torch.randn(1, 2, 2, 2)), self.TEACHER, layout).values()).backward()
        assert all(p.grad is not None for p in objective.parameters())

    def test_teacher_without_decoder_serves_visible_places(self) -> None:
        objective = prepared(info=TeacherInfo("timm", 2, 12, 16), target="inferred", supervise="visible")
        assert objective.terms == ("visible",)


class TestGeometry:
    def test_equal_grids_pass_through(self) -> None:
        feature = torch.randn(1, 2, 4, 4)
        assert fit_grid(feature, (4, 4)) is feature

    def test_finer_by_a_whole_factor_is_averaged(self) -> None:
        feature = torch.arange(16.0).view(1, 1, 4, 4)
        assert fit_grid(feature, (2, 2)).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]

    @pytest.mark.parametrize("size", [(2, 2), (3, 3)])
    def test_otherwise_bilinear(self, size: tuple[int, int]) -> None:
        feature = torch.arange(size[1], dtype=torch.float32).expand(1, 1, *size)  # a ramp along the columns
        fitted = fit_grid(feature, (4, 4))
        assert fitted.shape == (1, 1, 4, 4)
        assert (fitted[0, 0] == fitted[0, 0, 0]).all()
        middle = fitted[0, 0, 0, 1:3].diff().item()
        assert middle == pytest.approx(size[1] / 4)  # slope: one unit a student position

    def test_negative_block_counts_from_the_end(self) -> None:
        assert prepared(block=-2).needs.blocks == (10,)
        assert prepared(block=3).needs.blocks == (3,)

    def test_needs_stand_as_given_before_prepare(self) -> None:
        assert HGKD(block=-2).needs.blocks == (-2,)
        assert not HGKD().needs.visible_only


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "refusal"),
        [
            ({"target": "half"}, ("hgkd-target-unknown", "full", "inferred", "half")),
            ({"supervise": "hidden"}, ("supervise-unknown", "masked", "visible", "all", "hidden")),
            ({"beta": 0.0}, ("beta-not-positive", "0")),
            ({"projector": "conv"}, ("projector-unknown", "linear", "mlp", "mlp2", "conv")),
            ({"decoder_block": 3}, ("decoder-block-without-use", "target='full'")),
        ],
    )
    def test_options(self, options: dict[str, object], refusal: tuple[str, ...]) -> None:
        with refused(ValueError, *refusal):
            HGKD(**options)

    @pytest.mark.parametrize("block", [12, -13])
    def test_block_out_of_range_names_the_depth(self, block: int) -> None:
        with refused(ValueError, "teacher-block-out-of-range", "12"):
            prepared(block=block)

    @pytest.mark.parametrize("block", [None, 1.0, True, "1", (1, None)])
    def test_what_is_no_block(self, block: object) -> None:
        with refused(TypeError, "teacher-block-not-whole", "11"):
            prepared(block=block)

    def test_decoder_block_out_of_range_names_the_depth(self) -> None:
        with refused(ValueError, "teacher-block-out-of-range", "decoder_block", "8"):
            prepared(target="inferred", decoder_block=8)

    def test_inferred_needs_a_decoder(self) -> None:
        with refused(ValueError, "teacher-without-decoder", "mae-encoder", "target='full'"):
            prepared(info=TeacherInfo("mae-encoder", 2, 12, 16), target="inferred")

    def test_no_teacher(self) -> None:
        with refused(ValueError, "objective-without-teacher"):
            HGKD().prepare(Setup(student(), None, None, (2, 2)))

    def test_grids_that_do_not_fit(self) -> None:
        with refused(ValueError, "teacher-grid-no-multiple"):
            prepared(grid=(3, 3))

    def test_nothing_hidden(self) -> None:
        layout = CellLayout(torch.ones_like(VISIBLE), 4)
        with refused(ValueError, "nothing-supervised", "supervise='all'", "mask_ratio", "0"):
            prepared()(StudentOutput(LN_TOKENS), TeacherOutput({11: TOKENS}, (2, 2)), layout)

    def test_teacher_output_of_another_block(self) -> None:
        with refused(ValueError, "teacher-block-not-returned", "[3]", "11"):
            prepared()(StudentOutput(LN_TOKENS), TeacherOutput({3: TOKENS}, (2, 2)), LAYOUT)

    def test_unknown_term(self) -> None:
        with refused(ValueError, "term-unknown", "distill"):
            prepared().predict(StudentOutput(LN_TOKENS), "masked")


def test_is_registered() -> None:
    assert isinstance(MASKED_OBJECTIVES.build({"type": "HGKD", "block": 9}), HGKD)


def test_centred_target_by_hand() -> None:
    """Two images, two channels, two positions. Channel 0 holds its place only; channel 1 differs by 2 between the images."""
    tokens = torch.tensor([[[[5.0, -5.0]], [[1.0, 4.0]]], [[[5.0, -5.0]], [[3.0, 6.0]]]])
    found = centred_target(tokens)
    expected = torch.tensor([[[[0.0, 0.0]], [[-1.0, -1.0]]], [[[0.0, 0.0]], [[1.0, 1.0]]]])
    assert torch.allclose(found, expected, atol=1e-5)
    with refused(ValueError, "batch-of-one", "1"):
        centred_target(tokens[:1])
    with refused(ValueError, "batch-of-one", "1"):
        centred_target(tokens, views=2)


def test_centre_changes_the_target_only() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(3, 4, 2, 2)
    out = TeacherOutput(tokens={0: tokens}, grid=(2, 2))
    plain, centred = HGKD(block=0), HGKD(block=0, centre=True)
    assert torch.equal(centred.target_map(out), centred_target(plain.target_map(out)))
    with refused(ValueError, "centre-needs-full-target", "centre=True", "target='full'"):
        HGKD(target="inferred", centre=True)


class TestSeveralBlocks:
    def test_terms_average_those_of_single_blocks(self) -> None:
        torch.manual_seed(0)
        several = prepared(info=INFO, block=(3, -1), supervise="all")
        assert several.terms == ("distill_3", "distill_11")
        assert several.needs.blocks == (3, 11)
        teacher = TeacherOutput({3: torch.randn(1, 2, 2, 2), 11: TOKENS}, (2, 2))
        student_out = StudentOutput(torch.randn(1, 2, 2, 2))
        losses = several(student_out, teacher, LAYOUT)
        for block in (3, 11):
            single = prepared(block=block, supervise="all")
            single.projectors["distill"].load_state_dict(several.projectors[f"distill_{block}"].state_dict())
            expected = single(student_out, teacher, LAYOUT)["distill"] / 2
            torch.testing.assert_close(losses[f"distill_{block}"], expected)

    def test_each_block_reads_its_own_scale(self) -> None:
        objective = HGKD(block=(3, 7), stride=(8, 4), supervise="all")
        scales = SimpleNamespace(decoded_channels=5, out_stride=4, cell=4, pyramid_channels={8: 7, 4: 5})
        objective.prepare(Setup(scales, INFO, (2, 2), (2, 2)))
        assert objective.projectors["distill_3"].in_channels == 7
        assert objective.projectors["distill_7"].in_channels == 5
        coarse, fine = torch.randn(1, 7, 1, 1), torch.randn(1, 5, 2, 2)
        out = StudentOutput(fine, pyramid={8: coarse, 4: fine})
        torch.testing.assert_close(
            objective.predict(out, "distill_3"), objective.projectors["distill_3"](coarse).expand(1, 2, 2, 2)
        )
        torch.testing.assert_close(objective.predict(out, "distill_7"), objective.projectors["distill_7"](fine))
        with refused(ValueError, "stride-not-in-decoder", "2", "8", "4"):
            HGKD(stride=2).prepare(Setup(scales, INFO, (2, 2), (2, 2)))

    def test_cosine_term(self) -> None:
        objective = prepared(supervise="all", cosine=0.5)
        identity(objective, "distill")
        # LN_TOKENS are (1, -1) and (-1, 1); (1, 1) has cosine 0 to both, (1, -1) has 1 and -1
        decoded = torch.ones(1, 2, 2, 2)
        decoded[0, 1, 0] = -1.0
        losses = objective(StudentOutput(decoded), TeacherOutput({11: TOKENS}, (2, 2)), LAYOUT)
        assert set(losses) == {"distill", "distill_cosine"}
        assert losses["distill_cosine"].item() == pytest.approx(0.5 * (0 + 2 + 1 + 1) / 4)

    @pytest.mark.parametrize(
        ("options", "refusal"),
        [
            ({"block": ()}, ("blocks-and-strides-differ",)),
            ({"block": (1, 2), "stride": (8,)}, ("blocks-and-strides-differ",)),
            ({"block": (1, 2), "target": "inferred"}, ("blocks-need-full-target", "target='full'")),
            ({"block": (1, 1)}, ("teacher-block-named-twice",)),
            ({"cosine": -1.0}, ("cosine-weight-negative",)),
        ],
    )
    def test_refusals(self, options: dict[str, object], refusal: tuple[str, ...]) -> None:
        with refused(ValueError, *refusal):
            prepared(**options)


class TestVisibleWeight:
    def loss(self, values: list[list[float]], **options: object) -> float:
        objective = prepared(supervise="all", **options)
        identity(objective, "distill")
        out = StudentOutput(offsets(values), [], LAYOUT, torch.zeros(1, 3, 8, 8))
        found = objective(out, TeacherOutput({11: TOKENS}, (2, 2)), LAYOUT)
        return found["distill"].item()

    def test_by_hand(self) -> None:
        # smooth L1 of an offset 1 is 1/4, halved by the second channel; upper left and lower right are visible
        one = 1 / 8
        assert self.loss([[1.0, 0.0], [0.0, 0.0]], visible_weight=0.5) == pytest.approx(0.5 * one / 3)
        assert self.loss([[0.0, 1.0], [0.0, 0.0]], visible_weight=0.5) == pytest.approx(one / 3)
        assert self.loss([[1.0, 1.0], [1.0, 1.0]], visible_weight=0.5) == pytest.approx(one)
        assert self.loss([[1.0, 1.0], [1.0, 1.0]], visible_weight=4.0) == pytest.approx(one)

    def test_one_is_the_plain_mean(self) -> None:
        values = [[1.0, 0.5], [2.0, 0.0]]
        assert self.loss(values, visible_weight=1.0) == self.loss(values)

    @pytest.mark.parametrize(
        "options", [{"visible_weight": 0.0}, {"visible_weight": -1.0}, {"visible_weight": 0.5, "supervise": "masked"}]
    )
    def test_refusals(self, options: dict[str, object]) -> None:
        with pytest.raises(ValueError, match=r"visible_weight=.* must be above 0, and other than 1 only with supervise='all'"):
            HGKD(**{"supervise": "all", **options})
