"""Hooks that say how a run goes: mask ratio, speed, memory, files that cannot be read."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from mmengine.dist import all_gather_object, get_world_size, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from hgkd.registry import HOOKS
from hgkd.training.wrapping import plain_model

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


@HOOKS.register_module()
class MaskScheduleHook(Hook):
    """Tells the mask generator how far the training is, and logs ``mask_ratio``; see ``final_mask_ratio`` of the generators."""

    priority = "ABOVE_NORMAL"  # before the logger

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        mask = getattr(plain_model(runner), "mask", None)
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
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: dict[str, Any] | None = None
    ) -> None:
        now = time.perf_counter()
        images = len(cast(Mapping[str, Any], data_batch)["inputs"]) * get_world_size()
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
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: dict[str, Any] | None = None
    ) -> None:
        peak = None if torch.cuda.is_available() else peak_memory_mb()
        if peak is not None:
            runner.message_hub.update_scalar("train/peak_memory_mb", peak)


def peak_memory_mb() -> float | None:
    """Largest resident set of this process so far, in MB (2**20 bytes); None on Windows, where nothing tells it."""
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) / (2**20 if sys.platform == "darwin" else 2**10)


UNREADABLE = "unreadable_files.txt"


@HOOKS.register_module()
class UnreadableFilesHook(Hook):
    """Lists in ``work_dir/unreadable_files.txt``, at the end of a run, the training images that could not be read."""

    def after_train(self, runner: Runner) -> None:
        dataset = runner.train_loop.dataloader.dataset
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
