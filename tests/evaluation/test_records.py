"""Results on disk: JSON there and back, the growing CSV, and two runs against each other."""

import csv
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from full_disk import full_disk
from PIL import Image
from refusals import refused

from hgkd.data import LabelledImages
from hgkd.evaluation.records import (
    CSV_COLUMNS,
    append_csv,
    check_outputs,
    compare_results,
    list_digest,
    make_result,
    read_json,
    write_json,
)
from hgkd.writing import WriteError


def result(correct: list[float], method: str = "knn", setting: str = "k=20", **changes: Any) -> dict[str, Any]:
    top1 = 100 * sum(correct) / len(correct)
    return {
        "method": method,
        "backbone": "a, b.pth",
        "top1": top1,
        "ci95": [top1 - 1, top1 + 1],
        "train_images": 9,
        "test_images": len(correct),
        "scores": {setting: {"top1": top1, "ci95": [top1 - 1, top1 + 1], "correct": correct}},
        "test_list": list_digest([(f"{i}.png", "cat") for i in range(len(correct))]),
        "settings": {
            "image_size": 64,
            "train": "tr",
            "test": "te",
            "seed": 0,
            "extractor": {"kind": "student", "weights": "a, b.pth"},
        },
        **changes,
    }


def test_a_tilde_is_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    check_outputs("~/r.json", "~/r.csv")
    write_json({"knn": result([1, 0])}, "~/r.json")
    append_csv({"knn": result([1, 0])}, "~/r.csv")
    check_outputs("~/r.json", "~/r.csv")
    assert read_json("~/r.json")["knn"]["top1"] == 50
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]


def test_json_there_and_back_with_one_line_a_list(tmp_path: Path) -> None:
    one = {"knn": result([1, 0, 1])}
    both = {**one, "linear": result([0.25, 1.0, 1e-05], "linear", "C by sweep")}
    for name, content in (("one", one), ("both", both)):
        file = tmp_path / "new" / f"{name}.json"
        write_json(content, file)
        assert read_json(file) == content
    assert '"correct": [1, 0, 1]' in (tmp_path / "new/one.json").read_text()
    assert json.loads((tmp_path / "new/one.json").read_text())["method"] == "knn"
    assert '"correct": [0.25, 1.0, 1e-05]' in (tmp_path / "new/both.json").read_text()


@pytest.mark.parametrize("text", ["no json", "[]", "{}x", '{"knn": {"top1": 3}}', '{"method": "knn", "scores": {}}'])
def test_json_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.json").write_text(text)
    with refused(ValueError, "result-file-other", "r.json"):
        read_json(tmp_path / "r.json")
    with refused(FileNotFoundError, "result-file-missing", "none.json"):
        read_json(tmp_path / "none.json")


def test_csv_grows_and_quotes(tmp_path: Path) -> None:
    file = tmp_path / "new" / "r.csv"
    append_csv({"knn": result([1, 0])}, file)
    append_csv({"knn": result([1, 1]), "linear": result([0, 0], "linear", "C by sweep")}, file)
    with file.open(newline="") as handle:
        lines = list(csv.DictReader(handle))
    assert [(line["method"], line["setting"], line["top1"]) for line in lines] == [
        ("knn", "k=20", "50.00"),
        ("knn", "k=20", "100.00"),
        ("linear", "C by sweep", "0.00"),
    ]
    assert {line["checkpoint"] for line in lines} == {"a, b.pth"}
    assert list(lines[0]) == list(CSV_COLUMNS)


def test_how_images_were_read_is_in_the_csv_and_compared(tmp_path: Path) -> None:
    images = [labelled(tmp_path / "images", value_range) for value_range in ((0, 100), None)]
    settings = result([1, 0])["settings"]
    correct = {"k=20": np.array([[True, False]])}
    runs = [{"knn": make_result("knn", "a.pth", correct, read, (0, 1), 9, settings)} for read in images]
    for run in (*runs, {"linear": result([0, 0], "linear")}):  # as of an earlier version
        append_csv(run, tmp_path / "r.csv")
    with (tmp_path / "r.csv").open(newline="") as handle:
        found = [line["reading"] for line in csv.DictReader(handle)]
    assert [json.loads(text)["value_range"] for text in found[:2]] == [[0.0, 100.0], None]
    assert found[2] == ""
    _, notes = compare_results(*runs)
    assert [note.partition(" is ")[0] for note in notes] == ["knn: reading"]
    assert "(0.0, 100.0)" in notes[0]


def labelled(root: Path, value_range: tuple[float, float] | None) -> LabelledImages:
    for name in ("ant", "bee"):
        (root / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / name / "0.png")
    return LabelledImages(str(root), 8, value_range=value_range)


