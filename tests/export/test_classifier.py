"""``--what classifier``: a fine-tuned CNN leaves with its head, two heads as the one that they are together."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from student_checkpoints import randomised

from hgkd.classifiers import ImageClassifier
from hgkd.errors import WeightsError
from hgkd.export import export

CLASSES = ("cat", "dog", "yak")


def write(path: Path, name: str = "test_resnet", **options: object) -> ImageClassifier:
    model = ImageClassifier(name, 3, 64, normalize=((0.4, 0.5, 0.6), (0.2, 0.2, 0.3)), **options)
    randomised(model)
    spec = {"classifier": replace(model.spec, classes=CLASSES).to_dict(), "format": 1}
    state = {f"classifier.{key}": value for key, value in model.state_dict().items()}
    torch.save({"meta": {"hgkd": spec}, "state_dict": state}, path)
    return model


@pytest.mark.parametrize("two_heads", [False, True])
@torch.no_grad()
def test_timm_gives_the_logits(tmp_path: Path, two_heads: bool) -> None:
    source = write(tmp_path / "a.pth", two_heads=two_heads)
    report = export(tmp_path / "a.pth", tmp_path / "out", what="classifier")
    assert report.max_difference < 1e-5
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    images = torch.rand(2, 3, 64, 96)
    mean, deviation = (torch.tensor(again.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    expected = source.predict(source.normalise(images))
    assert expected.shape == (2, 3)
    torch.testing.assert_close(again((images - mean) / deviation), expected, rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "out/config.json").read_text())["label_names"] == list(CLASSES)
    backbone = export(tmp_path / "a.pth", tmp_path / "backbone")  # what the backbone is worth is unchanged
    assert backbone.parameters == report.parameters - 3 * (source.network.num_features + 1)


@torch.no_grad()
def test_a_program_gives_the_logits_of_images_in_0_1(tmp_path: Path) -> None:
    source = write(tmp_path / "a.pth", two_heads=True)
    export(tmp_path / "a.pth", tmp_path / "out", "program", what="classifier")
    images = torch.rand(2, 3, 96, 128)
    found = torch.export.load(str(tmp_path / "out/model.pt2")).module()(images)
    torch.testing.assert_close(found, source.predict(source.normalise(images)), rtol=1e-5, atol=1e-5)


def test_refusals(tmp_path: Path) -> None:
    write(tmp_path / "a.pth")
    with pytest.raises(
        ValueError, match="target 'torchvision' holds the backbone, not the classifier; targets for it: timm, onnx"
    ):
        export(tmp_path / "a.pth", tmp_path / "out", "torchvision", what="classifier")
    with pytest.raises(ValueError, match="a classifier leaves with its own head"):
        export(tmp_path / "a.pth", tmp_path / "out", "program", what="classifier", classifier=tmp_path / "head.safetensors")
    torch.save({"meta": {}, "state_dict": {}}, tmp_path / "b.pth")
    with pytest.raises(WeightsError, match="is no checkpoint of fine-tuning"):
        export(tmp_path / "b.pth", tmp_path / "out", what="classifier")
    write(tmp_path / "vit.pth", "vit_tiny_patch16_224", depth=1, embed_dim=32, num_heads=2)
    with pytest.raises(WeightsError, match="CNN classifiers are exported"):
        export(tmp_path / "vit.pth", tmp_path / "out", what="classifier")
