"""A run that is killed, stopped or damaged anywhere ends with the weights of the unbroken one, bit for bit."""

import logging
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from refusals import refused
from tiny_runs import ROOT, SPARK, same, tiny, write_images

from hgkd.api import train as train_tool
from hgkd.data import images as reading
from hgkd.errors import StoppedError, WeightsError
from hgkd.registry import build_runner
from hgkd.training import CheckpointWriteError, DistillRunner
from hgkd.training import runner as running
from hgkd.weights import find_last_checkpoint
from hgkd.weights.files import read_checkpoint

# 2 epochs of 4 steps; crops, flips and masks are random
OPTIONS = {"batch_size": 4, "default_hooks.checkpoint.every_steps": 1, "default_hooks.checkpoint.every_minutes": None}
EMA = dict(type="EMAHook", momentum=0.1)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


class Killed(BaseException):
    """Stands for kill -9: nothing catches it and nothing is saved."""


class KillAt(Hook):
    """Ends the run after a step, or in the middle of a validation."""

    priority = "LOWEST"

    def __init__(self, step=None, validation=None, how=None):
        self.step, self.validation, self.how = step, validation, how

    def strike(self):
        if self.how is None:
            raise Killed
        os.kill(os.getpid(), self.how)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.step:
            self.strike()

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if runner.epoch == self.validation:
            self.strike()


def build(images, work_dir, hook=None, resume=False, **options):
    cfg = train_tool.load_config(SPARK, work_dir, resume=resume, options=tiny(images, **{**OPTIONS, **options}))
    cfg.custom_hooks = [dict(EMA), *cfg.custom_hooks]
    runner = build_runner(cfg)
    if hook is not None:
        runner.register_hook(hook)
    return runner


def killed(images, work_dir, hook, **options):
    with pytest.raises(Killed):
        build(images, work_dir, hook, **options).train()


def resumed(images, work_dir, **options):
    torch.manual_seed(123)  # whatever the process drew before
    runner = build(images, work_dir, resume=True, **options)
    runner.train()
    return runner


@pytest.fixture(scope="module")
def unbroken(images, tmp_path_factory):
    work_dir = tmp_path_factory.mktemp("unbroken")
    build(images, work_dir).train()
    return read_checkpoint(work_dir / "epoch_2.pth")


@pytest.fixture(scope="module")
def killed_run(images, tmp_path_factory):
    """Work folder of a run that was killed after 7 steps of 8; tests copy it."""
    work_dir = tmp_path_factory.mktemp("killed")
    killed(images, work_dir, KillAt(7))
    return work_dir


def assert_equal(work_dir, unbroken):
    found = read_checkpoint(work_dir / "epoch_2.pth")
    for part in ("state_dict", "ema_state_dict", "optimizer", "param_schedulers"):
        assert same(found[part], unbroken[part]), part
    ours, theirs = found["message_hub"], unbroken["message_hub"]
    assert ours["runtime_info"]["best_score"] == theirs["runtime_info"]["best_score"]
    losses = [hub["log_scalars"]["train/loss"].data[0].tolist() for hub in (ours, theirs)]
    assert len(losses[0]) == 8
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("step", "workers"), [(2, 2), (4, 0)])
def test_killed_after_a_step(images, unbroken, tmp_path, step, workers):
    killed(images, tmp_path, KillAt(step))
    expected = {2: "epoch_0_step_2.pth", 4: "epoch_0_step_3.pth"}[step]
    assert find_last_checkpoint(tmp_path) == str(tmp_path / expected)
    assert resumed(images, tmp_path, workers=workers).iter == 8
    assert_equal(tmp_path, unbroken)


def test_killed_between_two_checkpoints(images, unbroken, tmp_path):
    options = {"default_hooks.checkpoint.every_steps": 2}
    killed(images, tmp_path, KillAt(7), **options)
    assert find_last_checkpoint(tmp_path) == str(tmp_path / "epoch_1_step_2.pth")
    resumed(images, tmp_path, **options)
    assert_equal(tmp_path, unbroken)


