"""Hooks of a distillation run: speed and memory in the log, alarms, and pictures of what is learnt."""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object, get_rank, get_world_size, is_main_process, master_only
from mmengine.hooks import Hook, IterTimerHook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from PIL import Image
from torch import Tensor, nn

from hgkd.engine.pictures import colour_basis, hide_cells, picture_grid, token_colours
from hgkd.errors import DivergedError
from hgkd.registry import HOOKS

if sys.platform != "win32":
    import resource


def plain_model(runner: Runner) -> nn.Module:
    """The model without its data-parallel wrapper."""
    model: nn.Module = runner.model.module if is_model_wrapper(runner.model) else runner.model
    return model


@HOOKS.register_module()
class MaskScheduleHook(Hook):
    """Tells the mask generator how far the training is, and logs ``mask_ratio``; see ``final_mask_ratio`` of the generators."""

    priority = "ABOVE_NORMAL"  # before the logger

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        mask: Any = getattr(plain_model(runner), "mask", None)
        if mask is not None:
            mask.progress = runner.iter / max(runner.max_iters - 1, 1)
            runner.message_hub.update_scalar("train/mask_ratio", mask.current_ratio)


@HOOKS.register_module()
class ThroughputHook(Hook):
    """Logs ``images_per_s`` of the whole run, over all processes; loading of the data included.

    On the CPU also ``teacher_share``, the share of that time that a distillation's teacher takes. (On a GPU the teacher's
    time is not known without waiting for it in every step; ``hgkd benchmark distill`` measures steps there.)
    """

    priority = "ABOVE_NORMAL"  # before the logger

    def __init__(self) -> None:
        self._last = 0.0
        self._teacher = 0.0

    def before_train_epoch(self, runner: Runner) -> None:
        self._last = time.perf_counter()
        self._teacher = getattr(plain_model(runner), "teacher_seconds", 0.0)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        now = time.perf_counter()
        images = len(data_batch["inputs"]) * get_world_size()
        seconds = max(now - self._last, 1e-9)
        runner.message_hub.update_scalar("train/images_per_s", images / seconds)
        self._last = now
        teacher: float = getattr(plain_model(runner), "teacher_seconds", 0.0)
        if teacher > self._teacher and not torch.cuda.is_available():
            runner.message_hub.update_scalar("train/teacher_share", (teacher - self._teacher) / seconds)
        self._teacher = teacher


@HOOKS.register_module()
class MemoryHook(Hook):
    """Logs ``peak_memory_mb``, the largest resident set of this process so far, on machines without CUDA.

    On CUDA mmengine logs ``memory``, the device's.
    """

    priority = "ABOVE_NORMAL"

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        if not torch.cuda.is_available() and sys.platform != "win32":
            runner.message_hub.update_scalar("train/peak_memory_mb", peak_memory_mb())


def peak_memory_mb() -> float:
    """Largest resident set of this process so far, in MB (2**20 bytes); not on Windows."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) / (2**20 if sys.platform == "darwin" else 2**10)


DUMP = "nonfinite_step_"  # how the names of its files begin


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Counts the steps that were left out because loss or gradient was not finite, and ends the run after several in a row.

    It then leaves ``work_dir/nonfinite_step_<n>.pth``, the state before the first of them, and beside it for every process
    ``nonfinite_step_<n>_rank_<r>.json``, from which ``hgkd replay`` does these steps again.

    Args:
        patience: so many updates in a row may be left out; the one after ends the run.
    """

    priority = "VERY_HIGH"

    def __init__(self, patience: int = 5) -> None:
        if patience < 0:
            raise ValueError(f"patience must be 0 (stop at once) or more, got {patience}")
        self.patience = patience
        self._steps: list[dict[str, Any]] = []  # those since the last update that was made
        self._skipped = 0

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        guard: Any = runner.train_loop.guard
        if guard.updated:
            self._steps, self._skipped = [], 0
            return
        values = {name: float(value) for name, value in (outputs or {}).items()}
        images = self._images(data_batch)
        self._steps.append({"epoch": runner.epoch, "step": runner.iter, "images": images, "losses": values})
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
        raise DivergedError(f"{what}. {self._skipped} updates in a row were left out. {advice}; {self._end(runner)}")

    def _images(self, data_batch: Any) -> list[Any]:
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


