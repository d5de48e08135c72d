"""Losses of fine-tuning: hand-computed values, targets of mixed labels, gradients, refusals."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refused

from hgkd.networks import ClassifierOutput
from hgkd.objectives import NKD, FeatureMapMGD, HardLabelKD, LogitKD
from hgkd.objectives.finetuning.labels import LabelLoss
from hgkd.objectives.generation import MGDLoss


def logits(*probabilities):
    return torch.tensor([probabilities]).log()


def one_hot(label, classes):
    return torch.nn.functional.one_hot(torch.tensor([label]), classes).float()


def test_cross_entropy_with_smoothing_by_hand():
    loss = LabelLoss(4, smoothing=0.2)
    inputs, targets = loss.mix(torch.zeros(1, 3, 2, 2), torch.tensor([1]))
    torch.testing.assert_close(targets, torch.tensor([[0.05, 0.85, 0.05, 0.05]]))
    expected = -(0.05 * math.log(0.1) + 0.85 * math.log(0.4) + 0.05 * math.log(0.3) + 0.05 * math.log(0.2))
    assert loss(logits(0.1, 0.4, 0.3, 0.2), targets).item() == pytest.approx(expected)
    assert inputs.shape == (1, 3, 2, 2)


def test_binary_cross_entropy_takes_both_classes_of_a_mixed_image_as_right():
    values = torch.tensor([[0.0, math.log(3.0), -math.log(3.0)]])  # sigmoids 1/2, 3/4, 1/4
    targets = torch.tensor([[0.7, 0.3, 0.0]])
    hard = LabelLoss(3, "bce", threshold=0.2)(values, targets)
    assert hard.item() == pytest.approx(-(math.log(1 / 2) + math.log(3 / 4) + math.log(3 / 4)) / 3)
    soft = LabelLoss(3, "bce")(values, targets)
    by_hand = math.log(1 / 2) + 0.3 * math.log(3 / 4) + 0.7 * math.log(1 / 4) + math.log(3 / 4)
    assert soft.item() == pytest.approx(-by_hand / 3)


def test_mixup_mixes_images_and_targets_with_the_same_share():
    np.random.seed(0)
    loss = LabelLoss(2, mixup=1.0)
    images = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    mixed, targets = loss.mix(images.clone(), torch.tensor([0, 1]))
    share = mixed[0, 0, 0, 0].item()  # of the second image
    assert 0 < share < 1
    torch.testing.assert_close(targets, torch.tensor([[1 - share, share], [share, 1 - share]]))


def test_cutmix_targets_are_the_shares_of_the_area():
    loss = LabelLoss(2, cutmix=1.0)
    images = torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)])
    for seed in range(5):
        np.random.seed(seed)
        mixed, targets = loss.mix(images.clone(), torch.tensor([0, 1]))
        share = mixed[0].mean().item()
        torch.testing.assert_close(targets[0], torch.tensor([1 - share, share]))


@settings(max_examples=20, deadline=None)
# exponents of a beta distribution, which NumPy cannot draw from where they are next to nothing
@given(st.integers(2, 6), st.floats(0, 0.5), *[st.just(0.0) | st.floats(0.05, 1)] * 2, st.floats(0, 1), st.integers(0, 10))
def test_targets_are_distributions(classes, smoothing, mixup, cutmix, share, seed):
    np.random.seed(seed)
    loss = LabelLoss(classes, smoothing=smoothing, mixup=mixup, cutmix=cutmix, mix_probability=share)
    _, targets = loss.mix(torch.rand(4, 3, 8, 8), torch.arange(4) % classes)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    assert (targets >= 0).all()


def test_hard_label_by_hand():
    value = HardLabelKD().value(logits(0.2, 0.5, 0.3), logits(0.6, 0.3, 0.1), one_hot(1, 3))
    assert value.item() == pytest.approx(-math.log(0.2))  # the teacher's answer, whatever the label


def test_soft_label_by_hand():
    student, teacher = logits(0.5, 0.5), logits(0.9, 0.1)
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert LogitKD(1.0).value(student, teacher, one_hot(0, 2)).item() == pytest.approx(expected, rel=1e-5)
    # at temperature 2 a probability becomes its root: 3/4 and 1/4, and the loss is multiplied by 4
    expected = 4 * (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    assert LogitKD(2.0).value(student, teacher, one_hot(0, 2)).item() == pytest.approx(expected, rel=1e-5)
    assert LogitKD(3.0).value(teacher, teacher, one_hot(0, 2)).item() == pytest.approx(0, abs=1e-6)


def test_nkd_by_hand():
    # classes other than the true one: student 0.3 : 0.2, teacher 0.1 : 0.3
    student, teacher = logits(0.5, 0.3, 0.2), logits(0.6, 0.1, 0.3)
    of_true = -0.6 * math.log(0.5)
    of_others = -(0.25 * math.log(0.6) + 0.75 * math.log(0.4))
    value = NKD(temperature=1.0, gamma=1.5).value(student, teacher, one_hot(0, 3))
    assert value.item() == pytest.approx(of_true + 1.5 * of_others, rel=1e-5)
    roots = [math.sqrt(0.3) / (math.sqrt(0.3) + math.sqrt(0.2)), math.sqrt(0.1) / (math.sqrt(0.1) + math.sqrt(0.3))]
    cooler = -(roots[1] * math.log(roots[0]) + (1 - roots[1]) * math.log(1 - roots[0]))
    value = NKD(temperature=2.0).value(student, teacher, one_hot(0, 3))
    assert value.item() == pytest.approx(of_true + 4 * cooler, rel=1e-5)


def test_nkd_of_a_mixed_label_takes_its_largest_part_and_stays_finite():
    student = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    value = NKD().value(student, torch.tensor([[-200.0, 0.0, 200.0]]), torch.tensor([[0.4, 0.6, 0.0]]))
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
    assert NKD().value(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1)).item() == 0.0


@pytest.mark.parametrize(("objective", "learns", "other"), [(HardLabelKD(), 1, 0), (LogitKD(), 1, 0), (NKD(), 0, 1)])
def test_one_head_learns_and_the_teacher_does_not(objective, learns, other):
    parts = [torch.randn(4, 3, requires_grad=True) for _ in range(3)]
    student = ClassifierOutput(parts[0], parts[1], torch.zeros(4, 2, 1, 1))
    teacher = ClassifierOutput(parts[2], parts[2], torch.zeros(4, 2, 1, 1))
    (value,) = objective(student, teacher, one_hot(1, 3).expand(4, 3)).values()
    value.backward()
    assert parts[other].grad is None
    assert parts[learns].grad.abs().sum() > 0
    assert parts[2].grad is None


def test_mgd_in_fine_tuning_is_mgd_on_the_last_maps():
    objective = FeatureMapMGD()
    objective.prepare((3, 2, 2), (5, 2, 2))
    student, teacher = torch.randn(2, 3, 2, 2, requires_grad=True), torch.randn(2, 5, 2, 2)
    outputs = [ClassifierOutput(torch.zeros(2, 1), torch.zeros(2, 1), feature) for feature in (student, teacher)]
    torch.manual_seed(0)
    found = objective(*outputs, torch.zeros(2, 1))["generation"]
    torch.manual_seed(0)
    restored = objective.loss.generation(objective.loss.align(student) * (torch.rand(2, 5, 1, 1) >= 0.15))
    torch.testing.assert_close(found, 7e-5 * (restored - teacher).square().sum() / 2)
    found.backward()
    assert student.grad.abs().sum() > 0


def test_mgd_refuses_what_is_no_map_before_the_first_step():
    with refused(ValueError, "classifier-without-map", "student", "(49, 768)", "LogitKD"):
        FeatureMapMGD().prepare((49, 768), (5, 2, 2))
    with refused(ValueError, "classifier-without-map", "teacher", "(49, 768)"):
        FeatureMapMGD().prepare((5, 2, 2), (49, 768))


def test_mgd_brings_the_student_to_the_teachers_grid_and_may_normalise():
    objective = FeatureMapMGD(normalise=True, ratio=0.0, alpha=1.0, reduction="mean")
    objective.prepare((4, 4, 4), (4, 2, 2))
    objective.loss.generation = torch.nn.Identity()
    student, teacher = torch.randn(1, 4, 4, 4), 100 + 10 * torch.randn(1, 4, 2, 2)
    outputs = [ClassifierOutput(torch.zeros(1, 1), torch.zeros(1, 1), feature) for feature in (student, teacher)]
    target = torch.nn.functional.layer_norm(teacher.movedim(1, -1), (4,), eps=1e-6).movedim(-1, 1)
    expected = (torch.nn.functional.avg_pool2d(student, 2) - target).square().mean()
    torch.testing.assert_close(objective(*outputs, torch.zeros(1, 1))["generation"], expected)
    with pytest.raises(RuntimeError, match="prepare"):
        FeatureMapMGD()(*outputs, torch.zeros(1, 1))
    assert isinstance(objective.loss, MGDLoss)


@pytest.mark.parametrize(
    ("build", "refusal"),
    [
        (lambda: LabelLoss(2, "focal"), ("loss-unknown", "cross_entropy", "bce", "focal")),
        (lambda: LabelLoss(2, smoothing=1.0), ("smoothing-out-of-range", "0", "1", "1.0")),
        (lambda: LabelLoss(2, threshold=0.2), ("threshold-out-of-range", "threshold=0.2", "loss='bce'", "0", "1")),
        (lambda: LabelLoss(2, mixup=-1.0), ("mixing-out-of-range", "0")),
        (
            lambda: LabelLoss(2, cutmix=1.0).mix(torch.zeros(3, 3, 2, 2), torch.zeros(3).long()),
            ("odd-batch", "3"),
        ),
        (lambda: LogitKD(0.0), ("temperature-not-positive", "0", "0.0")),
        (lambda: NKD(gamma=-1.0), ("temperature-or-gamma-out-of-range", "0", "1.0", "-1.0")),
        (lambda: FeatureMapMGD(mask="pixel"), ("generation-mask-unknown", "pixel")),
    ],
)
def test_options_out_of_range_are_refused(build, refusal):
    with refused(ValueError, *refusal):
        build()
