"""G2SD's generic loss against a plain reference, for both kinds of student, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from teaching import CELLS, ENCODER_ONLY, GRID, INFO, make_student, on_positions, rows, run, teacher_out

from hgkd.objectives import G2SD, Setup
from hgkd.structures import TeacherNeeds


@pytest.mark.parametrize("kind", ["vit", "cnn"])
@pytest.mark.parametrize(
    ("supervise", "positions"),
    [("masked", ~on_positions(CELLS)), ("all", on_positions(CELLS) | True), ("visible", on_positions(CELLS))],
)
def test_it_is_smooth_l1_to_the_normalised_decoder_state(kind, supervise, positions):
    student = make_student(kind).eval()
    objective = G2SD(supervise=supervise)
    objective.prepare(Setup(student, INFO, GRID, (2, 2)))
    out, layout = run(student)
    teacher = teacher_out(())
    fc1, _, fc2 = objective.projector
    x = rows(out.decoded, positions)
    x = F.gelu(x @ fc1.weight.flatten(1).T + fc1.bias) @ fc2.weight.flatten(1).T + fc2.bias
    expected = F.smooth_l1_loss(x, F.layer_norm(rows(teacher.decoded, positions), (10,), eps=1e-6), beta=2.0)
    losses = objective(out, teacher, layout)
    assert list(losses) == ["decoder"]
    torch.testing.assert_close(losses["decoder"], expected)


def test_gradients_reach_the_student_and_not_the_teacher():
    student = make_student("cnn")
    objective = G2SD()
    objective.prepare(Setup(student, INFO, GRID, (2, 2)))
    out, layout = run(student)
    teacher = teacher_out(())
    teacher.decoded.requires_grad_(True)
    objective(out, teacher, layout)["decoder"].backward()
    assert teacher.decoded.grad is None
    assert all(p.grad is not None and p.grad.any() for p in objective.parameters())
    assert student.encoder.conv1[0].weight.grad.any()


def test_needs_the_decoder_on_visible_patches():
    assert G2SD().needs == TeacherNeeds(decoder_block=3, visible_only=True)
    objective = G2SD(decoder_block=-1)
    objective.prepare(Setup(make_student("vit"), INFO, GRID, (2, 2)))
    assert objective.needs == TeacherNeeds(decoder_block=3, visible_only=True)


def test_refusals():
    student = make_student("vit")
    with refused(ValueError, "teacher-without-decoder", "mae-encoder", "0.2", "0.02"):
        G2SD().prepare(Setup(student, ENCODER_ONLY, GRID, (2, 2)))
    with refused(ValueError, "teacher-block-out-of-range", "decoder_block", "4"):
        G2SD(decoder_block=4).prepare(Setup(student, INFO, GRID, (2, 2)))
    with refused(ValueError, "objective-without-teacher", "G2SD"):
        G2SD().prepare(Setup(student, None, None, (2, 2)))
    with refused(ValueError, "beta-not-positive", "0"):
        G2SD(beta=0)
    with refused(ValueError, "supervise-unknown"):
        G2SD(supervise="hidden")
    objective = G2SD()
    objective.prepare(Setup(student, INFO, GRID, (2, 2)))
    everything = student(torch.rand(2, 3, 64, 64))
    with refused(ValueError, "nothing-supervised", "hidden"):
        objective(everything, teacher_out(()), everything.layout)
