"""The report page: self-contained, escaped, and with what it was given."""

import base64
import json
import re
from pathlib import Path

import pytest
from PIL import Image
from refusals import refused

from hgkd.pictures.report import Curves, Picture, ResultTable, Section, Text, read_scalars, write_report


def test_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (3, 2), (255, 0, 0)).save(picture)
    nasty = "<script>alert('x')</script>"
    parts = [
        ResultTable(["backbone", nasty], [["random", 1.5], [nasty, "2 & 3"]]),
        Curves({"loss": ([1, 2], [0.5, 0.25])}, "step", "loss"),
        Picture(picture, nasty),
        Text("python tools/x.py --a <b>", code=True),
    ]
    page = write_report(tmp_path / "out" / "report.html", nasty, [Section(nasty, parts)]).read_text()
    assert "<script" not in page
    assert "http" not in page
    assert page.count("&lt;script&gt;") >= 6
    assert "2 &amp; 3" in page
    embedded = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert len(embedded) == 2
    assert picture.read_bytes() in embedded
    assert all(png.startswith(b"\x89PNG") for png in embedded)
    assert not list((tmp_path / "out").glob("*.part"))


def test_missing_picture_is_an_error_and_leaves_no_page(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path / "r.html", "t", [Section("s", [Picture(tmp_path / "none.png")])])
    assert not (tmp_path / "r.html").exists()


def test_scalars_of_a_resumed_run(tmp_path: Path) -> None:
    for name, lines in (
        ("20260101_000000", [{"loss": 3.0, "step": 1}, {"loss": 2.0, "step": 2}, {"knn/top1": 9.0, "step": 1}]),
        ("20260101_000100", [{"loss": 1.0, "step": 2}, {"loss": 0.5, "step": 3}]),
    ):
        folder = tmp_path / name / "vis_data"
        folder.mkdir(parents=True)
        (folder / "scalars.json").write_text("\n".join(json.dumps(line) for line in lines))
    assert read_scalars(tmp_path, "loss") == ([1, 2, 3], [3.0, 1.0, 0.5])
    assert read_scalars(tmp_path, "knn/top1") == ([1], [9.0])
    with refused(FileNotFoundError, "scalars-missing"):
        read_scalars(tmp_path / "none", "loss")
