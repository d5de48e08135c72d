"""Building all of a training and doing two steps of it, to see what it will need before it is started for days."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.runner import BaseLoop, Runner
from torch import Tensor, nn
from torch.utils.data import default_collate

from hgkd.data.sampler import SeededIndex, epoch_seed
from hgkd.errors import DivergedError
from hgkd.networks.guest import teachers_of
from hgkd.networks.vit import watch_nonfinite
from hgkd.registry import build_runner
from hgkd.training.hooks.class_report import ClassReportHook
from hgkd.training.hooks.feature_cache import TeacherCacheHook
from hgkd.training.hooks.progress import peak_memory_mb
from hgkd.training.in_force import duration_text, in_force, lines_of
from hgkd.training.last_batch import check_last_batch
from hgkd.training.loop import GuardedOptimWrapper, seed_step
from hgkd.training.trackers import check_tracker
from hgkd.training.work_folder import trial_folder
from hgkd.training.wrapping import plain_model

_CPU_IMAGES = 8  # of a step on a CPU, whose time grows with the number of images


def dry_run(cfg: Config) -> str:
    """Build what ``cfg`` describes, do two steps on real images, and say what a training needs.

    Nothing is written to the config's work folder. On a CPU the steps take at most 8 images and their time is multiplied up; on
    a GPU they take the whole batch, so that the memory is the real one.

    Returns:
        A report of some lines.

    Raises:
        Exception: whatever a training would raise before and in its first steps.
        DivergedError: a loss or gradient is not finite; the message says where it begins.
        ValueError: the last batch of an epoch is too small for the model.
    """
    target = Path(cfg.work_dir).absolute()
    cfg = cfg.copy()
    cfg.visualizer = dict(type="Visualizer", vis_backends=[])
    check_tracker(cfg.pop("tracker", None))
    cfg.resume, cfg.load_from = False, None
    with trial_folder() as folder:
        cfg.work_dir = folder
        runner = build_runner(cfg)
        loop = runner.build_train_loop(runner._train_loop)
        runner._train_loop = loop
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
        if runner.param_schedulers is not None:
            runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)
        _check_data(runner)
        plan = {"plan": loop.plan(), **in_force(runner, loop, target)}  # before the steps, which change the rate
        report = _measure(runner, loop)
        plan.update(in_force(runner, loop, target))  # the checkpoint's real size
    return lines_of(plan | report)


def _check_data(runner: Runner) -> None:
    """Build the loops of validation and test, and compare the data's classes."""
    _ = runner.val_loop, runner.test_loop
    for hook in runner.hooks:
        if isinstance(hook, ClassReportHook):
            hook.before_train(runner)


def _measure(runner: Runner, loop: BaseLoop) -> dict[str, Any]:
    model = plain_model(runner)
    loader = loop.dataloader
    on_gpu = next(model.parameters()).is_cuda
    images = loader.batch_size if on_gpu else min(loader.batch_size, _CPU_IMAGES)
    # 1. read one batch as the training will
    started = time.perf_counter()
    base = epoch_seed(runner.seed or 0, 0)
    batch = default_collate([loader.dataset[SeededIndex(i % len(loader.dataset), base)] for i in range(images)])
    reading = (time.perf_counter() - started) / images
    # 2. one step to warm up, one to measure
    guard = GuardedOptimWrapper(runner.optim_wrapper, runner.model)
    runner.model.train()
    for step in range(2):
        seed_step(runner.seed or 0, 0, step)
        _wait(on_gpu)
        started = time.perf_counter()
        losses = guard.settle(runner.model.train_step(batch, optim_wrapper=guard))
        _wait(on_gpu)
        if guard.skipped or not all(map(math.isfinite, losses.values())):
            raise _diverged(model, batch, losses, step)
    seconds = (time.perf_counter() - started) * loader.batch_size / images
    check_last_batch(model, loop, batch)
    # 3. what that means for the whole
    workers = max(loader.num_workers, 1)
    waiting = reading * loader.batch_size / workers
    a_step = max(seconds, waiting) if loader.num_workers else seconds + waiting
    remaining = a_step * loop.max_iters
    memory = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else peak_memory_mb()
    report: dict[str, Any] = {"batch": ", ".join(f"{k} {_shape(v)}" for k, v in batch.items())}
    if getattr(model, "student", None) is not None:
        report["student"] = _student_text(model)
    report["trained"] = f"{_count(model, trained=True)} of {_count(model)}"
    teachers = teachers_of(model)
    report |= {} if teachers else {"teacher": "none"}
    for name, teacher in teachers.items():
        report["teacher" if len(teachers) == 1 else f"teacher {name}"] = f"{_count(teacher)}, {teacher.info}"
    for hook in runner.hooks:
        if isinstance(hook, TeacherCacheHook):
            report["teacher's features"] = hook.planned(runner)
    report["losses"] = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
    report["finite"] = "yes"
    report["a step"] = (
        f"{seconds:.2f} s to compute (measured with {images} images), {waiting:.2f} s to read by {workers} process(es)"
    )
    report["memory"] = f"{memory:.0f} MB at most" + (f" on the GPU, {images} images" if on_gpu else f", {images} images")
    report["whole run"] = f"about {duration_text(remaining)} for {loop.max_iters} steps, validations not counted"
    return report


