"""Hooks on a hand-made runner."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hgkd.engine import (
    CollapseAlarmHook,
    DivergedError,
    EpochSeedHook,
    FiniteLossHook,
    MaskScheduleHook,
    PictureHook,
    ThroughputHook,
)
from hgkd.engine.hooks import peak_memory_mb
from hgkd.masking import RandomMask


class Log:
    def __init__(self):
        self.warnings = []
        self.scalars = {}
        self.runtime_info = {}

    def warning(self, text):
        self.warnings.append(text)

    def update_scalar(self, name, value):
        self.scalars[name] = value


def runner(**extra):
    log = Log()
    wrapper = SimpleNamespace(get_lr=lambda: {"lr": [1e-3]})
    return SimpleNamespace(epoch=0, iter=6, seed=3, logger=log, message_hub=log, optim_wrapper=wrapper, **extra)


def draws(seed, epoch):
    run = runner()
    run.seed, run.epoch = seed, epoch
    EpochSeedHook().before_train_epoch(run)
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_epoch_seed_depends_on_seed_and_epoch_only():
    first = draws(0, 1)
    torch.manual_seed(99)
    assert draws(0, 1) == first
    assert draws(0, 2) != first
    assert draws(1, 1) != first


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_stops_the_run(loss):
    data = {"index": torch.tensor([5, 8])}
    outputs = {"loss": torch.tensor(loss), "a_loss": torch.tensor(2.0)}
    with pytest.raises(DivergedError, match=r"epoch 1, step 7: loss=\w+, a_loss=2; learning rate 0.001, images \[5, 8\]"):
        FiniteLossHook().after_train_iter(runner(), 0, data, outputs)


def test_finite_loss_passes_and_the_last_checkpoint_is_named():
    hook, run = FiniteLossHook(), runner()
    hook.after_train_iter(run, 0, {}, {"loss": torch.tensor(1.0, requires_grad=True)})
    run.message_hub.runtime_info["last_ckpt"] = "epoch_3.pth"
    with pytest.raises(DivergedError, match=r"epoch_3\.pth is from before"):
        hook.after_train_iter(run, 0, {}, {"loss": torch.tensor(float("nan"))})


def test_collapse_alarm():
    hook, run = CollapseAlarmHook(), runner()
    hook.after_val_epoch(run, {"health/feature_std": 0.4, "health/effective_rank": 40.0})
    hook.after_val_epoch(run, {"health/feature_std": 0.3, "health/effective_rank": 30.0})
    assert not run.logger.warnings
    hook.after_val_epoch(run, {"health/feature_std": 0.3, "health/effective_rank": 9.0})
    assert ["effective_rank is 9 (highest so far 40, alarm below 10)" in text for text in run.logger.warnings] == [True]
    hook.after_val_epoch(run, {"health/feature_std": 0.005})
    assert "feature_std is 0.005" in run.logger.warnings[1]
    hook.after_val_epoch(run, {})
    hook.after_val_epoch(run, None)
    assert len(run.logger.warnings) == 2


def test_throughput_counts_images(monkeypatch):
    clock = iter([10.0, 12.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    hook, run = ThroughputHook(), runner()
    hook.before_train_epoch(run)
    hook.after_train_iter(run, 0, {"inputs": torch.zeros(6, 3, 2, 2)})
    assert run.message_hub.scalars == {"train/images_per_s": 3.0}


def test_peak_memory_is_plausible():
    assert 50 < peak_memory_mb() < 100_000


def test_picture_hook_refuses_zero():
    with pytest.raises(ValueError, match="interval and num_images must be 1 or more"):
        PictureHook(interval=0)


@pytest.mark.parametrize(("step", "ratio"), [(0, 0.6), (5, 0.3), (10, 0.0)])
def test_mask_schedule_follows_the_step(step, ratio):
    mask = RandomMask(0.6, final_mask_ratio=0.0)
    run = runner(model=SimpleNamespace(mask=mask), max_iters=11)
    run.iter = step
    MaskScheduleHook().before_train_iter(run, 0)
    assert mask.current_ratio == pytest.approx(ratio)
    assert run.message_hub.scalars["train/mask_ratio"] == pytest.approx(ratio)


def test_mask_schedule_leaves_models_without_a_mask_alone():
    run = runner(model=SimpleNamespace(), max_iters=11)
    MaskScheduleHook().before_train_iter(run, 0)
    assert run.message_hub.scalars == {}
