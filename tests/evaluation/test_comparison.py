"""The CSV and the picture of a comparison."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hgkd.evaluation.comparison import trained, write_csv
from hgkd.pictures.comparison import _curve, write_picture


def run(row: str, seed: int, top1: float, **facts: Any) -> dict[str, Any]:
    return {"row": row, "seed": seed, "scores": {"knn": {"top1": top1, "ci95": [top1 - 2, top1 + 2]}}, **facts}


TRAINED = [
    run("a, b", 0, 30.0, curve=[[1, 10.0], [2, 28.0]], images=200, train_cpu_seconds=8.0, command="python x"),
    run("a, b", 1, 34.0, curve=[[1, 14.0], [2, 32.0]], images=200, train_cpu_seconds=3.0, resumed=True),
]


def test_csv_has_a_line_a_run(tmp_path: Path) -> None:
    own = {"row": "own", "seed": 0, "scores": {"mIoU": {"value": 41.5}}, "curves": {"mIoU": [[10, 41.5]]}}
    write_csv([*TRAINED, run("random", 0, 20.0, evaluate_command="python y"), own], tmp_path / "t.csv")
    with open(tmp_path / "t.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["row"], line["seed"], line["knn"], line["mIoU"]) for line in lines] == [
        ("a, b", "0", "30.0", ""),
        ("a, b", "1", "34.0", ""),
        ("random", "0", "20.0", ""),
        ("own", "0", "", "41.5"),
    ]
    assert [line["knn ci95_low"] for line in lines] == ["28.0", "32.0", "18.0", ""]
    assert [line["resumed"] for line in lines] == ["False", "True", "False", "False"]
    assert [line["command"] for line in lines] == ["python x", "", "python y", ""]


def test_curves_by_hand() -> None:
    assert _curve(TRAINED, "images") == [(100.0, 12.0, pytest.approx(8**0.5)), (200.0, 30.0, pytest.approx(8**0.5))]
    assert _curve(TRAINED[:1], "train_cpu_seconds") == [(4.0, 10.0, 0.0), (8.0, 28.0, 0.0)]
    assert _curve([run("random", 0, 20.0)], "images") == []
    named = {**TRAINED[0], "curves": {"top-1": [[50, 1.0], [100, 2.0]]}}
    assert _curve([named], "images") == [(100.0, 1.0, 0.0), (200.0, 2.0, 0.0)]


def test_picture_has_a_panel_for_what_is_known(tmp_path: Path) -> None:
    sizes = {}
    plain = [run("random", 0, 20.0), run("random", 1, 22.0)]
    for name, runs in (("all", [*TRAINED, *plain]), ("bars", plain), ("images", [{**TRAINED[0], "train_cpu_seconds": None}])):
        write_picture(runs, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as picture:
            sizes[name] = picture.size
            assert len(picture.convert("RGB").getcolors(2**20)) > 10
    assert sizes == {"all": (1650, 374), "bars": (550, 374), "images": (1100, 374)}


def test_what_a_checkpoint_says_of_its_run(tmp_path: Path) -> None:
    meta = {"iter": 30, "cfg": "train_dataloader = dict(batch_size=16)\n"}
    vit = {"meta": {**meta, "hgkd": {"mae": {}, "format": 1}}}
    contents = {"a": {"meta": meta}, "b": {"meta": {"iter": 3}}, "c": {}, "d": vit}
    found = {}
    for name, content in contents.items():
        torch.save(content, tmp_path / name)
        found[name] = trained(tmp_path / name)
    paths = {name: str(tmp_path / name) for name in contents}
    expected = {"a": (480, paths["a"]), "b": (None, paths["b"]), "c": (None, paths["c"]), "d": (480, paths["d"])}
    assert found == expected
