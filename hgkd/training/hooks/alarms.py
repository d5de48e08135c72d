"""Hooks that raise the alarm: loss or gradient not finite, loss that jumps, features that collapse."""

from __future__ import annotations

import copy
import json
import math
import statistics
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object, get_rank, get_world_size
from mmengine.hooks import Hook, IterTimerHook
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hgkd.data.sampler import EpochSampler
from hgkd.errors import DivergedError, InvalidValueError
from hgkd.networks.guest import teachers_of
from hgkd.networks.untouched import unchanged
from hgkd.networks.vit import is_finite
from hgkd.registry import HOOKS
from hgkd.training.wrapping import plain_model

DUMP = "nonfinite_step_"  # how the names of its files begin


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Counts the steps that were left out because loss or gradient was not finite, and ends the run after several in a row.

    It then leaves ``work_dir/nonfinite_step_<n>.pth``, the state before the first of them, and next to it for every process
    ``nonfinite_step_<n>_rank_<r>.json``, from which ``hgkd replay`` does these steps again.

    Args:
        patience: number of consecutive skipped updates that is tolerated; one more ends the run.
    """

    priority = "VERY_HIGH"

    def __init__(self, patience: int = 5) -> None:
        if patience < 0:
            raise InvalidValueError("patience-out-of-range", f"patience must be 0 (stop at once) or more, got {patience}")
        self.patience = patience
        self._steps: list[dict[str, Any]] = []  # those since the last update that was made
        self._skipped = 0

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: dict[str, Any] | None = None
    ) -> None:
        guard = runner.train_loop.guard
        if guard.updated:
            self._steps, self._skipped = [], 0
            return
        values = {name: float(value) for name, value in (outputs or {}).items()}
        images = self._images(data_batch)
        step: dict[str, Any] = {"epoch": runner.epoch, "step": runner.iter, "images": images, "losses": values}
        loader: Any = getattr(runner.train_loop, "dataloader", None)
        if isinstance(getattr(loader, "sampler", None), EpochSampler):  # an image's crops follow from the copy that it is
            first = batch_idx * loader.batch_size
            step["copies"] = loader.sampler.copies(first, first + len(images))
        self._steps.append(step)
        if not guard.skipped:
            return
        self._skipped += 1
        total = runner.message_hub.runtime_info.get("skipped_steps", 0) + 1
        runner.message_hub.update_info("skipped_steps", total)
        what = (
            f"loss or gradient is not finite at epoch {runner.epoch + 1}, step {runner.iter + 1}: "
            f"{', '.join(f'{name}={value:g}' for name, value in values.items())}; "
            f"learning rate {runner.optim_wrapper.get_lr()['lr'][0]:.3g}, images {images[:8]}"
        )
        cause = not_finite_before_the_student(runner, data_batch)
        if self._skipped <= self.patience:
            told = f": {cause}" if cause else ""
            runner.logger.warning(f"{what}. The step is left out ({self._skipped} in a row, {total} in all){told}")
            return
        advice = cause or (
            "Lower lr, lengthen the warm-up, clip gradients (optim_wrapper.clip_grad), or train without --amp; with --resume "
            "the new settings are in force from the last checkpoint on"
        )
        raise DivergedError(
            "training-not-finite", f"{what}. {self._skipped} updates in a row were left out. {advice}; {self._end(runner)}"
        )

    def _images(self, data_batch: object) -> list[Any]:
        """What tells the images of a batch, for the message and the dump."""
        return [int(i) for i in data_batch.get("index", [])] if isinstance(data_batch, Mapping) else []

    def _end(self, runner: Runner) -> str:
        """What is left of the run, said at the end of the message."""
        return (
            f"the weights are those of before, and 'hgkd replay {self._dump(runner)}' does these steps again and "
            "tells where the first value that is not finite appears"
        )

    def _dump(self, runner: Runner) -> Path:
        first = self._steps[0]
        name = f"{DUMP}{first['step'] + 1}"
        meta = {"epoch": first["epoch"], "iter": first["step"]}
        runner.save_checkpoint(runner.work_dir, f"{name}.pth", save_param_scheduler=False, meta=meta)
        dump = Path(runner.work_dir) / f"{name}_rank_{get_rank()}.json"
        content = {
            "checkpoint": f"{name}.pth",
            "rank": get_rank(),
            "seed": runner.seed or 0,
            "max_iters": runner.max_iters,
            "steps": self._steps,
            "config": runner.cfg.to_dict(),
        }
        dump.write_text(json.dumps(content, default=str), encoding="utf-8")
        return dump


def not_finite_before_the_student(runner: Runner, data_batch: object) -> str | None:
    """Find values of a step that are not finite for reasons outside the student (images, teacher), and the remedy.

    The batch's loss is computed once more, without gradients, on the weights of before the step, and what the model's teacher
    says is looked at. Running statistics and random numbers stay what they were. All processes call this together, and get the
    same answer: the first one's log tells of the others' images, too.

    Returns:
        A sentence without its full stop; None: images and teacher are finite, or there is no teacher.
    """
    model = plain_model(runner)
    teachers = {name: part for name, part in teachers_of(model).items() if isinstance(part, nn.Module)}
    if not teachers:
        return None
    said: dict[str, list[bool]] = {name: [] for name in teachers}

    def listen(name: str) -> RemovableHandle:
        return teachers[name].register_forward_hook(lambda *call: said[name].append(_all_finite(call[2])))

    handles = [listen(name) for name in teachers]
    try:
        with torch.no_grad(), unchanged(model):
            data = model.data_preprocessor(copy.deepcopy(data_batch), True)
            inputs = data.get("inputs") if isinstance(data, Mapping) else None
            finite: list[bool] = all_gather_object(_all_finite(inputs))
            if not all(finite):  # in no process the model then runs, whose norms and divided teachers may need all of them
                where = f" (those of process {finite.index(False)})" if get_world_size() > 1 else ""
                return (
                    f"the images hold values that are not finite{where}: look at the files, and at the pixel statistics of the "
                    "config"
                )
            model(**data, mode="loss")
    finally:
        for handle in handles:
            handle.remove()
    found: list[list[str]] = all_gather_object([name for name, heard in said.items() if not all(heard)])
    broken = next(chain.from_iterable(found), None)
    if broken is None:
        return None
    who, place = ("the teacher", "model.teacher") if len(said) == 1 else (f"teacher {broken!r}", f"model.teachers.{broken}")
    return (
        f"what {who} says (the target) is not finite, in which the student's lr, clipping and --amp have no part: compute "
        f"the teacher in another precision ({place}.dtype=float32, or bfloat16 where it is float16), and look at its "
        "weight file"
    )


def _all_finite(value: object) -> bool:
    """Whether all numbers in tensors, containers and dataclasses are finite; anything else counts as finite."""
    if isinstance(value, Tensor):
        return is_finite(value)
    if isinstance(value, Mapping):
        return all(map(_all_finite, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_all_finite, value))
    return all(_all_finite(getattr(value, f.name)) for f in fields(value)) if is_dataclass(value) else True


@HOOKS.register_module()
class LossAlarmHook(Hook):
    """Warns when the loss jumps, and when one of its terms does nothing; ends a training that has diverged.

    A loss far above the first one, which is that of weights before any update, says that the student is worse than one that has
    learnt nothing. It may come down again from there, to the loss of features that are all the same, which looks like a
    training that went well; so the warning is repeated at the end.

    Args:
        spike: alarm when the loss exceeds this multiple of its median over the last ``window`` steps, or of the training's
            first loss; at most once in a window.
        window: steps.
        patience: number of consecutive steps that far above the first loss that ends the run; None: never.
    """

    def __init__(self, spike: float = 5.0, window: int = 50, patience: int | None = 20) -> None:
        if not spike > 1 or window < 2:
            raise InvalidValueError(
                "spike-or-window-out-of-range", f"spike must be above 1 and window 2 or more, got {spike} and {window}"
            )
        if patience is not None and patience < 1:
            raise InvalidValueError(
                "patience-out-of-range", f"patience must be 1 step or more, or None (never end the run), got {patience}"
            )
        self.spike = spike
        self.window = window
        self.patience = patience
        self._above = 0  # steps in a row
        self._recent: dict[str, deque[float]] = {}
        self._quiet_until = 0
        self._idle: set[str] = set()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: dict[str, Any] | None = None
    ) -> None:
        for name, value in (outputs or {}).items():
            if not name.endswith("loss"):
                continue
            value = float(value.detach() if isinstance(value, Tensor) else value)
            recent = self._recent.setdefault(name, deque(maxlen=self.window))
            if name == "loss" and math.isfinite(value):
                if len(recent) == self.window:
                    self._check_spike(runner, value, statistics.median(recent))
                self._check_divergence(runner, value)
            if math.isfinite(value):
                recent.append(value)
            if len(recent) == self.window and name not in self._idle and min(recent) == max(recent):
                self._idle.add(name)
                runner.logger.warning(
                    f"{name} has been exactly {value:g} in the last {self.window} steps: it teaches nothing. "
                    "Look at its weight, its targets and whether anything of it is trained"
                )

    def after_train(self, runner: Runner) -> None:
        worst = runner.message_hub.runtime_info.get("worst_loss")
        if worst is not None:
            step, value, first = worst
            runner.logger.warning(
                f"this training diverged: at step {step} the loss was {value:.4g}, {value / first:.0f} times the first one. "
                "Where it ended says nothing of what was learnt: features may have collapsed. Train anew with a lower lr or a "
                "longer warm-up"
            )

    def _check_divergence(self, runner: Runner, value: float) -> None:
        """Compare a loss with the first one, which is resumed with the run."""
        info = runner.message_hub.runtime_info
        if "first_loss" not in info:
            runner.message_hub.update_info("first_loss", value)
        first = abs(info["first_loss"])
        if first == 0 or not value > self.spike * first:
            self._above = 0
            return
        self._above += 1
        # one step that is somewhat above may be a batch of its own kind
        lasting = self._above >= 5 or value > 4 * self.spike * first
        if lasting and value > info.get("worst_loss", (0, 0.0, 0.0))[1]:
            runner.message_hub.update_info("worst_loss", [runner.iter + 1, value, first])
        advice = "Lower lr, lengthen the warm-up, or clip gradients (optim_wrapper.clip_grad)"
        if runner.iter >= self._quiet_until:
            self._quiet_until = runner.iter + self.window
            runner.logger.warning(
                f"the loss is {value:.4g} at step {runner.iter + 1}, far above the first one ({first:.4g}): the training "
                f"diverges. {advice}"
            )
        if self.patience is not None and self._above >= self.patience:
            raise DivergedError(
                "training-diverged",
                f"the training has diverged: in {self._above} steps in a row the loss was more than {self.spike:g} times the "
                f"first one ({first:.4g}), at last {value:.4g} at step {runner.iter + 1}. {advice}, and begin anew in another "
                "work folder, or go on from a checkpoint of before (--resume FILE). dict(type='hgkd.LossAlarmHook', "
                "patience=None) among the config's custom_hooks lets such trainings go on",
            )

    def _check_spike(self, runner: Runner, value: float, median: float) -> None:
        if runner.iter >= self._quiet_until and value > self.spike * abs(median):
            self._quiet_until = runner.iter + self.window
            runner.logger.warning(
                f"the loss jumped to {value:.4g} at step {runner.iter + 1}; its median over the last {self.window} steps is "
                f"{median:.4g}. When it happens again, lower lr or clip gradients (optim_wrapper.clip_grad)"
            )


@HOOKS.register_module()
class SteadyTimerHook(IterTimerHook):
    """mmengine's ``IterTimerHook`` by a clock that is never set, so that times and the estimated end stay right.

    :class:`hgkd.training.runner.DistillRunner` puts it in the place of mmengine's.
    """

    def _before_epoch(self, runner: Runner, mode: str = "train") -> None:
        self.t = time.perf_counter()

    def _before_iter(self, runner: Runner, batch_idx: int, data_batch: object = None, mode: str = "train") -> None:
        runner.message_hub.update_scalar(f"{mode}/data_time", time.perf_counter() - self.t)

    def _after_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: object = None, mode: str = "train"
    ) -> None:
        now = time.perf_counter()
        seconds, self.t = now - self.t, now
        runner.message_hub.update_scalar(f"{mode}/time", seconds)
        if mode == "train":
            self.time_sec_tot += seconds
            mean, left = self.time_sec_tot / (runner.iter - self.start_iter + 1), runner.max_iters - runner.iter - 1
        else:
            self.time_sec_test_val += seconds
            loader = runner.val_dataloader if mode == "val" else runner.test_dataloader
            mean, left = self.time_sec_test_val / (batch_idx + 1), len(loader) - batch_idx - 1
        runner.message_hub.update_info("eta", mean * left)


@HOOKS.register_module()
class CollapseAlarmHook(Hook):
    """Warns after a validation when the features hardly differ from image to image any more.

    Reads ``health/feature_std`` and ``health/effective_rank`` of ``FeatureHealthMetric``.

    Args:
        drop: alarm when a value falls below this share of the highest one so far.
        min_feature_std: alarm below this spread.
        min_effective_rank: alarm below this number of directions.
    """

    def __init__(self, drop: float = 0.25, min_feature_std: float = 0.01, min_effective_rank: float = 2.0) -> None:
        self.drop = drop
        self.floors = {"health/feature_std": min_feature_std, "health/effective_rank": min_effective_rank}

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        for name, floor in self.floors.items():
            value = (metrics or {}).get(name)
            if value is None:
                continue
            known = (value, runner.message_hub.runtime_info.get(f"highest {name}"))
            highest = max((number for number in known if number is not None and math.isfinite(number)), default=0.0)
            runner.message_hub.update_info(f"highest {name}", highest)  # resumed with the run
            if not value >= max(floor, self.drop * highest):  # NaN is an alarm
                runner.logger.warning(
                    f"features are collapsing: {name} is {value:.4g} (highest so far {highest:.4g}, alarm below "
                    f"{max(floor, self.drop * highest):.4g}). Different images get nearly the same feature; "
                    "lower lr, mask less, or look at the teacher"
                )
