"""MGD against a plain reference with the same masks, its masks' shares, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused
from teaching import CELLS, GRID, INFO, make_student, on_positions, rows, run, teacher_out
from torch import nn

from hgkd.objectives import MGD, MGDLoss, Setup
from hgkd.objectives.generation import draw_visible
from hgkd.structures import TeacherNeeds


@pytest.mark.parametrize(("mask", "shape"), [("channel", (2, 6, 1, 1)), ("position", (2, 1, 5, 4))])
@pytest.mark.parametrize("channels", [3, 6])
def test_published_form(mask, shape, channels):
    loss = MGDLoss(channels, 6, mask, ratio=0.4, alpha=2e-5)
    student, teacher = torch.randn(2, channels, 5, 4), torch.randn(2, 6, 5, 4)
    torch.manual_seed(3)
    got = loss(student, teacher)
    torch.manual_seed(3)
    hidden = torch.rand(shape) < 0.4
    aligned = student if channels == 6 else F.conv2d(student, loss.align.weight, loss.align.bias)
    first, _, second = loss.generation
    x = F.conv2d(aligned.masked_fill(hidden, 0.0), first.weight, first.bias, padding=1).relu()
    x = F.conv2d(x, second.weight, second.bias, padding=1)
    torch.testing.assert_close(got, 2e-5 * nn.MSELoss(reduction="sum")(x, teacher) / 2)
    assert isinstance(loss.align, nn.Identity) == (channels == 6)


def test_mean_form_does_not_depend_on_the_size_of_the_map():
    loss = MGDLoss(4, 4, ratio=0.0, alpha=1.0, reduction="mean")
    nn.init.zeros_(loss.generation[2].weight)
    nn.init.zeros_(loss.generation[2].bias)  # the generator says 0 everywhere
    for side in (2, 7):
        assert loss(torch.randn(3, 4, side, side), torch.full((3, 4, side, side), 2.0)).item() == pytest.approx(4.0)


@settings(max_examples=20, deadline=None)
@given(ratio=st.floats(0.0, 0.95), mask=st.sampled_from(["channel", "position"]), seed=st.integers(0, 1000))
def test_share_of_hidden(ratio, mask, seed):
    feature = torch.zeros(64, 40, 8, 5)
    visible = draw_visible(feature, mask, ratio, torch.Generator().manual_seed(seed))
    assert visible.dtype == torch.bool
    assert abs(1 - visible.float().mean().item() - ratio) < 5 * (0.25 / 2560) ** 0.5


def test_a_fresh_mask_on_every_forward_and_gradients():
    loss = MGDLoss(4, 6, "position", ratio=0.5).eval()
    student, teacher = torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(2, 6, 6, 6, requires_grad=True)
    assert loss(student, teacher) != loss(student, teacher)
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.any()
    assert all(p.grad is not None and p.grad.any() for p in loss.parameters())


@pytest.mark.parametrize("kind", ["vit", "cnn"])
@pytest.mark.parametrize("feature", ["decoded", None])
@pytest.mark.parametrize(("supervise", "positions"), [("all", on_positions(CELLS) | True), ("masked", ~on_positions(CELLS))])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_as_an_objective(kind, feature, supervise, positions, reduction):
    student = make_student(kind).eval()
    objective = MGD(feature, block=1, supervise=supervise, reduction=reduction, alpha=0.5)
    objective.prepare(Setup(student, INFO, GRID, (2, 2)))
    assert objective.needs == TeacherNeeds(blocks=(1,))
    out, layout = run(student)
    teacher = teacher_out()
    torch.manual_seed(5)
    got = objective(out, teacher, layout)
    torch.manual_seed(5)
    source = out.features[2].to_dense() if feature is None else F.interpolate(out.decoded, GRID)
    restored = rows(objective.loss.restore(source), positions)
    target = F.layer_norm(rows(teacher.tokens[1], positions), (12,), eps=1e-6)
    squares = F.mse_loss(restored, target, reduction=reduction)
    assert list(got) == ["generation"]
    torch.testing.assert_close(got["generation"], 0.5 * (squares if reduction == "mean" else squares / 2))


def test_raw_tokens_are_the_published_target():
    objective = MGD(normalise=False)
    objective.prepare(Setup(make_student("vit"), INFO, GRID, (2, 2)))
    teacher = teacher_out()
    torch.testing.assert_close(objective.target_map(teacher), teacher.tokens[3])


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"mask": "pixel"}, ("generation-mask-unknown", "channel", "position", "pixel")),
        ({"ratio": 1.0}, ("hidden-ratio-out-of-range", "0", "1", "1.0")),
        ({"reduction": "max"}, ("reduction-unknown", "sum", "mean")),
        ({"reduction": "mean", "alpha": 7e-5}, ("alpha-of-sum", "7e-05", "reduction='sum'")),
        ({"feature": "last"}, ("feature-unknown", "decoded")),
        ({"feature": 9}, ("student-level-out-of-range", "9")),
        ({"block": 4}, ("teacher-block-out-of-range", "block", "4")),
        ({"supervise": "some"}, ("supervise-unknown",)),
    ],
)
def test_refusals(options, refusal):
    with refused(ValueError, *refusal):
        MGD(**options).prepare(Setup(make_student("cnn"), INFO, GRID, (2, 2)))


def test_maps_that_differ_are_refused():
    with refused(ValueError, "shapes-differ", "(1, 4, 3, 3)", "(1, 4, 1, 3)"):
        MGDLoss(4, 4)(torch.zeros(1, 4, 3, 3), torch.zeros(1, 4, 1, 3))
    with refused(ValueError, "objective-without-teacher", "MGD"):
        MGD().prepare(Setup(make_student("vit"), None, None, (2, 2)))