def not_finite_before_the_student(runner: Runner, data_batch: Any) -> str | None:
    """What is not finite in a step of this batch that no setting of the student's training can mend, and the remedy.

    The batch's loss is computed once more, without gradients, on the weights of before the step, and what the model's teacher
    says is looked at. Running statistics and random numbers stay what they were.

    Returns:
        A sentence without its full stop; None: images and teacher are finite, or there is no teacher.
    """
    model: Any = plain_model(runner)
    teacher: Any = getattr(model, "teacher", None)
    if not isinstance(teacher, nn.Module):
        return None
    said: list[bool] = []
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    handle = teacher.register_forward_hook(lambda *call: said.append(_all_finite(call[2])))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            data = model.data_preprocessor(data_batch, True)
            inputs = data.get("inputs") if isinstance(data, Mapping) else None
            if not _all_finite(inputs):
                return (
                    "the images hold values that are not finite: look at the files, and at the pixel statistics of the config"
                )
            model(**data, mode="loss")
    finally:
        handle.remove()
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    if all(said):
        return None
    return (
        "what the teacher says (the target) is not finite, in which the student's lr, clipping and --amp have no part: compute "
        "the teacher in another precision (model.teacher.dtype=float32, or bfloat16 where it is float16), and look at its "
        "weight file"
    )


def _all_finite(value: Any) -> bool:
    """Whether all numbers in tensors, containers and dataclasses are finite; anything else counts as finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value.detach().as_subclass(Tensor)).all())
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
        patience: so many steps in a row that far above the first loss end the run; None: never.
    """

    def __init__(self, spike: float = 5.0, window: int = 50, patience: int | None = 20) -> None:
        if not spike > 1 or window < 2:
            raise ValueError(f"spike must be above 1 and window 2 or more, got {spike} and {window}")
        if patience is not None and patience < 1:
            raise ValueError(f"patience must be 1 step or more, or None (never end the run), got {patience}")
        self.spike = spike
        self.window = window
        self.patience = patience
        self._above = 0  # steps in a row
        self._recent: dict[str, deque[float]] = {}
        self._quiet_until = 0
        self._idle: set[str] = set()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        for name, value in (outputs or {}).items():
            if not name.endswith("loss"):
                continue
            value = float(value)
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
                f"the training has diverged: in {self._above} steps in a row the loss was more than {self.spike:g} times the "
                f"first one ({first:.4g}), at last {value:.4g} at step {runner.iter + 1}. {advice}, and begin anew in another "
                "work folder, or go on from a checkpoint of before (--resume FILE). LossAlarmHook.patience=None lets such "
                "trainings go on"
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

    :class:`hgkd.engine.runner.DistillRunner` puts it in the place of mmengine's.
    """

    def _before_epoch(self, runner: Runner, mode: str = "train") -> None:
        self.t = time.perf_counter()

    def _before_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, mode: str = "train") -> None:
        runner.message_hub.update_scalar(f"{mode}/data_time", time.perf_counter() - self.t)

    def _after_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None, mode: str = "train"
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


UNREADABLE = "unreadable_files.txt"


@HOOKS.register_module()
class UnreadableFilesHook(Hook):
    """Lists in ``work_dir/unreadable_files.txt``, at the end of a run, the training images that could not be read."""

    def after_train(self, runner: Runner) -> None:
        dataset: Any = runner.train_loop.dataloader.dataset
        found: list[list[str]] = all_gather_object(dataset.bad_files()) if hasattr(dataset, "bad_files") else []
        if is_main_process():
            report_unreadable(runner, chain.from_iterable(found))


def report_unreadable(runner: Runner, files: Iterable[str]) -> None:
    """Name each unreadable training image once in ``work_dir/unreadable_files.txt``, and say how many there are."""
    names = sorted(set(files))
    if names:
        path = Path(runner.work_dir) / UNREADABLE
        path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8", errors="surrogateescape")
        count = len(runner.train_loop.dataloader.dataset)
        runner.logger.warning(
            f"{len(names)} of {count} training images could not be read and were left out; they are listed in {path}"
        )


@HOOKS.register_module()
class CollapseAlarmHook(Hook):
    """Warns after a validation when the features hardly differ from image to image any more.

    Reads ``health/feature_std`` and ``health/effective_rank`` of ``FeatureHealthMetric``.

    Args:
        drop: alarm when a value falls below this share of the highest one so far.
        min_feature_std: alarm below this spread.
        min_effective_rank: alarm below so many directions.
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


