"""The programs of the page on few images, run as they stand."""

import json
import re
from pathlib import Path

from PIL import Image
from tiny_runs import ROOT

PAGE = (ROOT / "docs/howto/small_data.md").read_text(encoding="utf-8")


def program(word: str) -> str:
    (found,) = [text for text in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL) if word in text]
    return found


def test_scenes_stay_on_one_side(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    images = [{"id": i, "file_name": f"slide{i % 8}_{i}.jpg"} for i in range(40)]
    boxes = [{"id": 100 + i, "image_id": i % 40, "category_id": 1} for i in range(100)]
    Path("boxes/annotations").mkdir(parents=True)
    whole = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cell"}]}
    Path("boxes/annotations/all.json").write_text(json.dumps(whole))
    exec(program("annotations/all.json"), {})
    found = {split: json.loads(Path(f"boxes/annotations/{split}.json").read_text()) for split in ("train", "val")}
    scenes = {split: {image["file_name"].split("_")[0] for image in each["images"]} for split, each in found.items()}
    assert len(scenes["val"]) == 2
    assert not scenes["train"] & scenes["val"]
    for key in ("images", "annotations"):
        ids = [part["id"] for each in found.values() for part in each[key]]
        assert sorted(ids) == sorted(part["id"] for part in whole[key]), "none is lost, none is twice"
    for each in found.values():
        assert {box["image_id"] for box in each["annotations"]} <= {image["id"] for image in each["images"]}
        assert each["categories"] == whole["categories"]
    assert "val 10 pictures" in capsys.readouterr().out


def test_six_crops_of_each_picture(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for name in "ab":
        Image.new("RGB", (640, 480)).save(f"photos/{name}.jpg")
    exec(program(".crop("), {})
    crops = sorted(Path("crops").iterdir())
    assert len(crops) == 12
    assert {Image.open(file).size for file in crops} == {(256, 256)}