def test_killed_in_a_validation_it_is_done_again(images, unbroken, tmp_path):
    killed(images, tmp_path, KillAt(validation=1))
    assert find_last_checkpoint(tmp_path) == str(tmp_path / "epoch_1.pth")
    resumed(images, tmp_path)
    assert_equal(tmp_path, unbroken)


def test_images_already_seen_are_not_read_again(images, tmp_path, monkeypatch):
    options = {"val_train_root": None, "val_test_root": None, "epochs": 2}
    killed(images, tmp_path, KillAt(6), **options)
    read = []
    decode = reading.decode
    monkeypatch.setattr(reading, "decode", lambda *given: read.append(given) or decode(*given))
    runner = build(images, tmp_path, resume=True, **options)
    runner._hooks = [hook for hook in runner._hooks if type(hook).__name__ != "VisualizationHook"]  # reads images of its own
    runner.train()
    assert len(read) == 2 * 4  # two steps of four images were left


def test_checkpoints_wait_for_the_end_of_an_accumulation(images, tmp_path):
    options = {"optim_wrapper.accumulative_counts": 2, "val_train_root": None, "val_test_root": None}
    build(images, tmp_path / "unbroken", **options).train()
    killed(images, tmp_path / "run", KillAt(3), **options)
    assert find_last_checkpoint(tmp_path / "run") == str(tmp_path / "run/epoch_0_step_2.pth")
    resumed(images, tmp_path / "run", **options)
    ours, theirs = (read_checkpoint(tmp_path / name / "epoch_2.pth") for name in ("run", "unbroken"))
    assert same(ours["state_dict"], theirs["state_dict"])
    assert same(ours["optimizer"], theirs["optimizer"])


class ScaledOptimWrapper(AmpOptimWrapper):
    """mmengine's, which wants an accelerator, with a loss scaler on the CPU that grows at every second update."""

    def __init__(self, **options):
        OptimWrapper.__init__(self, **options)
        self.loss_scaler, self._scale_update_param = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2), None

    def optim_context(self, model):
        return OptimWrapper.optim_context(self, model)