def test_a_table_of_an_earlier_version_grows(tmp_path: Path) -> None:
    file = tmp_path / "r.csv"
    append_csv({"knn": result([1, 0])}, file)
    file.write_text(file.read_text().replace(",std,", ",deviation,"))
    append_csv({"knn": result([1, 1])}, file)
    with file.open(newline="") as handle:
        lines = list(csv.DictReader(handle))
    assert [line["top1"] for line in lines] == ["50.00", "100.00"]
    assert "deviation" in lines[0]


def test_csv_of_several_processes_keeps_whole_lines(tmp_path: Path) -> None:
    file = tmp_path / "r.csv"
    with ThreadPoolExecutor(8) as pool:  # flock is a file handle's, so threads exclude one another as processes do
        list(pool.map(lambda _: append_csv({"knn": result([1, 0])}, file), range(40)))
    with file.open(newline="") as handle:
        rows = list(csv.reader(handle))
    assert len(rows) == 41
    assert all(len(row) == len(CSV_COLUMNS) for row in rows)
    assert sum(row[0] == "method" for row in rows) == 1


@pytest.mark.parametrize(
    ("content", "refusal"),
    [
        ("method,top1\nknn,3\n", ("csv-columns-differ", "top1")),
        (",".join(CSV_COLUMNS) + "\r\nknn,k=20", ("csv-line-cut-off", "r.csv")),
    ],
)
def test_csv_that_does_not_fit_is_refused_and_left_alone(tmp_path: Path, content: str, refusal: tuple[Any, ...]) -> None:
    file = tmp_path / "r.csv"
    file.write_bytes(content.encode())
    with refused(ValueError, *refusal):
        check_outputs(None, file)
    with refused(ValueError, *refusal):
        append_csv({"knn": result([1, 0])}, file)
    assert file.read_bytes() == content.encode()


def test_a_place_that_takes_no_results_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_outputs(tmp_path / "new/deep/r.json", None)
    assert (tmp_path / "new/deep").is_dir()
    with refused(ValueError, "output-is-a-folder", "new"):
        check_outputs(tmp_path / "new", None)
    with refused(ValueError, "output-folder-missing", "file/r.csv", "file"):
        check_outputs(None, tmp_path / "file/r.csv")


def test_a_file_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # a test run as root may write anywhere
    with refused(ValueError, "output-not-writable", "r.json"):
        check_outputs(tmp_path / "r.json", None)


def test_a_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    file, table = tmp_path / "result.json", tmp_path / "results.csv"
    write_json({"knn": result([1, 0])}, file)
    append_csv({"knn": result([1, 0])}, table)
    before = file.read_bytes(), table.read_bytes()
    many = {f"m{i}": result([1, 0], f"m{i}") for i in range(200)}
    with full_disk(4096):
        with refused(WriteError, "file-not-written", "result.json"):
            write_json(many, file)
        with refused(WriteError, "file-not-written", "results.csv"):
            append_csv(many, table)
    assert (file.read_bytes(), table.read_bytes()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["result.json", "results.csv"]
    append_csv({"knn": result([1, 0])}, table)  # no line was cut off
    assert len(table.read_text().splitlines()) == 3


def test_compare_matches_methods_and_settings() -> None:
    few = {"1 a class": {"top1": 50.0, "ci95": [0, 1], "correct": [0.5, 0.5, 0.5]}}
    first = {"knn": result([1, 1, 0]), "linear": result([1, 1, 1], "linear", "C by sweep")}
    second = {"knn": result([0, 1, 0]), "fewshot": {**result([0, 0, 0], "fewshot"), "scores": few}}
    second["knn"]["settings"] = {**second["knn"]["settings"], "image_size": 96}
    found, notes = compare_results(first, second)
    assert list(found) == [("knn", "k=20")]
    assert found["knn", "k=20"].first_only == 1
    assert notes == ["knn: image_size is 64 in the first run and 96 in the second"]
    with refused(ValueError, "results-share-no-method", "1"):
        compare_results({"linear": first["linear"]}, {"fewshot": second["fewshot"]})


def test_other_test_images_are_refused() -> None:
    with refused(ValueError, "tested-images-differ", "3", "te", "2", "--test"):
        compare_results({"knn": result([1, 1, 0])}, {"knn": result([1, 1])})
    # as many images, in another order
    other = result([1, 1, 0], test_list=list_digest([(f"{i}.png", "cat") for i in (1, 0, 2)]))
    with refused(ValueError, "tested-images-differ"):
        compare_results({"knn": result([1, 1, 0])}, {"knn": other})
