"""``hgkd benchmark report``: what it says of a machine; and the engine's benchmark where mmengine is absent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from refusals import refused

from hgkd.api import report as report_api
from hgkd.api.report import Machine, benchmark_report
from hgkd.cli import benchmark

ROOT = Path(__file__).parents[2]
SMALL = Machine("cpu", ("fp32",), 2, families=("test_resnet",), student="test_resnet", image_size=64)


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch):
    monkeypatch.setattr(report_api, "_MOST_ROUNDS", 1)
    monkeypatch.setattr(report_api, "LAYERS", report_api.LAYERS[-1:])


def test_a_report_holds_all_parts_as_markdown_and_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Machine, "of", lambda device: SMALL)
    assert benchmark.main(["report", "--out", str(tmp_path / "out"), "--budget", "300"]) == 0
    result = json.loads((tmp_path / "out/report.json").read_text())
    assert result["ok"]
    parts = result["parts"]
    assert list(parts) == ["correctness", "kernels", "encoder step", "whole step", "loader"]
    assert all("rows" in part for part in parts.values()), parts
    exact = [row for row in parts["correctness"]["rows"] if row["precision"] == "float64"]
    assert [row["student"] for row in exact] == ["test_resnet"]
    assert all(row["outputs"] < 1e-9 and row["gradients"] < 1e-9 and row["repeatable"] for row in exact)
    assert all(row["gradients"] > 0 for row in parts["correctness"]["rows"])
    (kernel,) = parts["kernels"]["rows"]
    times = {name: kernel[f"{name} ms"] for name in ("dense", "im2col", "halo", "map")}
    assert kernel["fastest"] == min(times, key=times.get)
    steps = {row["step"]: row for row in parts["encoder step"]["rows"]}
    assert steps["gather"]["over dense"] == pytest.approx(steps["dense"]["step ms"] / steps["gather"]["step ms"])
    assert [row["step"] for row in parts["whole step"]["rows"]] == ["gather", "dense"]
    assert all(row["images/s"] > 0 for row in parts["loader"]["rows"])
    assert result["machine"]["torch"] == torch.__version__
    page = (tmp_path / "out/report.md").read_text()
    assert page.count("\n### ") == 5
    assert f"| test_resnet | float64 | {exact[0]['outputs']:.3g} |" in page
    assert page in capsys.readouterr().out


def test_a_slow_machine_gets_a_small_batch(monkeypatch):
    monkeypatch.setattr(report_api, "_turns", lambda steps, device, seconds: {"dense": 4.0})  # two seconds an image
    sizes = {
        seconds: report_api.fitting_batch(Machine("cpu", ("fp32",), 64, student="test_resnet"), seconds)
        for seconds in (1, 100, 10**6)
    }
    assert sizes == {1: 2, 100: 3, 10**6: 64}


def test_wrong_values_are_seen(tmp_path, monkeypatch, capsys):
    honest = report_api.sparsify

    def slightly_wrong(network, cell, backend):
        made = honest(network, cell, backend)
        if backend == "gather":
            with torch.no_grad():
                next(made.parameters())[0, 0, 0, 0] += 1e-3
        return made

    monkeypatch.setattr(report_api, "sparsify", slightly_wrong)
    rows = report_api.correctness(Machine("cpu", ("fp32",), 2, families=("test_resnet",)), 100)
    assert [row["ok"] for row in rows] == [False, False]
    monkeypatch.setattr(report_api, "facts", lambda machine: {"device": "x", "date": "y"})
    for name in ("kernels", "encoder_step_rows", "whole_step", "loader"):
        monkeypatch.setattr(report_api, name, lambda machine, seconds: [])
    monkeypatch.setattr(Machine, "of", lambda device: Machine("cpu", ("fp32",), 2, families=("test_resnet",)))
    assert benchmark.main(["report", "--out", str(tmp_path)]) == 1
    assert "did not hold" in capsys.readouterr().out


def test_a_budget_is_kept_and_a_part_that_fails_leaves_the_others(tmp_path, monkeypatch):
    clock = iter(range(0, 10**6, 30))  # every look at the clock costs half a minute
    monkeypatch.setattr(report_api.time, "perf_counter", lambda: float(next(clock)))

    def fails(machine, seconds):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(report_api, "correctness", fails)
    monkeypatch.setattr(report_api, "kernels", lambda machine, seconds: [{"given": seconds}])
    result = benchmark_report(tmp_path, budget=200, machine=SMALL)
    parts = result["parts"]
    assert parts["correctness"]["rows"] == [{"error": "RuntimeError: out of memory", "ok": False}]
    assert parts["kernels"]["rows"][0]["given"] <= 40
    assert parts["loader"]["skipped"] == "the budget was spent"
    assert not result["ok"]
    with refused(ValueError, "budget-not-positive", "0"):
        benchmark_report(tmp_path, budget=0)


BLOCKED = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mmengine":
            raise ModuleNotFoundError(f"No module named {name!r}", name="mmengine")
sys.meta_path.insert(0, Absent())
from hgkd.__main__ import main
from hgkd.api import report
assert "mmengine" not in sys.modules
report.Machine.of = classmethod(lambda cls, device: cls(device, ("fp32",), 2, ("test_resnet",), "test_resnet", 64))
report.LAYERS, report._MOST_ROUNDS = report.LAYERS[-1:], 1
codes = [main(["benchmark", *command.split()]) for command in sys.argv[1:]]
assert not any(name.partition(".")[0] == "mmengine" for name in sys.modules)
print("codes", codes)
"""


def test_the_engine_is_measured_without_mmengine(tmp_path):
    sparse = "sparse --student test_resnet --image-size 64 --mask-ratio 0.75 --batch-size 2 --repeats 1"
    commands = [sparse, f"report --out {tmp_path / 'out'}", "data --data-root x", "distill x"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *commands], env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "codes [0, 0, 2, 2]" in done.stdout, done.stderr
    assert done.stderr.count("[mmengine-missing]") == 2
    parts = json.loads((tmp_path / "out/report.json").read_text())["parts"]
    assert {name: part.get("skipped") for name, part in parts.items()} == {
        "correctness": None,
        "kernels": None,
        "encoder step": None,
        "whole step": "needs mmengine, which is not installed",
        "loader": "needs mmengine, which is not installed",
    }
