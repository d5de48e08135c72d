"""hgkd predict on folders that were exported here, and on graphs whose answer is known."""

import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused
from safetensors.torch import load_file
from student_checkpoints import write_student
from torch import Tensor, nn

import hgkd
from hgkd.api import predict as api
from hgkd.api.predict import predict
from hgkd.cli import predict as command
from hgkd.digests import file_digest
from hgkd.errors import DataError
from hgkd.export import export
from hgkd.pictures.predictions import class_colour
from hgkd.weights.signature import ImageInput, Output, Signature

SIDE = 64


class White(nn.Module):
    """The box round the white pixels; a second one of a low score."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        places = (images[0].float().mean(0) > 127).nonzero().float()
        low, high = places.amin(0), places.amax(0) + 1
        box = torch.stack([low[1], low[0], high[1], high[0]])
        return torch.stack([torch.zeros(4), box])[None], torch.tensor([[0.1, 0.9]]), torch.tensor([[0, 1]])


class Bright(nn.Module):
    """A label map: 1 where it is white."""

    def forward(self, images: Tensor) -> Tensor:
        return (images.mean(1) > 0.5).long()


class Brightest(nn.Module):
    """A label map of many classes: 255 where it is white."""

    def forward(self, images: Tensor) -> Tensor:
        return (images.mean(1) > 0.5).long() * 255


def written(
    folder: Path, module: nn.Module, outputs: list[str], task: str, classes: Sequence[str] = ("ground", "spot"), **image: Any
) -> Path:
    """A folder as the exporter leaves it, with a graph of ours."""
    folder.mkdir()
    file = folder / "model.ts"
    with torch.no_grad():
        torch.jit.script(module).save(str(file))
    signature = Signature(
        files={"fp32": file.name},
        input=ImageInput(size=(SIDE, SIDE), **image),
        outputs=tuple(Output(f"out{number}", holds) for number, holds in enumerate(outputs)),
        task=task,
        classes=tuple(classes),
    )
    noted = {file.name: {"sha256": file_digest(file), "bytes": file.stat().st_size}}
    card = {"export": {"target": "torchscript", "part": "model"}, "files": noted, "signature": signature.to_dict()}
    (folder / "run_card.json").write_text(json.dumps(card))
    return folder


def spots(folder: Path) -> Path:
    """Two pictures with a white rectangle."""
    folder.mkdir(exist_ok=True)
    for name, size, box in (("a", (128, 64), (32, 16, 96, 48)), ("b", (64, 128), (16, 32, 48, 96))):
        image = Image.new("RGB", size)
        image.paste((255, 255, 255), box)
        image.save(folder / f"{name}.png")
    return folder


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / api.RESULTS).read_text().splitlines()]


@pytest.mark.parametrize("resize", ["pad", "stretch"])
def test_boxes_lie_on_the_picture(tmp_path: Path, resize: str) -> None:
    graph = written(
        tmp_path / "graph", White(), ["boxes", "scores", "labels"], "detection", resize=resize, dtype="uint8", range=(0, 255)
    )
    report = predict(graph, spots(tmp_path / "images"), tmp_path / "out")
    assert report.frames == 2
    assert report.frames_per_s == pytest.approx(1000 / report.frame_ms)
    assert report.frame_ms >= report.run_ms > 0
    first, second = lines(tmp_path / "out")
    for line, box in ((first, (32, 16, 96, 48)), (second, (16, 32, 48, 96))):
        (found,) = line["objects"]
        assert (found["label"], found["class"], round(found["score"], 3)) == ("spot", 1, 0.9)
        assert found["box"] == pytest.approx(box, abs=2.5)
    picture = np.asarray(Image.open(tmp_path / "out" / first["picture"])).astype(int)
    assert picture.shape == (64, 128, 3)
    assert np.abs(picture[30, 32] - class_colour(1)).max() < 90  # the left edge, as JPEG has it of the box
    assert predict(graph, tmp_path / "images", tmp_path / "all", score_threshold=0.05, limit=1, pictures=False).frames == 1
    (line,) = lines(tmp_path / "all")
    assert [found["label"] for found in line["objects"]] == ["spot", "ground"]
    assert not (tmp_path / "all" / api.PICTURES).exists()


@pytest.mark.parametrize("resize", ["pad", "crop"])
def test_label_maps_have_the_size_of_the_picture(tmp_path: Path, resize: str) -> None:
    graph = written(tmp_path / "graph", Bright(), ["label_map"], "segmentation", resize=resize)
    predict(graph, spots(tmp_path / "images"), tmp_path / "out")
    first, _ = lines(tmp_path / "out")
    found = np.asarray(Image.open(tmp_path / "out" / first["label_map"]))
    assert found.shape == (64, 128)
    seen = slice(None) if resize == "pad" else slice(32, 96)
    assert (found[:, seen] != 255).all()
    truth = np.asarray(Image.open(tmp_path / "images/a.png"))[..., 0] > 127
    assert ((found == 1) == truth)[:, seen].mean() > 0.97
    if resize == "crop":
        assert (found[:, :32] == 255).all()
    share = truth[:, seen].mean()
    assert first["classes"] == pytest.approx({"ground": 1 - share, "spot": share}, abs=0.03)
    picture = np.asarray(Image.open(tmp_path / "out" / first["picture"])).astype(int)
    assert np.abs(picture[32, 64] - (0.45 * 255 + 0.55 * np.array(class_colour(1)))).max() < 12


def test_of_more_than_255_classes_what_is_beyond_a_crop_is_none_of_them(tmp_path: Path) -> None:
    classes = [f"class {number}" for number in range(300)]
    graph = written(tmp_path / "graph", Brightest(), ["label_map"], "segmentation", classes, resize="crop")
    predict(graph, spots(tmp_path / "images"), tmp_path / "out")
    first, _ = lines(tmp_path / "out")
    found = np.asarray(Image.open(tmp_path / "out" / first["label_map"])).astype(int)
    assert sorted(np.unique(found).tolist()) == [0, 255, 65535]
    truth = np.asarray(Image.open(tmp_path / "images/a.png"))[:, 32:96, 0] > 127
    assert ((found[:, 32:96] == 255) == truth).mean() > 0.97
    assert (found[:, :32] == 65535).all()
    assert first["classes"] == pytest.approx({"class 0": 1 - truth.mean(), "class 255": truth.mean()}, abs=0.03)


def test_a_classifier_of_the_exporter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(__file__).parents[1] / "golden/export_classifier"
    spots(tmp_path / "images")
    (tmp_path / "images/broken.jpg").write_bytes(b"no image")
    arguments = [str(folder), str(tmp_path / "images"), "--out", str(tmp_path / "out"), "--top", "2"]
    assert command.main(arguments) == 1  # one file cannot be read
    first, second, broken = lines(tmp_path / "out")
    classes = json.loads((folder / "config.json").read_text())["label_names"]
    assert [set(entry) for entry in first["top"]] == [{"label", "class", "score"}] * 2
    assert first["label"] == classes[first["top"][0]["class"]]
    assert 0 < first["top"][1]["score"] <= first["top"][0]["score"] < 1
    assert (second["size"], Path(broken["image"]).name) == ([64, 128], "broken.jpg")
    printed = capsys.readouterr().out
    assert "2 frames: " in printed
    assert "1 images could not be read" in printed
    assert command.main(arguments) == 2  # results are not written over


def test_features_and_their_nearest_neighbours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_student(tmp_path / "a.pth", "test_resnet")
    export(tmp_path / "a.pth", tmp_path / "export")
    gallery = tmp_path / "gallery"
    for name, colour in (("dark", 40), ("light", 215)):
        (gallery / name).mkdir(parents=True)
        for number in range(3):
            noise = np.random.default_rng(number).integers(-30, 30, (SIDE, SIDE, 3)) + colour
            Image.fromarray(noise.astype(np.uint8)).save(gallery / name / f"{number}.png")
    hgkd.predict(tmp_path / "export", gallery, tmp_path / "out")
    rows = lines(tmp_path / "out")
    features = np.load(tmp_path / "out" / api.FEATURES)
    assert [row["row"] for row in rows] == list(range(6))
    assert features.shape == (6, 96)
    assert (
        command.main([str(tmp_path / "export"), str(gallery), "--gallery", str(gallery), "--neighbours", "3", "--limit", "4"])
        == 0
    )
    assert "light/0.png: light 1.00" in capsys.readouterr().out.replace(str(gallery) + "/", "")
    predict(tmp_path / "export", gallery / "dark/1.png", tmp_path / "near", gallery=gallery, neighbours=2)
    (line,) = lines(tmp_path / "near")
    assert (line["label"], line["neighbours"][0]["image"]) == ("dark", "dark/1.png")
    assert line["neighbours"][0]["cosine"] == pytest.approx(1.0, abs=1e-5)


def test_maps_of_features(tmp_path: Path) -> None:
    class Maps(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images[:, :, ::32, ::32]

    graph = written(tmp_path / "graph", Maps(), ["features"], "features")
    predict(graph, spots(tmp_path / "images"), tmp_path / "out")
    assert {name: tuple(value.shape) for name, value in load_file(tmp_path / "out" / api.FEATURE_MAPS).items()} == {
        "a": (3, 2, 2),
        "b": (3, 2, 2),
    }


def test_names_that_are_not_utf8_and_a_frame_that_fails_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_student(tmp_path / "a.pth", "test_resnet")
    export(tmp_path / "a.pth", tmp_path / "export")
    (tmp_path / "g").mkdir()
    Image.new("RGB", (70, 70)).save(spots(tmp_path / "g/ant") / os.fsdecode(b"latin\xe9.jpg"))
    predict(tmp_path / "export", tmp_path / "g/ant", tmp_path / "near", gallery=tmp_path / "g")
    assert r"ant/latin\xe9.jpg" in [near["image"] for line in lines(tmp_path / "near") for near in line["neighbours"]]
    assert lines(tmp_path / "near")[-1]["picture"] == rf"{api.PICTURES}/latin\xe9.jpg"

    placed, real = [], api.place

    def place_two(pixels: Any, signature: Signature) -> Any:
        placed.append(pixels)
        if len(placed) == 3:
            raise MemoryError
        return real(pixels, signature)

    monkeypatch.setattr(api, "place", place_two)
    with pytest.raises(MemoryError):
        predict(tmp_path / "export", tmp_path / "g/ant", tmp_path / "out")
    assert np.load(tmp_path / "out" / api.FEATURES).shape == (2, 96)
    assert [line["row"] for line in lines(tmp_path / "out")] == [0, 1]


def test_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = written(tmp_path / "graph", Bright(), ["label_map"], "segmentation", resize="stretch")
    content = io.BytesIO()
    for colour in ((0, 0, 0), (255, 255, 255)):
        Image.new("RGB", (32, 16), colour).save(content, "JPEG")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content.getvalue())))
    told: list[dict[str, Any]] = []
    predict(graph, "-", told=told.append)
    assert [line["classes"] for line in told] == [{"ground": 1.0}, {"spot": 1.0}]


def test_a_camera_ends_with_the_keyboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = written(tmp_path / "graph", Bright(), ["label_map"], "segmentation", resize="stretch")

    def stopped(line: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    assert predict(graph, spots(tmp_path / "images"), tmp_path / "out", told=stopped).frames == 1
    assert len(lines(tmp_path / "out")) == 1


def test_wrong_requests(tmp_path: Path) -> None:
    graph = written(tmp_path / "graph", Bright(), ["label_map"], "segmentation", resize="stretch")
    images = spots(tmp_path / "images")
    with refused(ValueError, "gallery-without-features", "label_map"):
        predict(graph, images, gallery=images)
    with refused(ValueError, "export-pictures-prepared-otherwise", "other"):
        predict(written(tmp_path / "other", Bright(), ["label_map"], "segmentation", resize="other"), images)
    with refused(ValueError, "count-not-positive", "top", "0"):
        predict(graph, images, top=0)
    with refused(FileNotFoundError, "image-missing", "none"):
        predict(graph, tmp_path / "none")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.png").write_bytes(b"no image")
    with refused(DataError, "no-image-readable", "bad"):
        predict(graph, tmp_path / "bad")
    predict(graph, images, tmp_path / "out")
    with refused(FileExistsError, "predictions-exist", "out"):
        predict(graph, images, tmp_path / "out")
    maps = written(tmp_path / "maps", nn.Identity(), ["features"], "features")
    with refused(ValueError, "features-without-place", "maps"):
        predict(maps, images)
