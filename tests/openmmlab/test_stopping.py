"""Signals end detectors and segmentors with a checkpoint to go on from; losses that are not finite do not reach the weights."""

import os
import signal
import subprocess
import sys
from typing import ClassVar

import pytest
import torch
from downstream_runs import FASTER_HEAD, need, shapes_ade20k, shapes_coco, tiny_detector, tiny_segmentor, train_tool
from mmengine.hooks import Hook
from refusals import refused
from tiny_runs import ROOT, torchrun

from hgkd.cli import train as train_command
from hgkd.errors import DivergedError
from hgkd.openmmlab import DownstreamRunner
from hgkd.registry import HOOKS
from hgkd.weights.run_folder import find_last_checkpoint

need("mmdet", "mmseg")
DETECTOR = ROOT / "downstream/detection/faster-rcnn_r18_12e_bccd.py"
SEGMENTOR = ROOT / "downstream/segmentation/upernet_r18_1k_camvid.py"


@HOOKS.register_module()
class Watch(Hook):
    """Notes (epoch, images) of each step, and sends this process a signal before one of them, or in a validation."""

    seen: ClassVar[list] = []

    def __init__(self, step=None, validation=None):
        self.step, self.validation = step, validation

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        Watch.seen.append((runner.epoch, [sample.img_path[-5] for sample in data_batch["data_samples"]]))
        if runner.iter + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)

    def before_val_epoch(self, runner):
        if self.validation:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(autouse=True)
def nothing_seen():
    Watch.seen = []


def run(config, folder, options, resume=False, **watch):
    cfg = train_tool.load_config(config, folder, resume, options=options)
    cfg.custom_hooks = [*cfg.get("custom_hooks", []), dict(type="hgkd.Watch", **watch)]
    runner = train_tool.train(cfg)
    return runner, "".join(file.read_text() for file in sorted(folder.glob("*/*.log")))


def detector(folder, **options):
    return {**tiny_detector(shapes_coco(folder / "data")), **FASTER_HEAD, "batch_size": 1, "epochs": 2, **options}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_detector_goes_on_in_the_middle_of_an_epoch(tmp_path, workers):
    options = detector(tmp_path, workers=workers)
    options["train_cfg.val_interval"] = 2
    runner, log = run(DETECTOR, tmp_path / "run", options, step=6)
    assert runner.train_loop.interrupted
    assert (runner.epoch, runner.iter) == (1, 6)  # the step before which the signal came is done
    file = tmp_path / "run/epoch_1_step_2.pth"
    assert f"stopped by a signal (SIGTERM) after epoch 1, step 2; saved {file}, continue with --resume" in log
    assert "it reads 2 batches of the epoch again, and trains on the other 2" in log
    assert "Epoch(val)" not in log

    runner, log = run(DETECTOR, tmp_path / "run", options, resume=True)
    assert not runner.train_loop.interrupted
    assert (runner.epoch, runner.iter) == (2, 8)
    assert "passing over the 2 of 4 batches of epoch 2" in log
    assert "Epoch(val)" in log
    for epoch in (0, 1):  # each image once
        assert sorted(image for at, images in Watch.seen for image in images if at == epoch) == ["0", "1", "2", "3"]
    assert find_last_checkpoint(tmp_path / "run") == str(tmp_path / "run/epoch_2.pth")


def test_in_the_last_step_of_an_epoch_it_is_validated_first(tmp_path):
    options = detector(tmp_path)
    options["train_cfg.val_interval"] = 1
    runner, log = run(DETECTOR, tmp_path / "run", options, step=4)
    assert (runner.epoch, runner.iter) == (1, 4)
    assert f"after epoch 1, step 0; saved {tmp_path}/run/epoch_1.pth, continue with --resume: nothing is repeated" in log
    assert "Epoch(val)" in log
    assert run(DETECTOR, tmp_path / "run", options, resume=True)[0].iter == 8


def test_a_signal_in_a_validation(tmp_path):
    options = detector(tmp_path)
    options["train_cfg.val_interval"] = 1
    runner, log = run(DETECTOR, tmp_path / "run", options, validation=True)
    assert (runner.epoch, runner.iter) == (1, 5)  # the validation, and the step after it
    assert "stopped by a signal (SIGINT) after epoch 1, step 1; saved" in log


def test_a_signal_at_the_very_end_changes_nothing(tmp_path):
    runner, log = run(DETECTOR, tmp_path / "run", detector(tmp_path), step=8)
    assert not runner.train_loop.interrupted
    assert runner.epoch == 2
    assert "stopped by a signal" not in log


def test_gradients_in_accumulation_are_not_thrown_away(tmp_path):
    options = detector(tmp_path, **{"optim_wrapper.accumulative_counts": 2})
    assert run(DETECTOR, tmp_path / "run", options, step=1)[0].iter == 2


