"""Whole trainings on a GPU, by ``make test-gpu``: mixed precision, data-parallel by one process, resuming bit for bit."""

import math
import os
import socket
import subprocess
import sys

import pytest
import torch
from gpu_device import DEVICE, ON_THE_DEVICE
from mmengine.device import get_device
from mmengine.hooks import Hook
from tiny_runs import HGKD as RECIPE
from tiny_runs import ROOT, same, tiny_hgkd, write_images

from hgkd.api import train as train_tool
from hgkd.registry import build_runner
from hgkd.weights.files import read_checkpoint

pytestmark = ON_THE_DEVICE


class Killed(BaseException):
    """Stands for kill -9."""


class KillAt(Hook):
    priority = "LOWEST"

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == 3:
            raise Killed


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    assert get_device() == DEVICE.type, "trainings choose their device themselves"
    return write_images(tmp_path_factory.mktemp("images"))


def options(images):
    saving = {"default_hooks.checkpoint.every_steps": 1, "default_hooks.checkpoint.every_minutes": None}
    return tiny_hgkd(images, **saving, batch_size=4, val_train_root=None, val_test_root=None)


def build(images, work_dir, amp=False, resume=False, **more):
    cfg = train_tool.load_config(RECIPE, work_dir, resume=resume, amp=amp, options={**options(images), **more})
    return build_runner(cfg)


def losses(runner):
    return runner.message_hub.get_scalar("train/loss").data[0].tolist()


@pytest.mark.parametrize("amp", [False, True])
def test_a_run_that_is_killed_ends_with_the_weights_of_the_unbroken_one(images, tmp_path, amp, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    whole = build(images, tmp_path / "whole", amp)
    whole.train()
    broken = build(images, tmp_path / "broken", amp)
    broken.register_hook(KillAt())
    with pytest.raises(Killed):
        broken.train()
    build(images, tmp_path / "broken", amp, resume=True).train()
    found, expected = (read_checkpoint(tmp_path / name / "epoch_2.pth") for name in ("broken", "whole"))
    for part in ("state_dict", "optimizer"):
        assert same(found[part], expected[part]), part


def test_mixed_precision_learns_what_full_precision_does(images, tmp_path) -> None:
    full, mixed = build(images, tmp_path / "full"), build(images, tmp_path / "mixed", amp=True)
    full.train()
    mixed.train()
    assert all(map(math.isfinite, losses(mixed)))
    assert losses(mixed) == pytest.approx(losses(full), rel=0.1)
    assert losses(mixed) != losses(full)


def test_one_process_of_data_parallel_training_is_the_ordinary_training(images, tmp_path) -> None:
    alone = build(images, tmp_path / "alone")
    alone.train()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", f"--master_port={port}", "-m", "hgkd"]
    given = [f"{key}={value}" for key, value in options(images).items()]
    command += [
        "train",
        str(RECIPE),
        "--launcher",
        "pytorch",
        "--work-dir",
        str(tmp_path / "parallel"),
        "--cfg-options",
        *given,
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    found = read_checkpoint(tmp_path / "parallel/epoch_2.pth")
    assert found["message_hub"]["log_scalars"]["train/loss"].data[0].tolist() == pytest.approx(losses(alone), rel=1e-3)
