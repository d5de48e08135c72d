"""docs/tutorials/objective.md, run whole at tiny size: the objective of its file is trained, and compared by its plan."""

import contextlib
import sys
from concurrent.futures import Future

import pytest
from tiny_commands import readers_folder, run_command
from tiny_runs import ROOT
from tutorial_pages import run_page

import hgkd
from hgkd.api import compare
from hgkd.cli.main import main
from hgkd.data.shapes import write_imagefolder

PAGE = ROOT / "docs/tutorials/objective.md"
FEW = ["model.student.decoder_width=32", "warmup_epochs=0", "default_hooks.logger.interval=1"]
FEW_LABELS = ["val_dataloader.dataset.bank.limit_per_class=2", "val_dataloader.dataset.query.limit_per_class=2"]
MORE = {"train": FEW, "compare": ["--cfg-options", "student=test_resnet", *FEW, *FEW_LABELS]}


class AtOnce:
    """In place of a pool of threads: signals are the main thread's."""

    def __init__(self, jobs):
        assert jobs == 1

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def submit(self, job, *args):
        future = Future()
        future.set_result(job(*args))
        return future


def in_this_process(command, log, threads):
    """In place of a process for each run, most of whose seconds are imports."""
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = main(command)
    assert code == 0, log.read_text()
    return 1.0, 1.0


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A reader's folder with what the first tutorial leaves: images and a teacher."""
    home = readers_folder(tmp_path, monkeypatch) / "home"
    out = home / "first-student/demo_out"
    write_imagefolder(out / "shapes", 40, 16, 64, 0, clutter=False)
    options = dict(
        data_root=str(out / "shapes/train"), val_train_root=None, val_test_root=None, epochs=1, warmup_epochs=0, workers=0
    )
    runner = hgkd.train("mae/mae_tiny_shapes", tmp_path / "teacher", options=options)
    runner.model.save_teacher(out / "teacher.safetensors")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(compare, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(compare, "_process", in_this_process)
    return home / "first-student"


@pytest.mark.slow
def test_objective(folder):
    names = run_page(PAGE, lambda words: run_command(words, MORE[words[0]]))
    assert (folder / "compared/relations_seed2/result.json").is_file()
    features = names["tokens"]
    unlike = names["relations"](features.flip(-1))
    assert names["squared_error"](unlike, names["relations"](features)).mean() > 0.01
