"""Building all of a training and doing two steps of it, to see what it will need before it is started for days."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch.utils.data import default_collate

from hgkd.data.sampler import SeededIndex, epoch_seed
from hgkd.engine.class_report import ClassReportHook
from hgkd.engine.hooks import peak_memory_mb, plain_model
from hgkd.engine.loop import StepGuard, seed_step
from hgkd.registry import RUNNERS

_CPU_IMAGES = 8  # of a step on a CPU, whose time grows with the number of images


def dry_run(cfg: Config) -> str:
    """Build what ``cfg`` describes, do two steps on real images, and say what a training needs.

    Nothing is written to the config's work folder. On a CPU the steps take at most 8 images and their time is multiplied up; on
    a GPU they take the whole batch, so that the memory is the real one.

    Returns:
        A report of some lines.

    Raises:
        Whatever a training would raise before and in its first steps.
    """
    target = Path(cfg.work_dir).absolute()
    cfg = cfg.copy()
    cfg.visualizer = dict(type="Visualizer", vis_backends=[])
    cfg.resume, cfg.load_from = False, None
    with tempfile.TemporaryDirectory(prefix="hgkd-dry-run-") as folder:
        cfg.work_dir = folder
        runner: Any = RUNNERS.build(cfg)
        loop = runner.build_train_loop(runner._train_loop)
        runner._train_loop = loop
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
        _check_data(runner)
        report = _measure(runner, loop)
    needed = report.pop("checkpoint bytes") / 2**20
    free = shutil.disk_usage(next(p for p in (target, *target.parents) if p.exists())).free / 2**20
    enough = "" if free > 4 * needed else "  NOT ENOUGH"
    report["checkpoints"] = f"{needed:.0f} MB each, up to 4 at a time; {free:.0f} MB free at {target}{enough}"
    width = max(map(len, report))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in report.items())


def _check_data(runner: Any) -> None:
    """Build the loops of validation and test, and compare the data's classes."""
    _ = runner.val_loop, runner.test_loop
    for hook in runner.hooks:
        if isinstance(hook, ClassReportHook):
            hook.before_train(runner)


def _measure(runner: Any, loop: Any) -> dict[str, Any]:
    model: Any = plain_model(runner)
    loader = loop.dataloader
    on_gpu = next(model.parameters()).is_cuda
    images = loader.batch_size if on_gpu else min(loader.batch_size, _CPU_IMAGES)
    # 1. read one batch as the training will
    started = time.perf_counter()
    base = epoch_seed(runner.seed or 0, 0)
    batch = default_collate([loader.dataset[SeededIndex(i % len(loader.dataset), base)] for i in range(images)])
    reading = (time.perf_counter() - started) / images
    # 2. one step to warm up, one to measure
    guard = StepGuard(runner.optim_wrapper, runner.model)
    runner.model.train()
    for step in range(2):
        seed_step(runner.seed or 0, 0, step)
        _wait(on_gpu)
        started = time.perf_counter()
        losses = guard.settle(runner.model.train_step(batch, optim_wrapper=guard))
        _wait(on_gpu)
    seconds = (time.perf_counter() - started) * loader.batch_size / images
    # 3. what that means for the whole
    readers = max(loader.num_workers, 1)
    waiting = reading * loader.batch_size / readers
    a_step = max(seconds, waiting) if loader.num_workers else seconds + waiting
    remaining = a_step * loop.max_iters
    memory = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else peak_memory_mb()
    report: dict[str, Any] = {"plan": loop.plan(), "batch": ", ".join(f"{k} {_shape(v)}" for k, v in batch.items())}
    student = getattr(model, "student", None)
    if student is not None:
        report["student"] = f"{_about(student)}, mask grid {model.mask_grid[0]} x {model.mask_grid[1]}"
    report["trained"] = f"{_count(model, trained=True)} of {_count(model)}"
    teacher = getattr(model, "teacher", None)
    report["teacher"] = "none" if teacher is None else f"{_count(teacher)}, {teacher.info}"
    report["losses"] = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
    report["finite"] = "yes" if guard.updated else "NO: loss or gradient of the second step is not finite"
    report["a step"] = (
        f"{seconds:.2f} s to compute (measured with {images} images), {waiting:.2f} s to read by {readers} process(es)"
    )
    report["memory"] = f"{memory:.0f} MB at most" + (f" on the GPU, {images} images" if on_gpu else f", {images} images")
    report["whole run"] = f"about {_duration(remaining)} for {loop.max_iters} steps, validations not counted"
    report["checkpoint bytes"] = _bytes(model.state_dict()) + _bytes(runner.optim_wrapper.state_dict())
    return report


def _about(student: Any) -> str:
    """What a student is: a CNN with its features, or a ViT."""
    if hasattr(student, "encoder_spec"):
        levels = zip(student.feature_channels, student.feature_strides, strict=True)
        features = ", ".join(f"{channels} at stride {stride}" for channels, stride in levels)
        return f"{student.encoder_spec['name']}: {_count(student.encoder)} in the encoder, features {features}"
    arch = student.network.arch
    return f"a ViT of {arch.depth} blocks, width {arch.embed_dim}, patches of {arch.patch_size} px: {_count(student.network)}"


def _wait(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def _shape(value: Any) -> str:
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}" if isinstance(value, Tensor) else str(type(value))


def _count(module: nn.Module, trained: bool = False) -> str:
    return f"{sum(p.numel() for p in module.parameters() if p.requires_grad or not trained) / 1e6:.2f} M parameters"


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
