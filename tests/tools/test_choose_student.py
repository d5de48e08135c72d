"""hgkd doctor students: what is measured, what is refused and why, tables that other machines read. No test says how fast."""

import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
from refusals import refused

from hgkd.api import choose_student
from hgkd.api.benchmark import in_own_process
from hgkd.api.choose_student import candidates, choose_students, count_macs, measure_latency, measure_speedup
from hgkd.api.student_table import StudentRow, read_table, this_machine, write_table
from hgkd.cli import doctor
from hgkd.errors import DataError
from hgkd.export import MissingLibraryError

ROW = StudentRow("test_resnet", "board", "onnx", 1, 64)
FULL = replace(ROW, latency_ms=1.5, file_mb=0.25, parameters=1000, macs=10**6, speedup=2.0, speedup_of="board", version="x 1.0")
FAILED = replace(ROW, student="vit", failed='no "CNN", so refused [encoder-without-levels]')


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures in this process, a small network first."""
    monkeypatch.setattr(choose_student, "in_own_process", lambda function, *args: function(*args))
    monkeypatch.setattr(choose_student, "YARDSTICK", "test_resnet")
    monkeypatch.setattr(choose_student, "measure_speedup", lambda name, size, threads: 1.25)


@pytest.mark.parametrize("ending", [".json", ".csv"])
def test_a_table_is_read_back(tmp_path: Path, ending: str) -> None:
    write_table([FULL, FAILED], tmp_path / f"a{ending}")
    assert read_table(tmp_path / f"a{ending}") == [FULL, FAILED]


def test_what_is_no_table_is_refused(tmp_path: Path) -> None:
    with refused(FileNotFoundError, "student-table-missing", "a.csv"):
        read_table(tmp_path / "a.csv")
    with refused(ValueError, "table-format-unknown", "a.txt", ".csv"):
        read_table(tmp_path / "a.txt")
    for name, text in {"a.csv": "student,size\nresnet18,64\n", "b.json": '{"rows": 3}', "c.json": "["}.items():
        (tmp_path / name).write_text(text)
        with refused(DataError, "student-table-damaged", name):
            read_table(tmp_path / name)


def test_patterns() -> None:
    first, second = candidates(["mobileone_s[01]", "mobileone_s?"])
    assert (first, second) == (["mobileone_s0", "mobileone_s1"], ["mobileone_s2", "mobileone_s3", "mobileone_s4"])
    assert candidates(["torchvision.resnet18"]) == [["torchvision.resnet18"]]
    assert all(candidates(choose_student.DEFAULT_NAMES))
    with refused(ValueError, "student-unknown", "resnet81"):
        candidates(["resnet81"])


def test_multiplications_are_those_of_the_fused_network() -> None:
    assert count_macs("resnet18", 224) == 1_813_561_344  # by hand: 1.81 G, as the paper's 1.8 * 10^9
    fused = count_macs("mobileone_s0", 224)
    assert 250e6 < fused < 300e6  # the paper's table: 275 M
    assert count_macs("vit_tiny_patch16_224", 64) is None  # it takes 224 alone


@pytest.mark.parametrize("runtime", ["onnx", "openvino", "ncnn"])
def test_a_network_is_exported_and_timed(runtime: str) -> None:
    pytest.importorskip({"onnx": "onnxruntime"}.get(runtime, runtime))
    found = in_own_process(measure_latency, replace(ROW, runtime=runtime), 3)  # as the command does; ncnn needs it
    assert found is not None
    parameters = sum(p.numel() for p in timm.create_model("test_resnet", num_classes=0, global_pool="").parameters())
    assert found.failed == ""
    assert found.parameters == parameters
    assert found.file_mb == pytest.approx(parameters * 4e-6, rel=0.2)
    assert found.latency_ms > 0
    assert runtime in found.version


@pytest.mark.parametrize(
    ("name", "size", "code"),
    [
        ("edgenext_xx_small", 64, "operation-without-sparse-rule"),
        ("vit_tiny_patch16_224", 64, "encoder-does-not-run"),
        ("test_resnet", 100, "image-size-not-divided"),
    ],
)
def test_what_cannot_be_trained_sparse_is_told_with_its_reason(name: str, size: int, code: str) -> None:
    found = measure_latency(replace(ROW, student=name, size=size), 1)
    assert found.latency_ms is None
    assert re.search(r"\[(.+)\]$", found.failed)[1] == code


def test_a_stopped_run_goes_on_from_its_table(tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ncnn")
    asked = dict(budget_ms=1e6, runtime="ncnn", size=64, repeats=1, names=["test_resnet", "edgenext_xx_small"])
    first = choose_students(**asked, out=tmp_path / "a.csv", limit=1)
    assert [row.student for row in first.fits] == ["test_resnet"]
    assert first.fits[0].speedup == 1.25
    assert first.fits[0].macs == count_macs("test_resnet", 64)
    assert first.passed_over == {"edgenext_xx_small": "limit of 1 networks"}

    lines: list[str] = []
    second = choose_students(**asked, out=tmp_path / "a.csv", told=lines.append)
    assert second.fits == first.fits
    assert [row.student for row in second.failed] == ["edgenext_xx_small"]
    assert len(lines) == 1
    monkeypatch.delattr(choose_student, "measure_latency")
    third = choose_students(**{**asked, "budget_ms": 1e-9}, out=tmp_path / "a.csv")
    assert (third.fits, third.slow) == ([], [])  # the screen goes by the multiplications
    assert "test_resnet" in third.passed_over


def test_tables_of_other_machines(tmp_path: Path, here: None) -> None:
    pytest.importorskip("ncnn")
    elsewhere = [replace(FULL, runtime="ncnn"), replace(FULL, runtime="ncnn", threads=2)]
    write_table(elsewhere, tmp_path / "board.json")
    asked = dict(budget_ms=1e6, runtime="ncnn", size=64, repeats=1, names=["test_resnet"], tables=[tmp_path / "board.json"])
    found = choose_students(**asked, speedup=False, machine="mine")
    assert {row.machine: (row.speedup, row.speedup_of) for row in found.fits} == {
        "mine": (2.0, "board"),
        "board": (2.0, "board"),
    }
    alone = choose_students(**{**asked, "budget_ms": 2.0}, measure=False)
    assert alone.fits == elsewhere[:1]
    assert choose_students(**{**asked, "size": 96}, measure=False).notes == [
        "the tables have no row of ncnn, 1 thread(s), 96 px; they hold ncnn, 1 thread(s), 64 px; ncnn, 2 thread(s), 64 px"
    ]


def test_wrong_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    with refused(ValueError, "runtime-unknown", "onxx", "onnx"):
        choose_students(20, "onxx")
    with refused(ValueError, "budget-not-positive", "-1"):
        choose_students(-1, "onnx")
    with refused(ValueError, "count-not-positive", "threads", "0"):
        choose_students(20, "onnx", threads=0)

    monkeypatch.setitem(sys.modules, "ncnn", None)
    with refused(MissingLibraryError, "target-library-missing", "ncnn"):
        choose_students(20, "ncnn")
    with refused(MissingLibraryError, "target-library-missing", "ncnn"):
        measure_latency(replace(ROW, runtime="ncnn"), 1)


def test_a_crash_costs_one_number_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_own_process(os.getpid) not in (None, os.getpid())
    assert in_own_process(os._exit, 1) is None
    monkeypatch.setattr(choose_student, "in_own_process", lambda *_: None)
    assert "crashed" in choose_student._measured(ROW, 1).failed
    assert choose_student._with_speedup(FULL) == FULL


def test_the_ratio_of_a_training_step() -> None:
    assert measure_speedup("test_resnet", 64, 1) > 0


def test_the_command(tmp_path: Path, here: None, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ncnn")
    asked = ["students", "--runtime", "ncnn", "--size", "64", "--repeats", "1", "--names", "test_resnet", "edgenext_xx_small"]
    assert doctor.main([*asked, "--budget-ms", "1e6", "--out", str(tmp_path / "a.json")]) == 0
    printed = capsys.readouterr().out
    assert "within 1e+06 ms: ncnn, 1 thread(s), 64 px" in printed
    assert "cannot be a student here: edgenext_xx_small: " in printed
    assert {row.machine for row in read_table(tmp_path / "a.json")} == {this_machine()}
    assert doctor.main([*asked, "--budget-ms", "1e-9", "--out", str(tmp_path / "a.json")]) == 1
    assert doctor.main(["students", "--budget-ms", "20", "--runtime", "nothing"]) == 2