@HOOKS.register_module()
class PictureHook(Hook):
    """Saves ``work_dir/pictures/epoch_<n>.png``: a few training images and what student and teacher make of them.

    Columns: the image, what the student sees of it, and for every objective the teacher's tokens and the student's
    prediction as colours (same basis), or the reconstruction. Images, crops and masks are the same each time; with a mask
    ratio that changes, as many cells are hidden as at the beginning.

    Args:
        interval: epochs between two pictures; there is always one at the end.
        num_images: rows.
        seed: of the crops and masks.
    """

    priority = "LOW"

    def __init__(self, interval: int = 1, num_images: int = 4, seed: int = 0) -> None:
        if interval < 1 or num_images < 1:
            raise ValueError(f"interval and num_images must be 1 or more, got {interval} and {num_images}")
        self.interval = interval
        self.num_images = num_images
        self.seed = seed
        self._inputs: Tensor | None = None

    @master_only
    def before_train(self, runner: Runner) -> None:
        model = plain_model(runner)
        if not hasattr(model, "student"):
            raise ValueError(f"PictureHook shows what a student learns, but a {type(model).__name__} has none; remove the hook")
        dataset = runner.train_dataloader.dataset
        count = min(self.num_images, len(dataset))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self._inputs = torch.stack([dataset[i * len(dataset) // count]["inputs"] for i in range(count)])

    @master_only
    def after_train_epoch(self, runner: Runner) -> None:
        if self._inputs is None or not (self.every_n_epochs(runner, self.interval) or self.is_last_train_epoch(runner)):
            return
        picture = picture_grid(distillation_columns(plain_model(runner), self._inputs, self.seed))
        folder = Path(runner.work_dir) / "pictures"
        folder.mkdir(exist_ok=True)
        Image.fromarray(picture).save(folder / f"epoch_{runner.epoch + 1}.png")
        runner.visualizer.add_image("pictures", picture, step=runner.epoch + 1)


@torch.no_grad()
def distillation_columns(model: Any, inputs: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Columns for :func:`hgkd.engine.pictures.picture_grid` of a ``MaskedDistiller``, computed in eval mode.

    Args:
        inputs: uint8 (B, 3, H, W).
        seed: of the mask.

    Returns:
        Title -> (B, 3, h, w) in [0, 1].
    """
    training, progress = model.training, model.mask.progress
    model.eval()
    model.mask.progress = 0.0  # pictures of different epochs hide the same cells
    try:
        device = next(model.parameters()).device
        images = inputs.to(device).float() / 255
        generator = torch.Generator().manual_seed(seed)
        visible = model.draw_mask(images, generator)
        student_out = model.student(images, visible)
        teacher_outs = model.teach(images, visible)
        columns = {"image": images, "seen": hide_cells(images, visible)}
        for name, objective in model.objectives.items():
            if objective.terms:
                columns.update(_feature_columns(name, objective, student_out, teacher_outs[name]))
            reconstruction = objective.reconstruct(student_out, student_out.layout)
            if reconstruction is not None:
                columns[name] = reconstruction
    finally:
        model.train(training)
        model.mask.progress = progress
    return columns


def _feature_columns(name: str, objective: Any, student_out: Any, teacher_out: Any) -> dict[str, Tensor]:
    terms: Sequence[str] = objective.terms
    columns = {}
    for term in terms:
        label = name if len(terms) == 1 else f"{name} {term}"
        target = objective.target_map(teacher_out, term)
        basis = colour_basis(target)
        columns[f"{label}: teacher"] = token_colours(target, basis)
        columns[f"{label}: student"] = token_colours(objective.predict(student_out, term), basis)
    return columns
