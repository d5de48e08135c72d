"""Hooks on a hand-made runner."""

import json
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from refusals import refused

from hgkd.errors import DivergedError
from hgkd.masking import RandomMask
from hgkd.training import (
    CollapseAlarmHook,
    FiniteLossHook,
    LossAlarmHook,
    MaskScheduleHook,
    ThroughputHook,
    UnreadableFilesHook,
    VisualizationHook,
)
from hgkd.training.hooks import alarms
from hgkd.training.hooks.progress import peak_memory_mb


class Log:
    def __init__(self):
        self.warnings = []
        self.scalars = {}
        self.runtime_info = {}

    def warning(self, text):
        self.warnings.append(text)

    def update_info(self, name, value):
        self.runtime_info[name] = value

    def update_scalar(self, name, value):
        self.scalars[name] = value


def runner(**extra):
    log = Log()
    wrapper = SimpleNamespace(get_lr=lambda: {"lr": [1e-3]})
    extra = {"model": torch.nn.Identity(), **extra}
    return SimpleNamespace(epoch=0, iter=6, seed=3, logger=log, message_hub=log, optim_wrapper=wrapper, **extra)


def step(run, hook, loss, outcome, images=(5, 8)):
    """One training step as the hook sees it; outcome: 'updated', 'skipped' or 'accumulated'."""
    run.train_loop.guard = SimpleNamespace(updated=outcome == "updated", skipped=outcome == "skipped")
    hook.after_train_iter(run, 0, {"index": torch.tensor(images)}, {"loss": loss, "a_loss": 2.0})
    run.iter += 1


def training(tmp_path):
    saved = []
    run = runner(work_dir=str(tmp_path), max_iters=20, train_loop=SimpleNamespace(), cfg=Config(dict(seed=3)))
    run.save_checkpoint = lambda folder, name, **options: saved.append((folder, name, options["meta"]))
    return run, saved


def test_steps_that_are_not_finite_are_counted_and_the_run_ends_after_several_in_a_row(tmp_path):
    run, saved = training(tmp_path)
    hook = FiniteLossHook(patience=2)
    step(run, hook, 1.0, "updated")
    step(run, hook, float("nan"), "skipped")
    step(run, hook, float("inf"), "skipped")
    step(run, hook, 1.0, "updated")  # a good one in between: the count in a row starts anew
    assert len(run.logger.warnings) == 2
    assert "not finite at epoch 1, step 8: loss=nan, a_loss=2; learning rate 0.001, images [5, 8]" in run.logger.warnings[0]
    assert "left out (2 in a row, 2 in all)" in run.logger.warnings[1]
    step(run, hook, float("nan"), "skipped", images=(1,))
    step(run, hook, float("nan"), "skipped")
    with refused(DivergedError, "training-not-finite", "13", "loss=nan", "3", "nonfinite_step_11_rank_0.json"):
        step(run, hook, float("nan"), "skipped")
    assert saved == [(str(tmp_path), "nonfinite_step_11.pth", {"epoch": 0, "iter": 10})]
    dump = json.loads((tmp_path / "nonfinite_step_11_rank_0.json").read_text())
    assert [(entry["step"], entry["images"]) for entry in dump["steps"]] == [(10, [1]), (11, [5, 8]), (12, [5, 8])]
    assert (dump["seed"], dump["config"], dump["checkpoint"]) == (3, {"seed": 3}, "nonfinite_step_11.pth")
    assert run.message_hub.runtime_info["skipped_steps"] == 5


def test_the_dump_holds_the_accumulated_steps_too(tmp_path):
    run, _ = training(tmp_path)
    hook = FiniteLossHook(patience=0)
    step(run, hook, float("nan"), "accumulated", images=(1, 2))
    with pytest.raises(DivergedError):
        step(run, hook, 1.0, "skipped", images=(3, 4))
    dump = json.loads((tmp_path / "nonfinite_step_7_rank_0.json").read_text())
    assert [entry["images"] for entry in dump["steps"]] == [[1, 2], [3, 4]]


class Taught(torch.nn.Module):
    """A model that asks its teacher in every pass."""

    def __init__(self):
        super().__init__()
        self.__dict__["teacher"], self.passes = torch.nn.Identity(), 0

    def data_preprocessor(self, data, training):
        return data

    def forward(self, inputs, mode):
        self.passes += 1
        self.teacher(inputs)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_not_finite_in_one_process_is_told_by_all_and_none_is_waited_for(rank, monkeypatch):
    """A pass of the model may need all processes: norms and divided teachers exchange values."""
    answers = []

    def gathered(own):
        return [answers.pop(0), own] if rank else [own, answers.pop(0)]

    monkeypatch.setattr(alarms, "all_gather_object", gathered)
    monkeypatch.setattr(alarms, "get_world_size", lambda: 2)
    run = runner(model=Taught())
    good, bad = torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), float("nan"))
    for own, other, named in ((good, False, 1 - rank), (bad, True, rank)):
        answers[:] = [other]
        said = alarms.not_finite_before_the_student(run, {"inputs": own})
        assert f"the images hold values that are not finite (those of process {named})" in said
    assert run.model.passes == 0
    answers[:] = [True, ["teacher"]]
    assert "what the teacher says" in alarms.not_finite_before_the_student(run, {"inputs": good})
    answers[:] = [True, []]
    assert alarms.not_finite_before_the_student(run, {"inputs": good}) is None
    assert run.model.passes == 2


def test_negative_patience_is_refused():
    with refused(ValueError, "patience-out-of-range", "0"):
        FiniteLossHook(-1)


def losses(hook, run, values, name="loss"):
    for value in values:
        hook.after_train_iter(run, 0, None, {name: torch.tensor(value)})
        run.iter += 1


