"""What a resumed run takes from its checkpoint, and what from its config."""

import math
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.optim import (
    CosineAnnealingLR,
    LinearLR,
    MultiStepLR,
    OptimWrapper,
    ReduceOnPlateauLR,
)
from refusals import refused
from torch import nn

from hgkd.training.loop import ExactEpochLoop
from hgkd.training.resuming import ConfiguredSettings, ReadCheckpoint, config_changes, images_that_differ

STEPS = 4  # of an epoch


def training(epochs=2, lr=0.1, decay=0.01, schedule="cosine", optimizer=torch.optim.AdamW, done=0):
    """A runner as far as settings go, at its beginning; ``done`` steps are then done."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    groups = [{"params": net[0].parameters()}, {"params": net[1].parameters(), "weight_decay": 0.0, "lr": lr / 2}]
    wrapper = OptimWrapper(optimizer(groups, lr=lr, weight_decay=decay))
    made = {
        "cosine": lambda: [
            LinearLR(wrapper, start_factor=0.1, begin=0, end=3, by_epoch=False),
            CosineAnnealingLR(wrapper, T_max=epochs * STEPS - 3, begin=3, end=epochs * STEPS, by_epoch=False),
        ],
        "steps": lambda: [
            LinearLR(wrapper, start_factor=0.1, begin=0, end=3, by_epoch=False),
            MultiStepLR(wrapper, milestones=[epochs - 1], gamma=0.1, by_epoch=True),
        ],
        "none": lambda: None,
        "plateau": lambda: [ReduceOnPlateauLR(wrapper, monitor="x", patience=epochs)],
    }[schedule]()
    loop = SimpleNamespace(dataloader=range(STEPS), iter=0)
    runner = SimpleNamespace(optim_wrapper=wrapper, param_schedulers=made, hooks=[], train_loop=loop)
    for _ in range(done):
        wrapper.update_params(net(torch.ones(1, 3)).sum())
        loop.iter += 1
        for scheduler in made or ():
            if not scheduler.by_epoch or loop.iter % STEPS == 0:
                scheduler.step()
    return runner


def checkpoint(runner, **meta):
    schedules = [dict(scheduler.state_dict()) for scheduler in runner.param_schedulers or ()]
    return {"optimizer": runner.optim_wrapper.state_dict(), "param_schedulers": schedules, "meta": meta}


def resumed(written, runner, done):
    """As mmengine does it, then this project; the remark."""
    settings = ConfiguredSettings(runner)
    runner.train_loop.iter = done
    runner.optim_wrapper.load_state_dict(dict(written["optimizer"]))
    for scheduler, state in zip(runner.param_schedulers or (), written["param_schedulers"], strict=False):
        scheduler.load_state_dict(state)
    return settings.put_in_force("epoch.pth", ReadCheckpoint.of(written))


def settings_of(runner):
    groups = runner.optim_wrapper.optimizer.param_groups
    keys = ("lr", "initial_lr", "weight_decay", "betas")
    return [{key: group[key] for key in keys if key in group} for group in groups]


@pytest.mark.parametrize("done", [2, 4, 7])
@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({}, {"epochs": 6}),
        ({}, {"lr": 0.01}),
        ({}, {"decay": 0.2}),
        ({"schedule": "steps"}, {"schedule": "steps", "epochs": 3, "lr": 0.02}),
        ({}, {"schedule": "none", "lr": 0.03}),
        ({"schedule": "none"}, {"epochs": 3}),
        ({}, {"schedule": "steps"}),
    ],
)
def test_what_the_config_says_is_in_force_as_in_a_training_that_had_it_from_the_start(before, now, done):
    written, runner = checkpoint(training(**before, done=done)), training(**now)
    assert resumed(written, runner, done)
    whole = training(**now, done=done)
    for _ in range(3):  # at once, and in the steps that follow
        assert settings_of(runner) == settings_of(whole)
        for scheduler in (*(runner.param_schedulers or ()), *(whole.param_schedulers or ())):
            scheduler.step()
    # and what was learnt is the checkpoint's
    state = runner.optim_wrapper.optimizer.state_dict()["state"]
    assert torch.equal(state[0]["exp_avg"], written["optimizer"]["state"][0]["exp_avg"])


@pytest.mark.parametrize("schedule", ["cosine", "steps", "none", "plateau"])
def test_without_a_difference_nothing_is_touched(schedule):
    old = training(schedule=schedule, done=5)
    runner = training(schedule=schedule)
    assert resumed(checkpoint(old), runner, 5) is None
    assert settings_of(runner) == settings_of(old)


def test_what_differs_is_named_with_both_values_and_the_rate_in_force():
    remark = resumed(checkpoint(training(done=8)), training(epochs=6, lr=0.05, decay=0.3), 8)
    assert "lr 0.1 -> 0.05, weight_decay 0.01 -> 0.3, lr schedule T_max 5 -> 21, lr schedule end 8 -> 24" in remark
    assert "The learning rate goes on at 0.04" in remark
    assert "(the checkpoint's was 0.009549)" in remark


def test_the_loss_scale_is_kept_and_its_settings_are_the_configs():
    def scaled(**options):
        runner = training()
        runner.optim_wrapper.loss_scaler = torch.amp.GradScaler("cpu", init_scale=8.0, **options)
        return runner

    written, runner = checkpoint(training(done=2)), scaled(growth_interval=7)
    settings = ConfiguredSettings(runner)
    runner.train_loop.iter = 2
    runner.optim_wrapper.loss_scaler.load_state_dict({**scaled().optim_wrapper.loss_scaler.state_dict(), "scale": 64.0})
    remark = settings.put_in_force("epoch.pth", ReadCheckpoint.of(written))
    assert "loss scale growth_interval 2000 -> 7" in remark
    state = runner.optim_wrapper.loss_scaler.state_dict()
    assert (state["scale"], state["growth_interval"]) == (64.0, 7)


def test_refusals():
    written = checkpoint(training(done=3))
    with refused(ValueError, "resume-other-optimizer", "SGD"):
        resumed(written, training(optimizer=torch.optim.SGD), 3)
    with refused(ValueError, "resume-other-optimizer", "SGD", "AdamW"):
        resumed(checkpoint(training(done=3), optimizer="SGD"), training(), 3)
    with refused(ValueError, "resume-other-settings", "2", "4"):
        resumed(checkpoint(training(schedule="plateau", done=3)), training(schedule="plateau", epochs=4), 3)
    averaged = {**written, "ema_state_dict": {}}
    with refused(ValueError, "resume-without-average", "epoch.pth"):
        resumed(averaged, training(), 3)
    with_hook = training()
    with_hook.hooks = [EMAHook()]
    assert resumed(averaged, with_hook, 3) is None


# the position in an epoch


def place(iteration, images=16, batch=4, processes=1):
    """A loop whose checkpoint is from the first epoch, and what belongs to it."""
    loader = SimpleNamespace(dataset=range(images), batch_size=batch, batch_sampler=None, sampler=None)
    loop = ExactEpochLoop.__new__(ExactEpochLoop)
    loop._runner = SimpleNamespace(train_dataloader=loader, world_size=processes)
    steps = images // (batch * processes)
    loop.dataloader = type("Loader", (list,), vars(loader))(range(steps))
    loop._epoch, loop._iter = 0, iteration
    meta = {"steps_per_epoch": steps, "images": {"images": images, "batch_size": batch, "processes": processes}}
    return loop, meta


@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        ({}, {"batch": 8}, "batch_size 4 -> 8"),  # step 1 exists in an epoch of 2 steps as well
        ({}, {"processes": 2}, "processes 1 -> 2"),
        ({}, {"images": 18}, "images 16 -> 18"),  # the same number of steps
        ({"batch": 2}, {}, "batch_size 2 -> 4"),
    ],
)
def test_other_images_or_batches_are_refused_inside_an_epoch_even_where_the_step_fits(before, now, named):
    _, meta = place(1, **before)
    loop, _ = place(1, **now)
    with pytest.raises(ValueError, match=rf"from epoch 1, step 1 of \d, .*not known which were seen: {named}. Resume with"):
        loop.check_position("x.pth", meta)


def test_between_two_epochs_they_may_change_and_an_epoch_counts_as_many_steps_as_now():
    _, meta = place(4)
    loop, _ = place(4, batch=8)
    loop._epoch = 1
    assert "those that follow differ from it: batch_size 4 -> 8" in loop.check_position("x.pth", meta)
    assert loop._iter == 2


def test_checkpoints_of_before_are_judged_by_their_steps():
    loop, meta = place(1)
    assert loop.check_position("x.pth", {"steps_per_epoch": 4}) is None
    assert loop.check_position("x.pth", meta) is None
    assert images_that_differ({}, loop._runner) == ""
    with refused(ValueError, "resume-other-batches", "5", "4"):
        loop.check_position("x.pth", {"steps_per_epoch": 5})


def test_a_rate_that_is_not_finite_is_no_equal():
    remark = resumed(checkpoint(training(schedule="none", done=1)), training(schedule="none", lr=math.inf), 1)
    assert "lr 0.1 -> inf" in remark


def config(**model):
    loader = dict(batch_size=8, num_workers=4, dataset=dict(data_root="a", steps=[dict(type="Resize", scale=(64, 64))]))
    wrapper = dict(type="OptimWrapper", optimizer=dict(lr=0.1))
    return Config(dict(model=dict(mask=dict(mask_ratio=0.6), **model), train_dataloader=loader, optim_wrapper=wrapper))


def test_settings_of_model_images_and_update_that_differ_are_named():
    old, new = config(decoder_width=32), config(decode="visible")
    assert config_changes("epoch.pth", {"cfg": old.pretty_text}, config(decoder_width=32).pretty_text) is None
    new.model.mask.mask_ratio = 0.75
    new.train_dataloader.num_workers = 0  # changes nothing
    new.train_dataloader.dataset.data_root = "b"
    new.train_dataloader.dataset.steps[0].scale = (32, 32)
    new.optim_wrapper = dict(type="OptimWrapper", optimizer=dict(lr=0.2), accumulative_counts=2)  # lr: told as it is built
    new.model.student = dict(normalize=[[0.5] * 3, [0.5] * 3])  # the checkpoint's are in force
    remark = config_changes("epoch.pth", {"cfg": old.pretty_text}, new.pretty_text)
    assert remark.partition("in force: ")[2] == (
        "model.decode (absent) -> visible, model.mask.mask_ratio 0.6 -> 0.75, model.decoder_width 32 -> (absent), "
        "train_dataloader.dataset.data_root a -> b, train_dataloader.dataset.steps.0.scale (64, 64) -> (32, 32), "
        "optim_wrapper.accumulative_counts (absent) -> 2"
    )


@pytest.mark.parametrize("text", [None, "model = dict(", "model = __import__('os').system('touch ran')"])
def test_a_config_that_cannot_be_read_is_said_and_never_run(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    remark = config_changes("epoch.pth", {"cfg": text}, config().pretty_text)
    assert "model, train_dataloader, optim_wrapper" in remark
    assert not (tmp_path / "ran").exists()