def test_the_loss_scaler_goes_on_where_it_was(images, tmp_path, monkeypatch):
    monkeypatch.setitem(OPTIM_WRAPPERS.module_dict, "ScaledOptimWrapper", ScaledOptimWrapper)
    options = {"optim_wrapper.type": "ScaledOptimWrapper", "val_train_root": None, "val_test_root": None}
    build(images, tmp_path / "unbroken", **options).train()
    killed(images, tmp_path / "run", KillAt(3), **options)
    resumed(images, tmp_path / "run", **options)
    ours, theirs = (read_checkpoint(tmp_path / name / "epoch_2.pth") for name in ("run", "unbroken"))
    assert ours["optimizer"]["loss_scaler"] == theirs["optimizer"]["loss_scaler"]
    assert theirs["optimizer"]["loss_scaler"]["scale"] == 4.0 * 2 ** (8 // 2)
    assert same(ours["state_dict"], theirs["state_dict"])


class KillReaders(Hook):
    priority = "LOWEST"  # after the checkpoint

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 0:  # two batches are read ahead, the fourth never is
            for reader in multiprocessing.active_children():
                os.kill(reader.pid, signal.SIGKILL)


def test_a_dead_reading_process_ends_the_run_which_can_be_resumed(images, unbroken, tmp_path):
    options = {"val_train_root": None, "val_test_root": None}
    with refused(StoppedError, "reading-process-killed"):
        build(images, tmp_path, KillReaders(), workers=1, **options).train()
    runner = resumed(images, tmp_path, **options)
    assert same(runner.optim_wrapper.state_dict()["state"], unbroken["optimizer"]["state"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_the_run_without_an_error(images, unbroken, tmp_path, number):
    before = signal.getsignal(number)
    # no checkpoint by steps: what is saved is saved because of the signal
    runner = build(images, tmp_path, KillAt(1, how=number), **{"default_hooks.checkpoint.every_steps": None})
    runner.train()
    assert runner.iter == 2  # the step after which the signal is seen
    assert signal.getsignal(number) is before
    assert find_last_checkpoint(tmp_path) == str(tmp_path / "epoch_0_step_2.pth")
    log = next(tmp_path.glob("*/*.log")).read_text()
    assert f"stopped by a signal ({number.name}) after epoch 0, step 2; saved {tmp_path}/epoch_0_step_2.pth" in log
    resumed(images, tmp_path)
    assert_equal(tmp_path, unbroken)


def test_a_signal_in_the_last_step_of_an_epoch_leaves_the_validation_to_the_resumed_run(images, unbroken, tmp_path):
    build(images, tmp_path, KillAt(3, how=signal.SIGTERM)).train()
    assert find_last_checkpoint(tmp_path) == str(tmp_path / "epoch_1.pth")
    assert "last_validated_epoch" not in read_checkpoint(tmp_path / "epoch_1.pth")["message_hub"]["runtime_info"]
    resumed(images, tmp_path)
    assert_equal(tmp_path, unbroken)


@pytest.mark.parametrize("damage", ["bit", "truncated", "empty", "absent"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(images, unbroken, killed_run, tmp_path, damage):
    shutil.copytree(killed_run, tmp_path, dirs_exist_ok=True)
    last = tmp_path / "epoch_1_step_3.pth"
    content = bytearray(last.read_bytes())
    if damage == "bit":
        content[len(content) // 2] ^= 1
    last.write_bytes({"bit": bytes(content), "truncated": bytes(content[: len(content) // 2])}.get(damage, b""))
    if damage == "absent":
        last.unlink()
    assert find_last_checkpoint(tmp_path) == str(tmp_path / "epoch_1_step_2.pth")
    if damage == "bit":  # one whole run is enough
        resumed(images, tmp_path)
        assert_equal(tmp_path, unbroken)
        log = sorted(tmp_path.glob("*/*.log"))[-1].read_text()
        assert f"{last} is damaged: its content does not agree with the hash" in log
        assert "falling back to the checkpoint before" in log


@pytest.mark.parametrize("moment", ["before the rename", "after the rename"])
def test_killed_while_a_checkpoint_is_written(images, unbroken, tmp_path, monkeypatch, moment):
    real, last = os.replace, "epoch_1_step_2.pth"

    def replace(source, target):
        if str(target).endswith(last) and moment == "before the rename":
            raise Killed
        real(source, target)
        if str(target).endswith(last):
            raise Killed

    monkeypatch.setattr("hgkd.training.runner.os.replace", replace)
    with pytest.raises(Killed):
        build(images, tmp_path).train()
    monkeypatch.undo()
    expected = "epoch_1_step_1.pth" if moment == "before the rename" else last
    assert find_last_checkpoint(tmp_path) == str(tmp_path / expected)
    resumed(images, tmp_path)
    assert not list(tmp_path.glob("*.partial"))
    assert_equal(tmp_path, unbroken)


def test_nothing_intact_is_an_error_not_a_new_start(killed_run, tmp_path):
    shutil.copytree(killed_run, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("*.pth"):
        path.write_bytes(path.read_bytes()[:1000])
    with refused(WeightsError, "no-intact-checkpoint"):
        find_last_checkpoint(tmp_path)


def test_another_batch_size_in_the_middle_of_an_epoch_is_refused(images, killed_run, tmp_path):
    shutil.copytree(killed_run, tmp_path, dirs_exist_ok=True)
    with refused(ValueError, "resume-other-batches", "epoch_1_step_3.pth", "2", "3", "4", "batch_size", "8"):
        resumed(images, tmp_path, batch_size=8)


def test_a_resume_names_the_settings_that_differ_and_nothing_else(images, killed_run, tmp_path):
    def warnings(**options):
        shutil.rmtree(tmp_path, ignore_errors=True)
        shutil.copytree(killed_run, tmp_path)
        resumed(images, tmp_path, **options)
        text = max(tmp_path.glob("*/*.log")).read_text()
        return re.findall("differs from .*", text)

    assert warnings(workers=1) == []
    (line,) = warnings(mask_ratio=0.75)
    assert line.endswith("is in force: model.mask.mask_ratio 0.5 -> 0.75")


def test_a_sampler_that_cannot_skip_is_refused_in_the_middle_of_an_epoch(images, killed_run, tmp_path):
    shutil.copytree(killed_run, tmp_path, dirs_exist_ok=True)
    with refused(ValueError, "resume-mid-epoch-sampler", "DefaultSampler", "EpochSampler"):
        resumed(images, tmp_path, **{"train_dataloader.sampler.type": "DefaultSampler"})


def test_loops_that_do_not_train_by_epochs_are_refused(images, tmp_path):
    runner = build(images, tmp_path, **{"train_cfg.by_epoch": False})
    with refused(ValueError, "train-cfg-not-by-epochs", "by_epoch=True"):
        runner.train()


def test_a_validation_every_zero_epochs_is_refused(images, tmp_path):
    runner = build(images, tmp_path, **{"train_cfg.val_interval": 0})
    with refused(ValueError, "val-interval-not-positive", "0", "val_train_root=None val_test_root=None"):
        runner.train()


def test_full_disk_is_told_and_leaves_the_checkpoints_before(images, unbroken, tmp_path, monkeypatch):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Fill(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            if runner.iter + 1 == 3:  # files of more than 100 kB cannot be written from now on: a real error of the system
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    try:
        with refused(CheckpointWriteError, "checkpoint-not-written", "epoch_0_step_3.pth", "--resume"):
            build(images, tmp_path, Fill()).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob("*.partial"))
    resumed(images, tmp_path)
    assert_equal(tmp_path, unbroken)


def start(images, work_dir, *extra, **options):
    """hgkd train as a process of its own, in its own process group, and the log of its steps."""
    options = tiny(images, **{**OPTIONS, **options})
    command = [sys.executable, str(ROOT / "tools/train.py"), str(SPARK), "--work-dir", str(work_dir), *extra]
    command += ["--cfg-options", *[f"{k}={v}" for k, v in options.items()]]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=env, cwd=work_dir, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.mark.slow
def test_a_whole_job_that_is_killed_and_then_preempted(images, tmp_path):
    # kill -9 of the training process, its reading processes are left to themselves
    first = start(images, tmp_path, workers=2, epochs=20)
    for line in first.stdout:
        if re.search(r"Epoch\(train\) +\[2\]\[3/4\]", line):
            first.kill()
            break
    assert first.wait() == -signal.SIGKILL
    first.stdout.close()
    at = int(read_checkpoint(find_last_checkpoint(tmp_path))["meta"]["iter"])
    assert at >= 6
    # SIGTERM to every process of the job, as SLURM sends it
    second = start(images, tmp_path, "--resume", workers=2, epochs=20)
    lines = []
    for line in second.stdout:
        lines.append(line)
        if re.search(r"Epoch\(train\) +\[4\]\[1/4\]", line):
            os.killpg(second.pid, signal.SIGTERM)
            break
    lines += second.stdout.readlines()
    assert second.wait() == 0, "".join(lines)[-3000:]
    assert "stopped by a signal (SIGTERM)" in "".join(lines)
    assert int(read_checkpoint(find_last_checkpoint(tmp_path))["meta"]["iter"]) >= 13


@pytest.mark.parametrize("found", ["elsewhere/epoch_1.pth", None])
def test_all_processes_go_on_from_what_the_first_one_finds(found, tmp_path, monkeypatch):
    """In a folder that is another machine's own lies nothing; a process that began anew would train other weights unseen."""
    run, resumed_from = DistillRunner.__new__(DistillRunner), []
    own = None if found else "epoch_9.pth"
    run.__dict__.update(_has_loaded=False, _resume=True, _load_from=None, _work_dir=str(tmp_path), logger=logging.getLogger())
    monkeypatch.setattr(running, "find_last_checkpoint", lambda folder: own)
    monkeypatch.setattr(running, "is_main_process", lambda: False)
    monkeypatch.setattr(running, "broadcast_object_list", lambda objects: objects.__setitem__(0, found))
    monkeypatch.setattr(DistillRunner, "resume", lambda self, file: resumed_from.append(file))
    run.load_or_resume()
    assert resumed_from == ([found] if found else [])
