"""``--part classifier``: a fine-tuned CNN leaves with its head, two heads as the one that they are together."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from refusals import refused
from student_checkpoints import randomised

from hgkd.errors import DataError, WeightsError
from hgkd.evaluation import load_extractor
from hgkd.export import export, load_backbone
from hgkd.export.classifier import read_classifier
from hgkd.export.exporter import _read_images
from hgkd.networks import ImageClassifier

CLASSES = ("cat", "dog", "yak")


def write(path: Path, name: str = "test_resnet", **options: object) -> ImageClassifier:
    model = ImageClassifier(name, 3, 64, **{"normalize": ((0.4, 0.5, 0.6), (0.2, 0.2, 0.3)), **options})
    randomised(model)
    spec = {"classifier": replace(model.spec, classes=CLASSES).to_dict(), "format": 1}
    state = {f"classifier.{key}": value for key, value in model.state_dict().items()}
    torch.save({"meta": {"hgkd": spec}, "state_dict": state}, path)
    return model


MEMBERS = [
    ("resnet50", {"layers": (1, 1, 1, 1)}, False),
    ("test_resnet", {}, True),
    ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}, True),  # has a norm between pooling and head
    ("mobilenetv3_small_050", {}, True),  # has a layer there
]


@pytest.mark.parametrize(("name", "kwargs", "two_heads"), MEMBERS)
@torch.no_grad()
def test_timm_gives_the_logits(tmp_path: Path, name: str, kwargs: dict, two_heads: bool) -> None:
    source = write(tmp_path / "a.pth", name, two_heads=two_heads, **kwargs).eval()
    report = export(tmp_path / "a.pth", tmp_path / "out", part="classifier")
    assert report.max_difference < 1e-5
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.rand(2, 3, 64, 96)
    mean, std = (torch.tensor(again.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    expected = source.predict(source.normalise(images))
    assert expected.shape == (2, 3)
    torch.testing.assert_close(again((images - mean) / std), expected, rtol=1e-5, atol=1e-5)
    assert again.pretrained_cfg["input_size"] == [3, 64, 64]  # that of the training
    assert list(again.pretrained_cfg["label_names"]) == list(CLASSES)
    export(tmp_path / "a.pth", tmp_path / "backbone")  # the same checkpoint without its head
    features = [load_backbone(tmp_path / folder).forward_features(images) for folder in ("backbone", "out")]
    assert torch.equal(*features)


def test_its_pixel_statistics_are_those_of_what_is_read_back_and_exported_again(tmp_path: Path) -> None:
    pixels = write(tmp_path / "a.pth").pixel_values()
    export(tmp_path / "a.pth", tmp_path / "out", part="classifier")
    export(tmp_path / "out", tmp_path / "again")
    for folder in (tmp_path / "out", tmp_path / "again"):
        assert load_extractor(folder).pixel_values() == pixels
        assert ImageClassifier("test_resnet", 3, 64, backbone=folder).pixel_values() == pixels
        found = timm.create_model(f"local-dir:{folder}", pretrained=True).pretrained_cfg
        torch.testing.assert_close({key: found[key] for key in pixels}, pixels)
    default = ImageClassifier("test_resnet", 3)
    write(tmp_path / "b.pth", normalize=(default.spec.mean, default.spec.std))
    assert read_classifier(tmp_path / "b.pth").spec.pixels is None  # what timm notes for the name is not noted twice


@torch.no_grad()
def test_a_program_gives_the_logits_of_images_in_0_1(tmp_path: Path) -> None:
    source = write(tmp_path / "a.pth", two_heads=True)
    export(tmp_path / "a.pth", tmp_path / "out", "pt2", part="classifier")
    images = torch.rand(2, 3, 96, 128)
    found = torch.export.load(str(tmp_path / "out/model.pt2")).module()(images)
    torch.testing.assert_close(found, source.predict(source.normalise(images)), rtol=1e-5, atol=1e-5)


def test_an_onnx_graph_is_measured_by_the_classes_that_were_trained(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    source = write(tmp_path / "a.pth", two_heads=True).eval()
    for i in range(16):  # one class of three is not among the images
        file = tmp_path / "pictures" / ("dog", "yak")[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (16 * i, 255 - 16 * i, 90)).save(file)
    report = export(tmp_path / "a.pth", tmp_path / "out", "onnx", part="classifier", images=tmp_path / "pictures", labels=True)
    images, labels = _read_images(tmp_path / "pictures", 16, read_classifier(tmp_path / "a.pth"), labelled=True)
    assert labels.tolist() == [1] * 8 + [2] * 8
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx", providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
    with torch.no_grad():
        torch.testing.assert_close(found, source.predict(source.normalise(images)), rtol=1e-4, atol=1e-4)
    assert report.table[0]["top1"] == pytest.approx((found.argmax(1) == labels)[1::2].float().mean().item())

    (tmp_path / "pictures/dog").rename(tmp_path / "pictures/wolf")
    with refused(DataError, "class-not-known", "wolf", "dog", "yak"):
        export(tmp_path / "a.pth", tmp_path / "new", "onnx", part="classifier", images=tmp_path / "pictures", labels=True)


def test_refusals(tmp_path: Path) -> None:
    write(tmp_path / "a.pth")
    with refused(ValueError, "target-without-part", "torchvision", "backbone", "classifier"):
        export(tmp_path / "a.pth", tmp_path / "out", "torchvision", part="classifier")
    for options in ({"classifier": tmp_path / "head.safetensors"}, {"output": "features"}):
        with refused(ValueError, "logits-of-classifier"):
            export(tmp_path / "a.pth", tmp_path / "out", "pt2", part="classifier", **options)
    with refused(ValueError, "backbone-options-for-model", "part='classifier'"):
        export(tmp_path / "a.pth", tmp_path / "out", part="classifier", encoder="test_resnet")
    with refused(WeightsError, "checkpoint-is-a-folder"):
        export(tmp_path, tmp_path / "out", part="classifier")
    write(tmp_path / "cifar.pth", "resnet10t", stem="cifar")
    with refused(WeightsError, "stem-not-in-timm-config", "cifar"):
        export(tmp_path / "cifar.pth", tmp_path / "out", part="classifier")
    torch.save({"meta": {}, "state_dict": {}}, tmp_path / "b.pth")
    with refused(WeightsError, "checkpoint-not-of-finetuning", "fine-tuning"):
        export(tmp_path / "b.pth", tmp_path / "out", part="classifier")
    write(tmp_path / "vit.pth", "vit_tiny_patch16_224", depth=1, embed_dim=32, num_heads=2)
    with refused(WeightsError, "vit-not-exported"):
        export(tmp_path / "vit.pth", tmp_path / "out", part="classifier")
    with refused(WeightsError, "vit-where-cnn-needed", "vit_tiny_patch16_224", "expected a CNN"):
        export(tmp_path / "vit.pth", tmp_path / "out")


def test_the_backbone_of_a_classifier_of_another_pooling_leaves_without_it(tmp_path: Path) -> None:
    model = write(tmp_path / "a.pth", global_pool="max").eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.network.forward_features(images)
        for part in ("backbone", "classifier"):
            export(tmp_path / "a.pth", tmp_path / part, part=part)
            torch.testing.assert_close(load_backbone(tmp_path / part).forward_features(images), expected)
        whole = timm.create_model(f"local-dir:{tmp_path / 'classifier'}", pretrained=True).eval()
        inputs = model.normalise(images)
        torch.testing.assert_close(whole(inputs), model.predict(inputs), rtol=1e-5, atol=1e-5)
