"""hgkd visualize from end to end on generated shapes."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_runs import SPARK, tiny

from hgkd.api import train as train_tool
from hgkd.cli import visualize as tool
from hgkd.data.shapes import write_imagefolder
from hgkd.distillers import ClassifierTraining


@pytest.fixture
def shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_imagefolder("shapes", train=16, test=8, image_size=64)
    return tmp_path


def draw(command: str, *options: str) -> int:
    return tool.main([command, "--images", "shapes/test", "--limit", "3", "--out", "out", *options])


def size_of(name: str) -> tuple[int, int]:
    with Image.open(f"out/{name}.png") as picture:
        return picture.size


def test_all_pictures_of_a_backbone_and_of_a_run_on_one_page(shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = tiny("shapes/train", val_train_root=None, val_test_root=None, epochs=1, warmup_epochs=0)
    options["default_hooks.logger.interval"] = 10
    train_tool.train(SPARK, "run", options=options)
    checkpoint = Path("run/last_checkpoint").read_text().strip()
    subject = ("--backbone", checkpoint, "--image-size", "64")
    assert draw("pca", *subject, "--level", "0", "-1") == 0
    assert draw("attention", *subject, "--name", "where") == 0
    assert draw("neighbours", *subject, "--bank", "shapes/train", "--k", "2") == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"^shapes/test/.*: shapes/train/.*\(-?[01]\.\d\d\), ", printed, re.M)) == 3
    assert draw("reconstruction", "--checkpoint", checkpoint, "--mask-ratio", "0.75") == 0
    for name, columns in (("pca", 3), ("where", 2), ("neighbours", 3), ("reconstruction", 3)):
        assert size_of(name) == (columns * 66, 14 + 3 * 66), name
    page = Path("out/pictures.html").read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == ["pca", "where", "neighbours", "reconstruction"]
    assert "activation energy" in page
    assert "75% hidden" in page


def test_class_activation_of_a_classifier_leaves_other_reports_alone(shapes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ClassifierTraining(classifier={"name": "test_resnet"}, num_classes=2, image_size=64)
    model.set_classes(("disc", "ring"))
    torch.save({"meta": {"hgkd": model.meta()}, "state_dict": model.state_dict()}, "classifier.pth")
    Path("out").mkdir()
    Path("out/report.html").write_text("mine")
    assert draw("cam", "--checkpoint", "classifier.pth", "--class", "ring") == 0
    assert len(re.findall(r"^shapes/test/.*: ring$", capsys.readouterr().out, re.M)) == 3
    assert size_of("cam") == (2 * 66, 14 + 3 * 66)
    assert Path("out/report.html").read_text() == "mine"
    assert "Grad-CAM of ring" in Path("out/pictures.html").read_text()
    assert draw("cam", "--checkpoint", "classifier.pth", "--class", "rings") == 2
    assert "unknown class 'rings'; did you mean 'ring'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("pca", ["--backbone", "resnet81"], "unknown backbone 'resnet81'; did you mean"),
        ("pca", ["--backbone", "test_resnet", "--level", "9"], "level 9 does not exist: test_resnet has levels 0 .."),
        ("attention", ["--backbone", "mixer_s32_224"], "gives no map of attention; take a CNN or a plain ViT"),
        ("reconstruction", ["--checkpoint", "gone.pth"], "checkpoint gone.pth does not exist"),
        ("pca", ["--backbone", "test_resnet", "--limit", "0"], "--limit must be 1 or more, got 0"),
    ],
)
def test_mistakes_end_with_a_line(
    shapes: Path, command: str, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw(command, *options) == 2
    assert message in capsys.readouterr().err


def test_predictions_go_through_the_downstream_part(
    shapes: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys
    from types import ModuleType

    options = ("--config", "c.py", "--checkpoint", "c.pth", "--device", "cpu", "--cfg-options", "a.b=1")
    monkeypatch.setitem(sys.modules, "hgkd.openmmlab.drawing", None)  # cannot be imported
    assert draw("predictions", *options) == 2
    assert "need the extra 'downstream'" in capsys.readouterr().err

    def draw_predictions(
        config: str, checkpoint: str, images: list[Path], out: str, options: dict[str, int], device: str
    ) -> None:
        assert (config, checkpoint, len(images), options, device) == ("c.py", "c.pth", 3, {"a.b": 1}, "cpu")
        Path(out).mkdir()
        Image.new("RGB", (4, 4)).save(Path(out) / "boxes.png")

    part = ModuleType("hgkd.openmmlab.drawing")
    part.draw_predictions = draw_predictions
    monkeypatch.setitem(sys.modules, "hgkd.openmmlab.drawing", part)
    assert draw("predictions", *options) == 0
    assert "<h2>boxes</h2>" in Path("out/pictures.html").read_text()
