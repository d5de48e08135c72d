"""Classifiers as teachers: frozen, from files of both kinds, refused when they cannot teach."""

import copy

import pytest
import timm
import torch
from refusals import refused

from hgkd.errors import WeightsError
from hgkd.networks import ImageClassifier
from hgkd.teachers import ClassifierTeacher

TINY = dict(depth=2, embed_dim=32, num_heads=2)


@pytest.fixture
def file(tmp_path):
    """A classifier in timm's naming."""
    torch.save(timm.create_model("test_resnet", num_classes=7).state_dict(), tmp_path / "timm.pth")
    return tmp_path / "timm.pth"


def test_logits_and_feature_of_a_timm_file(file):
    teacher = ClassifierTeacher(file, "test_resnet", allow_random=True)
    network = timm.create_model("test_resnet", num_classes=7).eval()
    network.load_state_dict(torch.load(file))
    images = torch.rand(2, 3, 64, 64)
    out = teacher(images)
    inputs = teacher.classifier.normalise(images)
    with torch.no_grad():
        torch.testing.assert_close(out.logits, network(inputs))
        torch.testing.assert_close(out.feature, network.forward_features(inputs))
    assert teacher.num_classes == 7
    assert teacher.info == "test_resnet, 7 classes"


def test_it_stays_frozen_and_is_shared_by_copies(file):
    teacher = ClassifierTeacher(file, "test_resnet", allow_random=True).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert copy.deepcopy(teacher) is teacher


def test_a_backbone_gives_features_on_its_own_input_size(tmp_path):
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=0, **TINY).state_dict(), tmp_path / "vit.pth")
    options = dict(name="vit_tiny_patch16_224", backbone_only=True, allow_random=True, **TINY)
    teacher = ClassifierTeacher(tmp_path / "vit.pth", image_size=48, **options)
    assert teacher.num_classes is None
    assert teacher.prepare((64, 64)) == (32, 3, 3)
    free = ClassifierTeacher(tmp_path / "vit.pth", **options)
    assert free.prepare((64, 64)) == (32, 4, 4)  # positions fitted to the training's images
    assert free(torch.rand(2, 3, 64, 64)).feature.shape == (2, 32, 4, 4)


def test_half_precision_gives_fp32():
    teacher = ClassifierTeacher(None, "test_resnet", allow_random=True, dtype="bfloat16")
    out = teacher(torch.rand(1, 3, 64, 64))
    assert next(teacher.classifier.network.parameters()).dtype == torch.bfloat16
    assert out.logits.dtype == out.feature.dtype == torch.float32


def test_what_cannot_teach_is_refused(file, tmp_path):
    with refused(ValueError, "teacher-without-weights", "model.teacher.checkpoint"):
        ClassifierTeacher()
    with refused(WeightsError, "teacher-looks-random"):
        ClassifierTeacher(file, "test_resnet")
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=2, **TINY).state_dict(), tmp_path / "vit.pth")
    with refused(WeightsError, "teacher-looks-random"):
        ClassifierTeacher(tmp_path / "vit.pth", "vit_tiny_patch16_224", **TINY)
    with refused(ValueError, "backbone-only-without-name", "backbone_only=True"):
        ClassifierTeacher(file, backbone_only=True)
    with refused(ValueError, "dtype-unknown"):
        ClassifierTeacher(file, "test_resnet", dtype="int8")
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "headless.pth")
    with refused(WeightsError, "teacher-without-classifier", "fc.weight", "fine-tuned", "test_resnet"):
        ClassifierTeacher(tmp_path / "headless.pth", "test_resnet")
    model = ImageClassifier("test_resnet", 3, 64)
    state = {f"classifier.{key}": value for key, value in model.state_dict().items()}
    meta = {"hgkd": {"classifier": model.spec.to_dict(), "format": 1}}
    torch.save({"meta": meta, "state_dict": state}, tmp_path / "own.pth")
    with refused(ValueError, "name-not-needed", "name='test_resnet'"):
        ClassifierTeacher(tmp_path / "own.pth", "test_resnet")
    with refused(ValueError, "option-without-name", "global_pool"):
        ClassifierTeacher(tmp_path / "own.pth", global_pool="avg")