def test_another_number_of_steps_in_the_middle_of_an_epoch(tmp_path):
    options = detector(tmp_path)
    run(DETECTOR, tmp_path / "run", options, step=1)
    with pytest.raises(ValueError, match=r"step_1.pth is from step 1 of an epoch of 4 steps, and an epoch has 2 now. Resume"):
        run(DETECTOR, tmp_path / "run", {**options, "batch_size": 2}, resume=True)


def test_without_a_checkpoint_hook(tmp_path):
    options = detector(tmp_path)
    cfg = train_tool.load_config(DETECTOR, tmp_path / "run", options=options)
    cfg.default_hooks.checkpoint = None
    _, log = run(cfg, tmp_path / "run", {}, step=1)
    assert "after epoch 0, step 1; no checkpoint hook, so nothing was saved" in log


def test_a_segmentor(tmp_path):
    options = {**tiny_segmentor(shapes_ade20k(tmp_path / "data")), "iterations": 6}
    runner, log = run(SEGMENTOR, tmp_path / "run", options, step=2)
    assert runner.train_loop.interrupted
    assert runner.iter == 2
    assert f"after epoch 0, step 2; saved {tmp_path}/run/iter_2.pth, continue with --resume: it reads 2 batches" in log
    assert run(SEGMENTOR, tmp_path / "run", options, resume=True)[0].iter == 6
    resumed = [images for _, images in Watch.seen]
    Watch.seen = []
    run(SEGMENTOR, tmp_path / "whole", options)
    assert resumed == [images for _, images in Watch.seen]  # the order of a run that was not stopped


