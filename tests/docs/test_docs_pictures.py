"""The command that makes the pictures of README and docs, on tiny runs; and the pictures that are shipped."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hgkd.api.demo import Plan
from hgkd.pictures.predictions import class_colour

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from tools import docs_pictures  # noqa: E402

TILE = 192 + 2  # an image and the gap after it
DRAWN = ("engine_cells", "engine_tiles", "engine_gather", "engine_exact", "curves", "screen", "long_runs")


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "WEBP"
        return np.asarray(picture.convert("RGB"))


def test_the_pictures_of_the_engine_and_the_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert docs_pictures.main(["--out", str(tmp_path / "new"), "--only", *DRAWN]) == 0
    for name in DRAWN:
        path = tmp_path / f"new/{name}.webp"
        assert path.stat().st_size <= docs_pictures.LIMIT
        assert len(np.unique(pixels_of(path).reshape(-1, 3), axis=0)) > 8, name  # not an empty sheet
    assert capsys.readouterr().out.count(" kB\n") == len(DRAWN)


@pytest.mark.slow
def test_the_picture_of_a_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(train=32, test=16, teacher_epochs=1, student_epochs=1, probe=4)
    monkeypatch.setattr(docs_pictures, "QUICK", docs_pictures.Sizes(plan, boxes=0, epochs=0))
    assert docs_pictures.main(["--quick", "--out", str(tmp_path), "--only", "features"]) == 0
    shown = pixels_of(tmp_path / "features.webp")
    assert shown.shape == (14 + 3 * TILE, 4 * TILE, 3)
    image, seen = (shown[14:, left : left + TILE - 2].astype(int) for left in (0, TILE))
    hidden = (abs(seen - 128) <= 1).all(2)
    assert 0.3 < hidden.mean() < 0.7  # half of the cells are hidden
    assert (image[~hidden] == seen[~hidden]).all()


def test_the_picture_of_a_detector_has_the_best_box_of_each_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def predict(folder: Path, source: str, *, told, score_threshold: float) -> None:
        assert folder == tmp_path / "detector"
        for _ in sorted(Path(source).iterdir()):
            weak = {"box": [0, 0, 90, 90], "label": "disc", "class": 2, "score": 0.2}
            told({"objects": [weak, {"box": [10, 20, 60, 70], "label": "ring", "class": 4, "score": 0.9}]})

    monkeypatch.setattr(docs_pictures.hgkd, "predict", predict, raising=False)
    folders = ["--detector", str(tmp_path / "detector"), "--out", str(tmp_path)]
    assert docs_pictures.main([*folders, "--only", "detections"]) == 0
    shown = pixels_of(tmp_path / "detections.webp").astype(int)
    assert shown.shape == (2 * TILE, 4 * TILE, 3)
    for row in range(2):
        for column in range(4):
            tile = shown[row * TILE :, column * TILE :]
            assert (abs(tile[100, 2 * 10] - class_colour(4)) <= 2).all()  # the left side of the best box, twice as large
            assert not (abs(tile[170, 0] - class_colour(2)) <= 2).all()  # that of the other


def test_a_picture_that_is_too_large_is_not_written(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), dtype=np.uint8))
    with pytest.raises(RuntimeError, match="more than 120000"):
        docs_pictures.save(noise, tmp_path / "noise.webp")
    assert list(tmp_path.iterdir()) == []


def test_a_picture_of_a_photograph_s_size_loses_quality_before_it_is_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(100, 140, (300, 300, 3), dtype=np.uint8)
    assert 0 < docs_pictures.save(Image.fromarray(noise), tmp_path / "noise.webp") <= docs_pictures.LIMIT
    assert abs(pixels_of(tmp_path / "noise.webp").astype(int).mean() - noise.mean()) < 5


def test_what_is_shipped() -> None:
    shipped = {path.name: path.stat().st_size for path in (ROOT / "docs/pictures").iterdir()}
    assert {f"{name}.webp" for name in docs_pictures.PICTURES} <= shipped.keys()
    assert {name for name, size in shipped.items() if size > docs_pictures.LIMIT} == set()


def test_a_tutorials_pictures_are_what_its_commands_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in ("demo_out/runs/hgkd/pictures", "predicted/label_maps", "predicted/pictures"):
        (tmp_path / place).mkdir(parents=True)
    for epoch, colour in ((1, "red"), (2, "blue")):
        Image.new("RGB", (10, 20), colour).save(tmp_path / f"demo_out/runs/hgkd/pictures/epoch_{epoch}.png")
    Image.fromarray(np.repeat(np.array([[0], [3]], dtype=np.uint8), 4, axis=1)).save(tmp_path / "predicted/label_maps/a.png")
    for number in range(5):
        Image.new("RGB", (40, 30), "green").save(tmp_path / f"predicted/pictures/BloodImage_{number}.jpg")
    assert docs_pictures.main(["--tutorial", str(tmp_path), "--out", str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out.count(" kB\n") == 3
    student = pixels_of(tmp_path / "new/tutorial_student.webp")
    assert student.shape == (556, 278, 3)
    assert (student == (0, 0, 255)).all()  # the last epoch
    label_map = pixels_of(tmp_path / "new/tutorial_segmentor_label_map.webp")
    assert (label_map[0, 0] == class_colour(0)).all()
    assert (label_map[-1, -1] == class_colour(3)).all()
    assert pixels_of(tmp_path / "new/tutorial_detector_boxes.webp").shape == (360, 3 * 480 + 2 * 4, 3)

    with pytest.raises(SystemExit):
        docs_pictures.main(["--tutorial", str(tmp_path / "new"), "--out", str(tmp_path / "none")])
    assert "has no picture of a tutorial" in capsys.readouterr().err