def _student_text(model: BaseModel) -> str:
    """A masked student in words: a network of timm, or a ViT."""
    student = model.student
    spec = getattr(student, "encoder_spec", None)
    encoder = getattr(student, "encoder", student)
    name = spec["name"] if spec else type(student).__name__
    levels: dict[tuple[int, int], int] = {}
    for level in zip(student.feature_channels, student.feature_strides, strict=True):
        levels[level] = levels.get(level, 0) + 1
    features = (f"{c} at stride {s}" + (f" ({count} blocks)" if count > 1 else "") for (c, s), count in levels.items())
    where = "in the encoder" if encoder is not student else "with the decoder"
    return (
        f"{name}: {_count(encoder)} {where}, mask grid {model.mask_grid[0]} x {model.mask_grid[1]}, "
        f"features {', '.join(features)}"
    )


def _diverged(model: BaseModel, batch: object, losses: dict[str, float], step: int) -> DivergedError:
    """The error of a step that is not finite, which says where that begins."""
    teachers = teachers_of(model)
    data = model.data_preprocessor(batch, True)
    told = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
    with watch_nonfinite(model) as own, watch_nonfinite(nn.ModuleDict(teachers)) as taught, torch.no_grad():
        model(**data, mode="loss")
    if taught:
        name, _, module = taught[0][0].partition(".")
        dtype = str(getattr(teachers.get(name), "dtype", "float32")).removeprefix("torch.")
        place = "model.teacher" if len(teachers) == 1 else f"model.teachers.{name}"
        remedy = (
            f"set {place}.dtype='bfloat16', or 'float32'"
            if dtype == "float16"
            else "look at its weights with hgkd doctor teacher"
        )
        whose = "the teacher's" if len(teachers) == 1 else f"teacher {name!r}'s"
        why = f"{whose} module {module} gives values that are not finite in {dtype}; {remedy}"
    elif own:
        why = (
            f"module {own[0][0]} is the first whose output is not finite; look at the weights that it starts from, and at --amp"
        )
    elif all(map(math.isfinite, losses.values())):
        why = "the losses are finite, a gradient is not; set a smaller lr, or train without --amp"
    else:
        why = "every module's output is finite, the loss is not; look at the objectives' options and at lr"
    return DivergedError("step-not-finite", f"loss or gradient of step {step + 1} is not finite ({told}): {why}")


def _wait(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def _shape(value: object) -> str:
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}" if isinstance(value, Tensor) else str(type(value))


def _count(module: nn.Module, trained: bool = False) -> str:
    return f"{sum(p.numel() for p in module.parameters() if p.requires_grad or not trained) / 1e6:.2f} M parameters"
