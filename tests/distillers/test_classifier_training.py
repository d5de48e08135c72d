"""The fine-tuning model: what its losses are made of, what it keeps out, what it refuses."""

import numpy as np
import pytest
import torch
from refusals import refused

from hgkd.distillers import ClassifierTraining

TEACHER = dict(type="ClassifierTeacher", name="test_resnet", allow_random=True, num_classes=3)
HARD = dict(hard=dict(type="HardLabelKD", weight=0.5))


def model(**options):
    arguments = dict(classifier=dict(name="test_resnet"), num_classes=3, image_size=64)
    return ClassifierTraining(**{**arguments, **options})


def batch():
    return torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8), torch.tensor([0, 1, 2, 0])


def test_g2sd_is_half_the_label_and_half_the_teachers_answer():
    built = model(
        classifier=dict(name="test_resnet", two_heads=True), label_weight=0.5, teacher=TEACHER, objectives=HARD
    ).eval()
    inputs, labels = batch()
    with torch.no_grad():
        losses = built(inputs, mode="loss", label=labels)
        images = inputs.float() / 255
        out = built.classifier(built.classifier.normalise(images))
        answers = built.teacher(images).logits.argmax(1)
    cross_entropy = torch.nn.functional.cross_entropy
    torch.testing.assert_close(losses["label_loss"], cross_entropy(out.logits, labels) / 2)
    torch.testing.assert_close(losses["hard_logits_loss"], cross_entropy(out.distilled, answers) / 2)
    assert len(losses) == 2


def test_the_teacher_sees_the_mixed_images_of_the_student(monkeypatch):
    teacher = dict(TEACHER, normalize=((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    built = model(labels=dict(mixup=1.0), teacher=teacher, objectives=HARD)
    seen = {}
    for name, network in (("student", built.classifier), ("teacher", built.teacher.classifier)):
        forward = network.forward
        monkeypatch.setattr(
            network, "forward", lambda x, f=forward, n=name, c=network: seen.update({n: c.denormalise(x)}) or f(x)
        )
    inputs, labels = batch()
    np.random.seed(3)
    built(inputs, mode="loss", label=labels)
    torch.testing.assert_close(seen["teacher"], seen["student"], rtol=1e-4, atol=1e-5)
    assert (seen["student"] - inputs.float() / 255).abs().max() > 0.01


def test_erasing_replaces_a_rectangle():
    built = model(erasing=1.0)
    seen = []
    forward = built.classifier.forward
    built.classifier.forward = lambda x: seen.append(x.clone()) or forward(x)
    inputs, labels = batch()
    built(inputs, mode="loss", label=labels)
    changed = (seen[0] - built.classifier.normalise(inputs.float() / 255)).abs().amax(1) > 1e-6
    assert changed.flatten(1).any(1).all()
    assert not changed.flatten(1).all(1).any()


TWO_HEADS = dict(name="test_resnet", two_heads=True)
NKD = dict(nkd=dict(type="NKD"))
MGD = dict(mgd=dict(type="FeatureMapMGD"))


@pytest.mark.parametrize(
    "options",
    [
        dict(classifier=TWO_HEADS, objectives={**HARD, **MGD}),
        dict(classifier=dict(name="deit_tiny_distilled_patch16_224", depth=2, embed_dim=48), objectives=HARD),
        dict(label_weight=0.0, objectives=NKD),
        dict(objectives=dict(kd=dict(type="LogitKD"))),
    ],
)
def test_every_trained_parameter_gets_a_gradient_and_the_teacher_stays_out(options):
    built = model(teacher=TEACHER, **options).train()
    built.check_heads()
    inputs, labels = batch()
    sum(built(inputs, mode="loss", label=labels).values()).backward()
    assert all(p.grad is not None for p in built.parameters() if p.requires_grad)
    assert not [name for name in built.state_dict() if "teacher" in name]
    assert not built.teacher.training
    assert not any(p.grad is not None for p in built.teacher.parameters())
    built.to(torch.float64)  # anything that goes through _apply
    assert next(built.teacher.classifier.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "idle"),
    [
        (dict(), "second"),
        (dict(teacher=TEACHER, objectives=NKD), "second"),
        (dict(teacher=TEACHER, objectives=MGD), "second"),
        (dict(teacher=TEACHER, objectives=HARD, label_weight=0.0), "class"),
    ],
)
def test_a_head_that_nothing_trains_is_refused(options, idle):
    built = model(classifier=TWO_HEADS, **options)
    with refused(ValueError, "head-not-trained", idle):
        built.check_heads()


def test_predict_says_scores_and_labels():
    inputs, labels = batch()
    samples = model().eval()(inputs, mode="predict", label=labels, index=torch.arange(4))
    assert [(s.label, s.index) for s in samples] == [(0, 0), (1, 1), (2, 2), (0, 3)]
    assert samples[0].scores.shape == (3,)
    with refused(ValueError, "mode-unknown", "loss", "predict", "tensor", "train"):
        model()(inputs, mode="train")


def test_classes_are_noted_and_compared():
    built = model(teacher=TEACHER, objectives=HARD)
    built.set_classes(("a", "b", "c"))
    assert built.meta()["classifier"]["classes"] == ("a", "b", "c")
    built.teacher.classes = ("a", "b", "d")
    with refused(ValueError, "teacher-classes-differ", "fine-tuned", "teacher_checkpoint"):
        built.set_classes(("a", "b", "c"))
    with refused(ValueError, "classes-differ", "2", "3", "num_classes=2"):
        built.set_classes(("a", "b"))


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        (dict(objectives=HARD), ("teacher-and-objectives-half-set", "objectives=['hard']")),
        (dict(teacher=TEACHER), ("teacher-and-objectives-half-set",)),
        (dict(erasing=1.5), ("erasing-out-of-range", "[0, 1]", "1.5")),
        (dict(label_weight=0.0), ("label-weight-zero", "label_weight=0.0")),
        (dict(num_classes=4, teacher=TEACHER, objectives=HARD), ("teacher-classes-needed", "fine-tuned", "4", "hard")),
    ],
)
def test_what_does_not_fit_together_is_refused(options, refusal):
    with refused(ValueError, *refusal):
        model(**options)


def test_mgd_takes_a_teacher_of_other_classes():
    model(num_classes=4, teacher=TEACHER, objectives=dict(mgd=dict(type="FeatureMapMGD")))


@pytest.mark.parametrize("kind", ["HGKD", "PixelReconstruction", "MGD"])
def test_an_objective_of_masked_distillation_is_refused_by_name(kind):
    with refused(ValueError, "objective-of-wrong-kind", "own", kind, "fine-tuning", "FeatureMapMGD"):
        model(teacher=TEACHER, objectives=dict(own=dict(type=kind)))


def test_a_teacher_that_overflows_is_named_before_the_first_step():
    teacher = dict(TEACHER, name="vit_tiny_patch16_224", depth=2, embed_dim=32, num_heads=2, dtype="float16")
    built = model(teacher=teacher, objectives=HARD)
    layer = built.teacher.classifier.network.blocks[1].mlp.fc2
    layer.weight.data.fill_(3e4)
    layer.bias.data.fill_(3e4)
    inputs, labels = batch()
    with refused(ValueError, "teacher-not-finite", "1", "inf", "float16", "dtype=bfloat16"):
        built(inputs, mode="loss", label=labels)