def test_readers_that_persist_do_not_keep_a_process_from_ending():
    code = (
        "from torch.utils.data import DataLoader; from hgkd.training.loop import end_workers_at_exit, ignore_first_signal\n"
        "loader = DataLoader(list(range(4)), num_workers=1, persistent_workers=True, worker_init_fn=ignore_first_signal)\n"
        "end_workers_at_exit(); list(loader); print('done')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.slow
def test_two_processes_stop_together(tmp_path):
    (tmp_path / "stop.py").write_text(
        "import os, signal, sys\n"
        f"sys.path[:0] = [{str(ROOT / 'tests')!r}, {str(ROOT / 'tests/openmmlab')!r}]\n"
        "import test_stopping as here\n"
        "from pathlib import Path\n"
        "class OneOfTwo(here.Watch):\n"
        "    def before_train_iter(self, runner, batch_idx, data_batch=None):\n"
        "        if runner.iter == 0 and runner.rank == 1:\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "here.HOOKS.register_module(module=OneOfTwo)\n"
        "options = here.detector(Path('.').absolute())\n"
        "cfg = here.train_tool.load_config(here.DETECTOR, 'run', options=options)\n"
        "cfg.custom_hooks = [dict(type='hgkd.OneOfTwo')]\n"
        "runner = here.train_tool.train(cfg, launcher='pytorch')\n"
        "assert runner.iter == 1, runner.iter\n"
        "from hgkd.api.train import leave_group\n"
        "leave_group()\n"
    )
    done = torchrun([tmp_path / "stop.py"], tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    log = "".join(file.read_text() for file in (tmp_path / "run").glob("*/*.log"))
    assert "stopped by a signal (to another process) after epoch 0, step 1; saved" in log
    assert (tmp_path / "run/epoch_0_step_1.pth").is_file()


# losses that are not finite


@HOOKS.register_module()
class Spoil(Hook):
    """Makes the loss of some steps NaN by an image of NaN."""

    def __init__(self, steps):
        self.steps = steps

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter in self.steps:
            data_batch["inputs"] = [image.float() * float("nan") for image in data_batch["inputs"]]


@pytest.mark.parametrize(("config", "shapes", "tiny"), [(SEGMENTOR, shapes_ade20k, tiny_segmentor)])
def test_a_loss_that_is_not_finite_is_left_out(tmp_path, config, shapes, tiny):
    options = {**tiny(shapes(tmp_path / "data")), "iterations": 2}
    cfg = train_tool.load_config(config, tmp_path / "run", options=options)
    cfg.custom_hooks = [dict(type="hgkd.Spoil", steps=[1])]
    runner = train_tool.train(cfg)
    assert all(value.isfinite().all() for value in runner.model.state_dict().values())
    log = "".join(file.read_text() for file in (tmp_path / "run").glob("*/*.log"))
    assert "loss or gradient is not finite at epoch 1, step 2: " in log
    assert "images/training/00000" in log
    assert "The step is left out (1 in a row, 1 in all)" in log


def test_losses_that_stay_not_finite_end_the_run(tmp_path):
    options = {**tiny_segmentor(shapes_ade20k(tmp_path / "data")), "iterations": 9}
    cfg = train_tool.load_config(SEGMENTOR, tmp_path / "run", options=options)
    cfg.custom_hooks = [dict(type="hgkd.Spoil", steps=range(9))]
    with refused(DivergedError, "training-not-finite", "6"):
        train_tool.train(cfg)
    assert not list((tmp_path / "run").glob("*.json"))


def test_a_dry_run_with_a_loss_that_is_not_finite(tmp_path):
    cfg = train_tool.load_config(SEGMENTOR, options=tiny_segmentor(shapes_ade20k(tmp_path / "data")))
    cfg.model.decode_head.loss_decode.loss_weight = float("inf")
    with refused(DivergedError, "step-not-finite", "decode.loss_ce"):
        train_command.dry_run_downstream(cfg)


# lengths


def test_a_training_without_a_step(tmp_path, capsys):
    options = detector(tmp_path, batch_size=8)
    options["train_dataloader.drop_last"] = True
    cfg = train_tool.load_config(DETECTOR, tmp_path / "run", options=options)
    message = r"no training step: train_dataloader has 4 images, which do not fill one batch of 8 on .*\(drop_last=True\)"
    for start in (train_tool.train, train_command.dry_run_downstream):
        with pytest.raises(ValueError, match=message):
            start(cfg)


def test_an_endless_sampler_fills_any_batch(tmp_path):
    options = {**tiny_segmentor(shapes_ade20k(tmp_path / "data")), "batch_size": 8, "iterations": 1}
    options["train_dataloader.drop_last"] = True
    cfg = train_tool.load_config(SEGMENTOR, tmp_path / "run", options=options)
    assert train_tool.train(cfg).iter == 1
    cfg.work_dir = str(tmp_path / "other")
    cfg.train_dataloader.sampler = dict(type="DefaultSampler", shuffle=True)
    with refused(ValueError, "no-training-step"):
        train_tool.train(cfg)


def test_a_length_that_is_no_whole_number(tmp_path):
    cfg = train_tool.load_config(DETECTOR, tmp_path / "run", options=detector(tmp_path))
    cfg.train_cfg.max_epochs = 1.5
    with refused(ValueError, "option-not-a-whole-number", "train_cfg.max_epochs=1.5", "1"):
        train_tool.train(cfg)


def test_one_value_a_channel(tmp_path):
    cfg = train_tool.load_config(SEGMENTOR, options={**tiny_segmentor(shapes_ade20k(tmp_path / "data")), "batch_size": 1})
    with refused(ValueError, "batch-norm-single-values", "batch_size=2"):
        train_command.dry_run_downstream(cfg)


def test_another_loop_is_said(tmp_path):
    from mmengine.registry import LOOPS
    from mmengine.runner import EpochBasedTrainLoop

    class Other(EpochBasedTrainLoop):
        pass

    LOOPS.register_module(module=Other, force=True)
    cfg = train_tool.load_config(DETECTOR, tmp_path / "run", options=detector(tmp_path))
    cfg.train_cfg.type = "Other"
    runner = DownstreamRunner.from_cfg(cfg)
    assert isinstance(runner.build_train_loop(runner._train_loop), Other)
    log = "".join(file.read_text() for file in (tmp_path / "run").glob("*/*.log"))
    assert "train_cfg.type=Other is not one of mmengine's loops" in log


@HOOKS.register_module()
class Grow(Hook):
    """Makes the loss of all steps but the first 100 times as large."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter:
            runner.model.decode_head.loss_decode.loss_weight = 100.0


def test_a_divergence_and_idle_parameters_are_said(tmp_path):
    options = {**tiny_segmentor(shapes_ade20k(tmp_path / "data")), "iterations": 6}
    cfg = train_tool.load_config(SEGMENTOR, tmp_path / "run", options=options)
    cfg.custom_hooks = [dict(type="hgkd.Grow")]
    runner = DownstreamRunner.from_cfg(cfg)
    runner.model.spare = torch.nn.Parameter(torch.zeros(3))
    runner.train()
    log = "".join(file.read_text() for file in (tmp_path / "run").glob("*/*.log"))
    assert "far above the first one" in log
    assert "this training diverged: at step" in log
    assert "1 parameters got no gradient and are not trained, because no loss depends on them: spare. Leave out" in log
    # a hook of the config's own takes the place of the default one
    cfg = train_tool.load_config(SEGMENTOR, tmp_path / "ended", options=options)
    cfg.custom_hooks = [dict(type="hgkd.Grow"), dict(type="hgkd.LossAlarmHook", patience=3)]
    with refused(DivergedError, "training-diverged", "3", "4", "type='hgkd.LossAlarmHook", "patience=None"):
        train_tool.train(cfg)


def test_a_last_batch_of_one_image(tmp_path):
    options = {**tiny_segmentor(shapes_ade20k(tmp_path / "data")), "batch_size": 3}  # of 4 images
    cfg = train_tool.load_config(SEGMENTOR, tmp_path / "run", options=options)
    cfg.train_dataloader.sampler = dict(type="DefaultSampler", shuffle=True)
    cfg.train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=1, val_interval=1)
    for start in (train_tool.train, train_command.dry_run_downstream):
        with refused(ValueError, "last-batch-too-small", "1", "3", "drop_last=True"):
            start(cfg)
    assert not list((tmp_path / "run").glob("*.pth"))
