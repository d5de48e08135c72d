"""The main job on generated images, from nothing to a report."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner
from rich.console import Console
from rich.table import Table

from hgkd.api.evaluate import evaluate
from hgkd.api.train import load_config
from hgkd.data.shapes import write_imagefolder
from hgkd.errors import InvalidValueError, StoppedError
from hgkd.export import export
from hgkd.export.job import ExportReport
from hgkd.pictures.report import Curves, Picture, ResultTable, Section, Text, read_scalars, write_report
from hgkd.registry import build_runner
from hgkd.weights.run_folder import find_last_checkpoint

TEACHER = "mae/mae_tiny_shapes"
DISTIL = "hgkd/hgkd_mae-tiny_resnet18_shapes"
CONTROL = "spark/spark_resnet18_shapes"


@dataclass(frozen=True)
class Plan:
    """Sizes of a demo run; everything else stands in the three configs.

    Attributes:
        train, test: images drawn; the training images serve pretraining (without labels) and the probes (with them).
        teacher_epochs, student_epochs: passes over the training images, where they are not the configs'; both students get the
            same.
        probe: labelled training images a class for k-NN and linear probe.
    """

    train: int = 3000
    test: int = 800
    teacher_epochs: int | None = None
    student_epochs: int | None = None
    probe: int = 150


FULL = Plan()
QUICK = Plan(train=640, test=160, teacher_epochs=4, student_epochs=2, probe=80)
_QUICK_TOLD = "this was a quick run: it is too short for its numbers to mean anything"
IMAGE_SIZE = 64  # pixels; that of the configs


class Stages:
    """Prints numbered stages with the time since the start."""

    def __init__(self, total: int) -> None:
        self.total, self.number, self.start = total, 0, time.perf_counter()

    def __call__(self, text: str) -> None:
        self.number += 1
        print(f"\n== [{self.number}/{self.total}] {time.perf_counter() - self.start:4.0f} s  {text}", flush=True)


def demo(out: str | Path, quick: bool = False, seed: int = 0, plan: Plan | None = None) -> dict[str, Any]:
    """Run everything.

    Args:
        out: folder for all results; must be new or empty.
        quick: sizes that show that it works, not how well.
        plan: other sizes.

    Returns:
        ``{'results': {name: {'knn': result, 'linear': result}}, 'report': path, 'export': path, 'seconds': number}``.

    Raises:
        ValueError: ``out`` is not empty.
        StoppedError: SIGTERM or SIGINT while a network was trained, see also :func:`hgkd.train`.
    """
    plan = plan or (QUICK if quick else FULL)
    out = Path(out).expanduser().resolve()
    if out.exists() and any(out.iterdir()):
        raise InvalidValueError("output-not-empty", f"{out} is not empty; give --out another folder, or delete it")
    stage = Stages(7)
    runs, data = out / "runs", out / "shapes"

    stage(f"drawing {plan.train + plan.test} images of shapes")
    write_imagefolder(data, plan.train, plan.test, IMAGE_SIZE, seed, clutter=False)
    common = {"data_root": str(data / "train"), "val_train_root": None, "val_test_root": None, "seed": seed, "workers": 0}
    common["log_level"] = "WARNING"  # the epochs are told by _Progress; every step is in the runs' scalars.json

    stage("pretraining a small MAE: the teacher")
    mae = _timed(lambda: _train(TEACHER, runs / "teacher", common | _epochs(plan.teacher_epochs)))
    teacher_file = mae.value.model.save_teacher(out / "teacher.safetensors")

    stage("H-GKD: a sparse ResNet-18 learns what the teacher sees in the whole image")
    # one set of options for both students: only the objective differs
    student = common | _epochs(plan.student_epochs)
    # at toy size it still looks random; the table says what it is worth
    teacher_of_student = {"teacher_checkpoint": str(teacher_file), "model.teacher.allow_random": True}
    distilled = _timed(lambda: _train(DISTIL, runs / "hgkd", student | teacher_of_student))

    stage("the control: the same student and steps, pixels instead of a teacher")
    control = _timed(lambda: _train(CONTROL, runs / "pixels", student))

    stage("k-NN and linear probe of all four")
    block = distilled.value.model.objectives["hgkd"].needs.blocks[0]
    subjects: dict[str, dict[str, Any]] = {
        "random ResNet-18": {"backbone": "resnet18"},
        "pixels (SparK)": {"backbone": find_last_checkpoint(runs / "pixels")},
        "H-GKD": {"backbone": find_last_checkpoint(runs / "hgkd")},
        "teacher (MAE)": {"backbone": str(teacher_file), "block": block},
    }
    results = {}
    for name, subject in subjects.items():
        results[name] = evaluate(
            ["knn", "linear"],
            train=str(data / "train"),
            test=str(data / "test"),
            image_size=IMAGE_SIZE,
            limit_per_class=plan.probe,
            workers=0,
            seed=seed,
            **subject,
        )
        print(
            f"{name:18s} k-NN {results[name]['knn']['top1']:5.1f} %   linear {results[name]['linear']['top1']:5.1f} %",
            flush=True,
        )

    stage("exporting the student for timm, and reading it back")
    exported = export(subjects["H-GKD"]["backbone"], out / "student", to="timm")

    stage("writing the report")
    seconds = {"teacher (MAE)": mae.seconds, "H-GKD": distilled.seconds, "pixels (SparK)": control.seconds}
    report = _report(out, plan, seed, results, seconds, exported, _QUICK_TOLD if quick else "")
    total = time.perf_counter() - stage.start
    _print_table(results, seconds)
    if quick:
        print(_QUICK_TOLD)
    print(
        f"pictures  {runs / 'hgkd' / 'pictures'}\nstudent   {exported.out}\nreport    {report}\n{total:.0f} s in all",
        flush=True,
    )
    return {"results": results, "report": report, "export": exported.out, "seconds": total}


class _Progress(Hook):
    """Tells each epoch on the console."""

    priority = "VERY_LOW"

    def before_train(self, runner: Runner) -> None:
        runner.train_loop.resumable = False  # type: ignore[union-attr]  # a demo that was stopped begins anew

    def after_train_epoch(self, runner: Runner) -> None:
        loss = runner.message_hub.get_scalar("train/loss").mean(len(runner.train_dataloader))
        print(f"   epoch {runner.epoch + 1}/{runner.max_epochs}  loss {loss:.4f}", flush=True)


def _epochs(number: int | None) -> dict[str, Any]:
    return {} if number is None else {"epochs": number}


def _train(config: str, work_dir: Path, options: dict[str, Any]) -> Runner:
    cfg = load_config(config, work_dir, options=options)
    runner: Runner = build_runner(cfg)
    runner.register_hook(_Progress())
    runner.train()
    if runner.train_loop.interrupted:  # type: ignore[union-attr]
        told = f"a signal ended the demo in the training {work_dir.name!r}, so there is no table and no report"
        raise StoppedError("demo-stopped", f"{told}; delete {work_dir.parents[1]}, or give another --out, and restart")
    return runner


@dataclass(frozen=True)
class _Timed:
    value: Any
    seconds: float


def _timed(job: Callable[[], Any]) -> _Timed:
    start = time.perf_counter()
    value = job()
    return _Timed(value, time.perf_counter() - start)


def _rows(results: dict[str, Any], seconds: dict[str, float]) -> list[list[str]]:
    rows = []
    for name, found in results.items():
        cells = [name]
        for method in ("knn", "linear"):
            low, high = found[method]["ci95"]
            cells.append(f"{found[method]['top1']:.1f} ({low:.1f} .. {high:.1f})")
        rows.append([*cells, f"{seconds[name]:.0f}" if name in seconds else ""])
    return rows


_COLUMNS = ["backbone", "k-NN top-1 % (95 %)", "linear top-1 % (95 %)", "training s"]


def _print_table(results: dict[str, Any], seconds: dict[str, float]) -> None:
    table = Table(title="frozen features on generated shapes")
    for i, column in enumerate(_COLUMNS):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in _rows(results, seconds):
        table.add_row(*row)
    Console().print(table)


def _report(
    out: Path, plan: Plan, seed: int, results: dict[str, Any], seconds: dict[str, float], exported: ExportReport, caveat: str
) -> Path:
    runs = out / "runs"
    curves = [
        Curves({name: read_scalars(runs / folder, key)}, "step", name)
        for name, folder, key in (
            ("MAE loss", "teacher", "loss"),
            ("H-GKD loss", "hgkd", "loss"),
            ("pixel loss", "pixels", "loss"),
        )
    ]
    pictures = []
    for name, folder in (("H-GKD", "hgkd"), ("pixels", "pixels")):
        newest = max((runs / folder / "pictures").glob("*.png"), key=lambda p: p.stat().st_mtime)
        pictures.append(Picture(newest, f"{name}: what the student sees, and what it makes of it ({newest.name})"))
    test = results["H-GKD"]["knn"]
    setting = (
        f"{plan.train} generated images of {IMAGE_SIZE} px, seed {seed}; probes with "
        f"{test['train_images']} labelled training and {test['test_images']} test images; intervals: bootstrap over test "
        "images; the result of another seed may lie outside."
    )
    sections = [
        Section(
            "Frozen features", [ResultTable(_COLUMNS, _rows(results, seconds)), *map(Text, filter(None, [caveat, setting]))]
        ),
        Section("Pictures", pictures),
        Section("Learning curves", curves),
        Section(
            "Export",
            [
                Text(
                    f"{exported.out}: {exported.parameters:,} parameters, read back with {exported.loaded_with}; outputs "
                    f"differ from the student's by {exported.max_difference:.1e}."
                )
            ],
        ),
        Section("Recipes", [Text(f"{TEACHER}\n{DISTIL}\n{CONTROL}", code=True)]),
    ]
    return write_report(out / "report.html", "hgkd demo", sections)
