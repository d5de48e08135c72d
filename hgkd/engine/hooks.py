"""Hooks of a distillation run: speed and memory in the log, alarms, and pictures of what is learnt."""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object, get_rank, get_world_size, is_main_process, master_only
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from PIL import Image
from torch import Tensor, nn

from hgkd.engine.pictures import colour_basis, hide_cells, picture_grid, token_colours
from hgkd.errors import StoppedError
from hgkd.registry import HOOKS

if sys.platform != "win32":
    import resource


class DivergedError(StoppedError):
    """The loss is not a finite number any more; training on would only damage the weights further."""


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
    time is not known without waiting for it in every step; ``tools/benchmark.py distill`` measures steps there.)
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


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Counts the steps that were left out because loss or gradient was not finite, and ends the run after several in a row.

    It then leaves ``work_dir/nonfinite_step_<n>.pth``, the state before the first of them, and beside it for every process
    ``nonfinite_step_<n>_rank_<r>.json``, from which ``tools/replay.py`` does these steps again.

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
        if self._skipped <= self.patience:
            runner.logger.warning(f"{what}. The step is left out ({self._skipped} in a row, {total} in all)")
            return
        raise DivergedError(
            f"{what}. {self._skipped} updates in a row were left out. Lower lr, lengthen the warm-up, clip gradients "
            f"(optim_wrapper.clip_grad), or train without --amp; {self._end(runner)}"
        )

    def _images(self, data_batch: Any) -> list[Any]:
        """What tells the images of a batch, for the message and the dump."""
        return [int(i) for i in data_batch.get("index", [])] if isinstance(data_batch, Mapping) else []

    def _end(self, runner: Runner) -> str:
        """What is left of the run, said at the end of the message."""
        return (
            f"the weights are those of before, and 'python tools/replay.py {self._dump(runner)}' does these steps again and "
            "tells where the first value that is not finite appears"
        )

    def _dump(self, runner: Runner) -> Path:
        first = self._steps[0]
        name = f"nonfinite_step_{first['step'] + 1}"
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


@HOOKS.register_module()
class LossAlarmHook(Hook):
    """Warns when the loss jumps, and when one of its terms does nothing.

    Args:
        spike: alarm when the loss exceeds this multiple of its median over the last ``window`` steps; at most once in a window.
        window: steps.
    """

    def __init__(self, spike: float = 5.0, window: int = 50) -> None:
        if spike <= 1 or window < 2:
            raise ValueError(f"spike must be above 1 and window 2 or more, got {spike} and {window}")
        self.spike = spike
        self.window = window
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
            if name == "loss" and len(recent) == self.window:
                self._check_spike(runner, value, statistics.median(recent))
            if math.isfinite(value):
                recent.append(value)
            if len(recent) == self.window and name not in self._idle and min(recent) == max(recent):
                self._idle.add(name)
                runner.logger.warning(
                    f"{name} has been exactly {value:g} in the last {self.window} steps: it teaches nothing. "
                    "Look at its weight, its targets and whether anything of it is trained"
                )

    def _check_spike(self, runner: Runner, value: float, median: float) -> None:
        if runner.iter >= self._quiet_until and value > self.spike * abs(median):
            self._quiet_until = runner.iter + self.window
            runner.logger.warning(
                f"the loss jumped to {value:.4g} at step {runner.iter + 1}; its median over the last {self.window} steps is "
                f"{median:.4g}. When it happens again, lower lr or clip gradients (optim_wrapper.clip_grad)"
            )


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
            highest = max(value, runner.message_hub.runtime_info.get(f"highest {name}", value))
            runner.message_hub.update_info(f"highest {name}", highest)  # resumed with the run
            if value < max(floor, self.drop * highest):
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