def test_a_jump_of_the_loss_is_told_once_in_a_window():
    hook, run = LossAlarmHook(spike=5.0, window=4), runner()
    losses(hook, run, [1.0, 1.2, 0.9, 1.1, 5.0])  # 5 times the median 1.05 is 5.25
    assert not run.logger.warnings
    losses(hook, run, [9.0, 9.0])
    assert ["the loss jumped to 9 at step 12; its median over the last 4 steps is 1.15" in w for w in run.logger.warnings] == [
        True
    ]


def test_a_term_that_never_changes_is_told_once():
    hook, run = LossAlarmHook(window=3), runner()
    losses(hook, run, [0.0, 0.0], "b_loss")
    assert not run.logger.warnings
    losses(hook, run, [0.0, 0.0, 0.0, 0.0], "b_loss")
    losses(hook, run, [1.0, 1.0, 1.0, 1.0], "b_accuracy")
    assert ["b_loss has been exactly 0 in the last 3 steps" in text for text in run.logger.warnings] == [True]


@pytest.mark.parametrize("options", [{"spike": 1.0}, {"spike": float("nan")}, {"window": 1}, {"patience": 0}])
def test_loss_alarm_options(options):
    with pytest.raises(ValueError, match=r"spike must be above 1 and window 2 or more|patience must be 1 step or more"):
        LossAlarmHook(**options)


def test_a_divergence_in_the_first_steps_is_no_baseline_and_is_told_again_at_the_end():
    # the course of an effective rate of 10: up from 0.29, and down to the loss of features that are all the same
    hook, run = LossAlarmHook(), runner()
    losses(hook, run, [0.29, 0.3, 40.0, 645.0, 90.0, 12.0, 1.2, 0.6, *(0.26 + 1e-4 * i for i in range(80))])
    (first,) = run.logger.warnings
    assert "the loss is 40 at step 9, far above the first one (0.29): the training diverges. Lower lr" in first
    hook.after_train(run)
    assert "this training diverged: at step 10 the loss was 645, 2224 times the first one" in run.logger.warnings[-1]


def test_a_loss_that_stays_far_above_the_first_one_ends_the_run():
    hook, run = LossAlarmHook(patience=3), runner()
    losses(hook, run, [1.0, 6.0, 6.0, 0.9, 6.0, 6.0])
    with refused(DivergedError, "training-diverged", "3", "5", "(1)", "7"):
        losses(hook, run, [7.0])
    patient, run = LossAlarmHook(patience=None), runner()
    losses(patient, run, [1.0] + [6.0] * 60)


def test_healthy_losses_and_one_odd_batch_are_no_divergence():
    hook, run = LossAlarmHook(), runner()
    losses(hook, run, [0.0, 5.0, 6.0])  # begins at nothing: no measure
    hook, run = LossAlarmHook(), runner()
    losses(hook, run, [1.0, 1.4, 0.9, float("nan"), *[0.8] * 40, 6.0, 0.8])
    hook.after_train(run)
    assert len(run.logger.warnings) == 1  # the batch itself


def test_a_resumed_run_is_compared_with_the_first_loss_of_all():
    hook, run = LossAlarmHook(), runner()
    losses(hook, run, [0.3])
    losses(LossAlarmHook(), run, [30.0])
    assert "far above the first one (0.3)" in run.logger.warnings[0]


@pytest.mark.parametrize("order", [[0.5, float("nan"), 0.5], [float("nan"), 0.5, 0.05]])
def test_features_that_are_not_finite_are_an_alarm_and_no_highest_value(order):
    hook, run = CollapseAlarmHook(), runner()
    for value in order:
        hook.after_val_epoch(run, {"health/feature_std": value})
    assert len(run.logger.warnings) == 1 + (order[-1] == 0.05)
    assert run.message_hub.runtime_info["highest health/feature_std"] == 0.5


@pytest.mark.parametrize("bad", [[], ["/data/a.jpg", "/data/b\udcff.jpg"]])
def test_unreadable_files_are_listed_at_the_end(tmp_path, bad):
    dataset = type("Images", (list,), {"bad_files": lambda self: bad})(range(9))
    loop = SimpleNamespace(dataloader=SimpleNamespace(dataset=dataset))
    run = runner(work_dir=str(tmp_path), train_loop=loop)
    UnreadableFilesHook().after_train(run)
    path = tmp_path / "unreadable_files.txt"
    assert path.exists() == bool(bad)
    if bad:
        assert path.read_bytes() == b"/data/a.jpg\n/data/b\xff.jpg\n"
        told = f"2 of 9 training images could not be read and were left out; they are listed in {path}"
        assert run.logger.warnings == [told]


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
    hook, run = ThroughputHook(), runner(model=torch.nn.Identity())
    hook.before_train_epoch(run)
    hook.after_train_iter(run, 0, {"inputs": torch.zeros(6, 3, 2, 2)})
    assert run.message_hub.scalars == {"train/images_per_s": 3.0}


def test_the_teachers_share_of_a_step(monkeypatch):
    clock = iter([10.0, 12.0, 17.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    model = torch.nn.Identity()
    model.teacher_seconds = 7.0  # of the epoch before
    hook, run = ThroughputHook(), runner(model=model)
    hook.before_train_epoch(run)
    for seconds, share in ((0.5, 0.25), (2.0, 0.4)):
        model.teacher_seconds += seconds
        hook.after_train_iter(run, 0, {"inputs": torch.zeros(6, 3, 2, 2)})
        assert run.message_hub.scalars["train/teacher_share"] == share


def test_peak_memory_is_plausible():
    assert 50 < peak_memory_mb() < 100_000


def test_picture_hook_refuses_zero():
    with refused(ValueError, "count-not-positive", "num_images", "1"):
        VisualizationHook(interval=0)


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
