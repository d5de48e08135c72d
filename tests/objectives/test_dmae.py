"""DMAE against torch's own losses on the visible tokens, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from teaching import CELLS, GRID, INFO, make_student, on_positions, rows, run, teacher_out

from hgkd.objectives import DMAE, Setup
from hgkd.objectives.masked.dmae import l1_of_directions, l2_of_directions
from hgkd.structures import TeacherNeeds


def prepared(student, **options):
    objective = DMAE(**options)
    objective.prepare(Setup(student, INFO, GRID, (2, 2)))
    return objective


@pytest.mark.parametrize(("kind", "level"), [("vit", 1), ("vit", None), ("cnn", None), ("cnn", 2)])
@pytest.mark.parametrize(("distance", "loss"), [("l1", torch.nn.L1Loss()), ("l2", torch.nn.MSELoss())])
@pytest.mark.parametrize("projector", ["linear", "mlp", "mlp2"])
def test_it_is_torchs_loss_on_visible_normalised_tokens(kind, level, distance, loss, projector):
    student = make_student(kind).eval()
    objective = prepared(student, taps=((level, 2),), distance=distance, projector=projector)
    out, layout = run(student)
    teacher = teacher_out(visible_only=True)
    index = {("vit", None): 2, ("cnn", None): 2}.get((kind, level), level)  # stride 16 of 4, 8, 16, 32
    feature = out.features[index].to_dense()
    assert feature.shape[-2:] == GRID
    expected = loss(
        F.normalize(rows(objective.projectors["2"](feature), on_positions(CELLS)), dim=-1),
        F.normalize(rows(teacher.tokens[2], on_positions(CELLS)), dim=-1),
    )
    losses = objective(out, teacher, layout)
    assert list(losses) == ["align_2"]
    torch.testing.assert_close(losses["align_2"], expected)


def test_a_finer_level_is_averaged_within_cells():
    student = make_student("cnn").eval()
    objective = prepared(student, taps=((0, 1),))
    out, layout = run(student)
    assert out.features[0].to_dense().shape[-2:] == (16, 16)
    with torch.no_grad():
        feature = F.avg_pool2d(out.features[0].to_dense(), 4)
        expected = F.l1_loss(
            F.normalize(rows(objective.projectors["1"](feature), on_positions(CELLS)), dim=-1),
            F.normalize(rows((teacher := teacher_out()).tokens[1], on_positions(CELLS)), dim=-1),
        )
    torch.testing.assert_close(objective(out, teacher, layout)["align_1"], expected)


def test_hidden_places_of_the_teacher_do_not_count():
    student = make_student("cnn").eval()
    objective = prepared(student, taps=((None, 3),))
    out, layout = run(student)
    teacher = teacher_out()
    before = objective(out, teacher, layout)
    teacher.tokens[3] = torch.where(on_positions(CELLS)[:, None], teacher.tokens[3], torch.nan)
    torch.testing.assert_close(objective(out, teacher, layout), before)


def test_by_hand():
    # directions (1, 0) and (0.6, 0.8): |0.4| + |0.8| over two channels
    a, b = torch.tensor([5.0, 0.0]).view(1, 2, 1, 1), torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    assert l1_of_directions(a, b).item() == pytest.approx(0.6)
    assert l2_of_directions(a, b).item() == pytest.approx((0.16 + 0.64) / 2)
    assert l1_of_directions(a, 7 * a).item() == 0


def test_several_taps_have_their_own_projectors_and_gradients():
    student = make_student("vit")
    objective = prepared(student, taps=((0, 1), (-1, -1)), projector="mlp")
    out, layout = run(student)
    losses = objective(out, teacher_out(), layout)
    assert list(losses) == ["align_1", "align_3"]
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.any() for p in objective.parameters())
    assert all(p.grad is not None and p.grad.any() for p in student.network.blocks.parameters() if p.numel() > 16)


def test_the_teacher_runs_partially_and_on_visible_patches():
    assert prepared(make_student("vit"), taps=((0, 1), (2, -2))).needs == TeacherNeeds(blocks=(1, 2), visible_only=True)


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"taps": ()}, ("taps-not-pairs",)),
        ({"taps": ((8,),)}, ("taps-not-pairs",)),
        ({"taps": ((1, None),)}, ("taps-not-pairs",)),
        ({"taps": (8, 17)}, ("taps-not-pairs", "(8, 17)")),
        ({"taps": (("8", 17),)}, ("taps-not-pairs", "'8'")),
        ({"taps": ((1, 9),)}, ("teacher-block-out-of-range", "block", "9", "4")),
        ({"taps": ((7, 1),)}, ("student-level-out-of-range", "7", "4")),
        (
            {"taps": ((3, 1),)},
            ("student-level-no-multiple", "3", "32", "4 x 4", "2", "16"),
        ),
        ({"taps": ((1, 1), (2, 1))}, ("teacher-block-named-twice",)),
        ({"distance": "l3"}, ("distance-unknown", "l1", "l2", "l3")),
        ({"projector": "conv"}, ("projector-unknown",)),
    ],
)
def test_refusals(options, refusal):
    with refused(ValueError, *refusal):
        prepared(make_student("cnn"), **options)


def test_refuses_a_student_that_is_too_coarse_and_no_teacher():
    student = make_student("cnn")
    with refused(ValueError, "objective-without-teacher", "DMAE"):
        DMAE().prepare(Setup(student, None, None, (2, 2)))
    with refused(ValueError, "student-too-coarse", "32 x 32"):
        DMAE().prepare(Setup(student, INFO, (32, 32), (2, 2)))
