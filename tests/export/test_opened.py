"""Exported folders run by their own runtime give what the network gives; pictures find their way in, and places back."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused
from student_checkpoints import write_student
from test_classifier import CLASSES, write
from test_graphs import features_of

from hgkd.data.images import read_crops
from hgkd.errors import WeightsError
from hgkd.export import export
from hgkd.export.opened import open_export
from hgkd.export.placing import place
from hgkd.weights.signature import ImageInput, Signature

SMALL = {"layers": (1, 1, 1, 1)}


@pytest.mark.parametrize("to", ["timm", "ncnn", "pt2", "torchscript"])  # onnx and openvino: below
@torch.no_grad()
def test_a_classifier_by_each_runtime(tmp_path: Path, to: str) -> None:
    pytest.importorskip({"ncnn": "ncnn"}.get(to, "torch"))
    source = write(tmp_path / "a.pth").eval()
    export(tmp_path / "a.pth", tmp_path / "out", to, part="classifier")
    (tmp_path / "a.pth").unlink()
    opened = open_export(shutil.move(tmp_path / "out", tmp_path / "moved"), threads=2)
    assert (opened.target, opened.runtime, opened.part) == (to, to, "classifier")
    assert opened.signature.classes == CLASSES
    assert opened.signature.input.size == (64, 64)
    images = torch.rand(1, 3, 64, 64)
    found = opened(images)
    assert list(found) == ["logits"]
    torch.testing.assert_close(found["logits"], source.predict(source.normalise(images)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("to", "name"), [("timm", "resnet18"), ("torchvision", "resnet18"), ("torchvision", "torchvision.resnet18")]
)
@torch.no_grad()
def test_a_backbone_of_a_library(tmp_path: Path, to: str, name: str) -> None:
    own = name.startswith("torchvision.")
    source = write_student(tmp_path / "a.pth", name, encoder=build(name) if own else None, kwargs={} if own else SMALL)
    export(tmp_path / "a.pth", tmp_path / "out", to)
    images = torch.rand(1, 3, 64, 96)
    found = open_export(tmp_path / "out")(images)["pooled"]
    torch.testing.assert_close(found, features_of(source, images).mean((2, 3)), rtol=1e-4, atol=1e-4)


def build(name: str) -> torch.nn.Module:
    from hgkd.networks.encoder import build_encoder

    return build_encoder(name)


def test_openvino_reads_onnx_too(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("onnxruntime")
    write_student(tmp_path / "a.pth", "test_resnet")
    export(tmp_path / "a.pth", tmp_path / "out", "onnx")
    images = torch.rand(1, 3, 64, 96)
    first, second = (open_export(tmp_path / "out", runtime=runtime)(images)["pooled"] for runtime in (None, "openvino"))
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)
    with refused(ValueError, "runtime-not-of-export", "ncnn", "onnx"):
        open_export(tmp_path / "out", runtime="ncnn")
    with refused(WeightsError, "export-lacks-precision", "int8"):
        open_export(tmp_path / "out", precision="int8")
    (tmp_path / "out/model.onnx").write_bytes(b"changed")
    with refused(WeightsError, "export-file-changed", "model.onnx"):
        open_export(tmp_path / "out")


def test_only_code_that_hgkd_writes_is_run(tmp_path: Path) -> None:
    write_student(tmp_path / "a.pth", "resnet18", kwargs=SMALL)
    export(tmp_path / "a.pth", tmp_path / "out", "torchvision")
    recipe, card = tmp_path / "out/build.py", tmp_path / "out/run_card.json"
    recipe.write_text("raise SystemExit\n")
    content = json.loads(card.read_text())
    del content["files"]["build.py"]  # a folder whose card agrees
    card.write_text(json.dumps(content))
    with refused(WeightsError, "export-recipe-unknown", "build.py"):
        open_export(tmp_path / "out")


def test_folders_that_are_not_run(tmp_path: Path) -> None:
    write_student(tmp_path / "a.pth", "resnet18", kwargs=SMALL)
    export(tmp_path / "a.pth", tmp_path / "out", "spconv")
    with refused(WeightsError, "export-not-run", "spconv", "onnx"):
        open_export(tmp_path / "out")
    export(tmp_path / "a.pth", tmp_path / "timm")
    with refused(ValueError, "precision-of-weights", "int8"):
        open_export(tmp_path / "timm", precision="int8")
    with refused(ValueError, "count-not-positive", "0"):
        open_export(tmp_path / "timm", threads=0)
    with refused(FileNotFoundError, "export-folder-missing", "none"):
        open_export(tmp_path / "none")


def spot(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    """A white rectangle on black; its left, top, right and bottom edge."""
    image = Image.new("RGB", (width, height))
    image.paste((255, 255, 255), box)
    return image


def taking(**image: Any) -> Signature:
    return Signature({}, ImageInput(**image), ())


@pytest.mark.parametrize("resize", ["crop", "pad", "stretch"])
@pytest.mark.parametrize(("width", "height"), [(160, 80), (48, 96), (64, 64), (1000, 20)])
def test_a_box_comes_back_to_its_place(resize: str, width: int, height: int) -> None:
    box = (width // 2 - 8, height // 2 - 4, width // 2 + 8, height // 2 + 8)
    expected = taking(size=(64, 96), height=64, width=96, resize=resize, pad=0.25)
    image = spot(width, height, box)
    placed = place(image, expected)
    assert placed.images.shape == (1, 3, 64, 96)
    bright = (placed.images[0, 0] > 0.5).nonzero().float()
    low, high = bright.amin(0), bright.amax(0) + 1
    found = placed.boxes(torch.tensor([[low[1], low[0], high[1], high[0]]]))[0]
    slack = 1.5 / min(placed.scale) + 1
    torch.testing.assert_close(found, torch.tensor(box).float(), rtol=0, atol=slack)
    back = placed.label_map((placed.images[0, 0] > 0.5).long())
    assert back.shape == (height, width)
    truth = torch.from_numpy(np.array(image.convert("L"))) > 127
    seen = back != 255
    assert seen.all() == (resize != "crop" or width * 64 == height * 96)
    assert ((back == 1) == truth)[seen].float().mean() > 0.9
    if resize == "pad":
        assert float(placed.images.min()) == 0.0
        assert (placed.images[0, 0, -1, -1] == 0.25) == (width * 64 != height * 96)


def test_the_crop_is_that_of_the_training(tmp_path: Path) -> None:
    image = Image.effect_noise((90, 50), 80).convert("RGB")
    image.save(tmp_path / "a.png")
    crop = read_crops([tmp_path / "a.png"], (32, 48)).float() / 255
    torch.testing.assert_close(place(image, taking(size=(32, 48))).images, crop)


def test_a_coarser_label_map_covers_the_picture() -> None:
    placed = place(spot(40, 20, (0, 0, 20, 20)), taking(size=(32, 64), resize="stretch"))
    found = placed.label_map(torch.tensor([[1, 0], [1, 0]]))
    assert found.shape == (20, 40)
    assert torch.equal(found[:, :20], torch.ones(20, 20, dtype=torch.long))
    assert found[:, 20:].sum() == 0


@pytest.mark.parametrize(
    ("resize", "lying", "standing"),
    [
        ("fit", (62, 128), (128, 62)),
        ("square", (128, 128), (128, 128)),
        ("pad", (80, 128), (128, 128)),
        ("keep", (97, 201), (201, 97)),
        ("stretch", (80, 128), (80, 128)),
    ],
)
def test_free_sides_are_filled_up_as_the_record_says(resize: str, lying: tuple[int, int], standing: tuple[int, int]) -> None:
    """A picture that stands gets the turned size, as mmcv's Resize by (long, short) side; Pad does not turn."""
    free = taking(size=(80, 128), resize=resize, pad=0.5)
    for size, expected in (((201, 97), lying), ((97, 201), standing)):
        placed = place(spot(*size, (0, 0, 1, 1)), free)
        assert placed.images.shape == (1, 3, *expected)
        if resize in ("fit", "square", "pad"):
            assert placed.scale == tuple((62 if side == 97 else 128) / side for side in placed.size)
        assert (placed.images == 0.5).any() == (resize in ("square", "pad"))
    stepped = replace(free, input=replace(free.input, multiple=32, least=96))
    placed = place(spot(201, 97, (0, 0, 1, 1)), stepped)
    stepped.input.check_size(*placed.images.shape[-2:])
    assert placed.scale == place(spot(201, 97, (0, 0, 1, 1)), free).scale


def test_another_way_of_resizing_is_of_a_newer_hgkd() -> None:
    card = taking(resize="fit").to_dict()
    assert Signature.parse(card, "run_card.json").input.resize == "fit"
    card["input"]["resize"] = "fold"
    with refused(WeightsError, "export-resize-unknown", "fold", "square"):
        Signature.parse(card, "run_card.json")


def test_resizing_is_that_of_opencv() -> None:
    cv2 = pytest.importorskip("cv2")
    image = Image.effect_noise((90, 50), 80).convert("RGB")
    expected = cv2.resize(np.array(image), (40, 30), interpolation=cv2.INTER_LINEAR)
    found = place(image, taking(size=(30, 40), resize="stretch")).images[0].permute(1, 2, 0) * 255
    assert np.abs(found.numpy() - expected).max() <= 2
