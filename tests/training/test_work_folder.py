"""Who may write into a work folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from full_disk import full_disk
from mmengine.hooks import Hook
from refusals import refused
from tiny_runs import SPARK, tiny, write_images

from hgkd.api import train as train_tool
from hgkd.cli import train as train_command
from hgkd.diagnosis.dry_run import dry_run
from hgkd.registry import build_runner
from hgkd.training.work_folder import LOCK_NAME, FolderInUseError, check_unused, lock_folder, release_folder, results_in

pytest.importorskip("fcntl")
HOLD = """
import fcntl, sys
handle = open(sys.argv[1], "a+")
fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
handle.write('{"process": 4711, "machine": "other", "start": "2026-11-28 10:00:00 +0000"}')
handle.flush()
print("held", flush=True)
sys.stdin.read()
"""


class Other:
    """Another process that holds a folder."""

    def __init__(self, folder):
        command = [sys.executable, "-c", HOLD, str(folder / LOCK_NAME)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "held\n"

    def __enter__(self):
        return self.process

    def __exit__(self, *exception):
        self.process.kill()
        self.process.communicate()


def test_a_folder_that_is_held_is_refused_and_the_holder_is_named(tmp_path):
    with Other(tmp_path) as other:
        message = r"is in use by a training: process 4711 on other, started 2026-11-28 10:00:00 \+0000. Wait .* --work-dir"
        for _ in range(2):
            with pytest.raises(FolderInUseError, match=message):
                lock_folder(tmp_path)
        other.kill()  # kill -9: nothing is cleared up
        other.wait()
        # no clock, no process number: the lock ended with its process
        assert "ended without clearing up is taken over: process 4711 on other" in lock_folder(tmp_path)
    release_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_held_folder_stays_held_until_it_is_released(tmp_path):
    assert lock_folder(tmp_path) is None
    assert lock_folder(tmp_path) is None  # this process's own
    # read by another process: a handle that this one closes would end the lock
    said = subprocess.run(["cat", tmp_path / LOCK_NAME], capture_output=True, check=True).stdout
    assert set(json.loads(said)) == {"process", "machine", "start"}
    with pytest.raises(AssertionError):
        Other(tmp_path)
    release_folder(tmp_path)
    with Other(tmp_path):
        pass
    release_folder(tmp_path)  # not held: nothing happens


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("hgkd.training.work_folder.fcntl.lockf", refuse)
    assert "a file system without locks (No locks available)" in lock_folder(tmp_path)


def open_locks():
    return [file for file in map(os.path.realpath, Path("/proc/self/fd").iterdir()) if LOCK_NAME in file]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not list open files")
@pytest.mark.parametrize("ending", ["dry run", "end", "error", "refused", "full"])
def test_no_lock_stays_open_in_any_ending(tmp_path, monkeypatch, ending):
    monkeypatch.chdir(tmp_path)
    options = tiny(write_images(tmp_path / "images"), epochs=1, warmup_epochs=0, val_train_root=None, val_test_root=None)
    before = open_locks()  # of runners that other tests of this process have built and not trained
    if ending == "dry run":
        dry_run(train_tool.load_config(SPARK, "run", options=options))
    elif ending == "end":
        train_tool.train(SPARK, "run", options=options)
    elif ending == "error":

        def fail(*given, **options):
            raise RuntimeError("in a step")

        monkeypatch.setattr("hgkd.distillers.masked.MaskedDistiller.train_step", fail)
        with pytest.raises(RuntimeError, match="in a step"):
            train_tool.train(SPARK, "run", options=options)
    elif ending == "refused":
        with refused(ValueError, "type-not-found", "optimizer"):
            train_tool.train(SPARK, "run", options={**options, "optim_wrapper.optimizer.type": "Adma"})
    else:
        (tmp_path / "run").mkdir()
        with full_disk(5), pytest.raises(OSError, match="too large"):
            lock_folder("run")
    assert not set(open_locks()) - set(before)
    assert not (tmp_path / "run" / LOCK_NAME).exists()


def test_results_of_another_training_are_not_overwritten(tmp_path):
    check_unused(tmp_path, False, None)
    (tmp_path / "backbone.pth").touch()
    (tmp_path / "checkpoints.txt").write_text("epoch_3_step_2.pth\n")
    check_unused(tmp_path, False, None)  # neither is a result of a training
    for name in ("epoch_3_step_2.pth", "student.pth", "iter_20.pth", "best_mIoU_iter_20.pth"):
        (tmp_path / name).touch()
        assert results_in(tmp_path) == [name]
        with refused(ValueError, "work-folder-in-use", name, "--resume", "--work-dir"):
            check_unused(tmp_path, False, None)
        with refused(ValueError, "work-folder-in-use", "/elsewhere/epoch_1.pth"):
            check_unused(tmp_path, True, "/elsewhere/epoch_1.pth")
        check_unused(tmp_path, True, None)
        check_unused(tmp_path, True, str(tmp_path / "epoch_1.pth"))
        check_unused(tmp_path, True, str(tmp_path / ".." / tmp_path.name / "epoch_1.pth"))  # as typed from another folder
        (tmp_path / name).unlink()


class Look(Hook):
    def after_train(self, runner):
        Look.held = (Look.folder / LOCK_NAME).is_file()


def test_trainings(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = tiny(write_images(tmp_path / "images"), epochs=1, warmup_epochs=0, val_train_root=None, val_test_root=None)
    run = Look.folder = tmp_path / "run"
    run.mkdir()
    arguments = [str(SPARK), "--work-dir", str(run), "--cfg-options", *(f"{k}={v}" for k, v in options.items())]
    # 1. while another one runs there: nothing is touched
    with Other(run):
        assert train_command.main(arguments) == 2
    assert [path.name for path in run.iterdir()] == [LOCK_NAME]
    assert "is in use by a training: process 4711 on other" in capsys.readouterr().err
    # 2. it was killed: the lock is taken over, held to the end, and left to nobody
    cfg = train_tool.load_config(SPARK, run, options=options)
    runner = build_runner(cfg)
    runner.register_hook(Look())
    runner.train()
    assert Look.held
    assert not (run / LOCK_NAME).exists()
    assert "is taken over: process 4711 on other" in next(run.glob("*/*.log")).read_text()
    # 3. a new training in the same folder
    before = sorted(run.rglob("*"))
    assert train_command.main(arguments) == 2
    assert sorted(run.rglob("*")) == before
    error = capsys.readouterr().err
    assert "holds the results of a training (epoch_1.pth), which a new training would overwrite" in error
    assert "Traceback" not in error
    # 4. both ways out, and a look ahead that writes nothing there
    assert train_command.main([*arguments, "--resume"]) == 0
    assert train_command.main([*arguments, "--dry-run"]) == 0
