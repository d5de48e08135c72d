"""The CSV and the picture of a comparison."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hgkd.evaluation.comparison import trained, write_csv
from hgkd.pictures.comparison import _curve, _panels, write_picture


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


def test_curves_of_one_quantity_share_panels_and_another_has_its_own(tmp_path: Path) -> None:
    tuned = {"row": "tuned", "seed": 0, "scores": {"top-1 %": {"value": 60.0}}, "train_cpu_seconds": 10.0}
    tuned["curves"] = {"top-1 %": [[1, 40.0], [2, 60.0]], "top-5 %": [[1, 90.0], [2, 95.0]]}
    rows = {"a, b": TRAINED, "random": [run("random", 0, 20.0)], "tuned": [tuned]}
    assert _panels(rows) == {
        "knn": {
            "training images": {"a, b": [(100.0, 12.0, 8**0.5), (200.0, 30.0, 8**0.5)]},
            # of the run that was not interrupted
            "training, CPU s": {"a, b": [(4.0, 10.0, 0.0), (8.0, 28.0, 0.0)]},
        },
        "top-1 %": {"training, CPU s": {"tuned": [(5.0, 40.0, 0.0), (10.0, 60.0, 0.0)]}},
    }
    write_picture([member for members in rows.values() for member in members], tmp_path / "two.png")
    with Image.open(tmp_path / "two.png") as picture:
        assert picture.size == (1650, 704)


@pytest.mark.parametrize("rows", [2, 10, 11, 23])
def test_no_two_rows_share_a_colour_until_there_are_twenty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    drawn = {}
    monkeypatch.setattr("hgkd.pictures.comparison._draw_curves", lambda axis, found, colours: drawn.update(colours) or {})
    many = [run(f"row {i}", 0, 20.0, curve=[[1, 10.0]], images=100) for i in range(rows)]
    write_picture(many, tmp_path / "many.png")
    assert (len(drawn), len(set(drawn.values()))) == (rows, min(rows, 20))


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
