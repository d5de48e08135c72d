"""Facts of a training before its first step, read from the built parts and not from the config.

Each line is made by one function here; :func:`in_force` gathers those that apply to a run, of pretraining, fine-tuning,
detection or segmentation.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, cast

from mmengine.hooks import CheckpointHook, EMAHook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.optim.scheduler.param_scheduler import _ParamScheduler
from mmengine.runner import BaseLoop, Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hgkd.networks.guest import teachers_of
from hgkd.training.wrapping import plain_model

_ENDLESS = 10**9
_MB = 2**20


def in_force(runner: Runner, loop: BaseLoop, work_dir: Path, checkpoint_bytes: int | None = None) -> dict[str, str]:
    """Name of a fact -> the fact.

    Args:
        runner: with its optimiser and schedulers built.
        loop: its training loop.
        work_dir: where the checkpoints are going to lie.
        checkpoint_bytes: size of one, if it is known; None: estimated.
    """
    model = plain_model(runner)
    facts = {
        "rate": rate_text(
            runner.optim_wrapper, _all_schedulers(runner.param_schedulers), loop.iter, loop.max_iters, _epoch(loop)
        ),
        "pixels": pixels_text(model),
        "teachers": teachers_text(model),
        "cells": cells_text(model),
        "images": images_text(loop.dataloader, runner.world_size, runner.cfg.train_dataloader.get("dataset") or {}),
        "features": features_text(model, runner.hooks, len(loop.dataloader.dataset)),
        "checkpoints": checkpoints_text(runner, loop, work_dir, checkpoint_bytes),
    }
    return {name: fact for name, fact in facts.items() if fact is not None}


def lines_of(facts: Mapping[str, Any]) -> str:
    """One line a fact, the names in a column of their own."""
    width = max(map(len, facts), default=0)
    return "\n".join(f"{name:<{width}}  {fact}" for name, fact in facts.items())


def duration_text(seconds: float) -> str:
    """A duration in the unit that fits it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# --- learning rate ------------------------------------------------------------------------------------------------------


def _epoch(loop: BaseLoop) -> int:
    """Steps an epoch."""
    return max(len(loop.dataloader), 1)


def _all_schedulers(schedulers: Mapping[str, Any] | Sequence[Any] | None) -> list[Any]:
    if isinstance(schedulers, Mapping):  # of several optimisers
        return [one for part in schedulers.values() for one in _all_schedulers(part)]
    return list(schedulers or ())


def rate_text(wrapper: OptimWrapper, schedulers: Sequence[Any], done: int, total: int, per_epoch: int) -> str | None:
    """The learning rate that the optimiser holds, and how it is going to change.

    Args:
        schedulers: built ones, or none.
        done, total, per_epoch: steps.
    """
    groups = getattr(getattr(wrapper, "optimizer", None), "param_groups", None)
    if not groups:
        return None
    peaks = [float(group.get("initial_lr", group["lr"])) for group in groups]
    parts = [f"lr {max(peaks):.4g}" + (f" (the largest of {len(groups)} groups)" if min(peaks) < max(peaks) else "")]
    parts += [scheduler_text(scheduler) for scheduler in schedulers] or ["constant"]
    ends = [s.end if not s.by_epoch else s.end * per_epoch for s in schedulers if s.param_name == "lr" and s.end < _ENDLESS]
    if ends and max(ends) != total:
        parts.append(f"the schedule ends after step {max(ends)}, the training after step {total}")
    if done:
        parts.append(f"{max(float(group['lr']) for group in groups):.4g} now, after step {done}")
    return "; ".join(parts)


def scheduler_text(scheduler: _ParamScheduler) -> str:
    """One scheduler in words: what, how, and when."""
    name = type(scheduler).__name__
    about = "" if scheduler.param_name == "lr" else f" of {scheduler.param_name}"
    words = {"start_factor": "from {:.3g} of it", "eta_min_ratio": "to {:.3g} of it", "eta_min": "to {:.3g}"}
    found = [text.format(getattr(scheduler, key)) for key, text in words.items() if getattr(scheduler, key, None) is not None]
    if getattr(scheduler, "milestones", None):
        found.append(f"times {scheduler.gamma:g} after {', '.join(map(str, sorted(scheduler.milestones)))}")
    end = "the end" if scheduler.end >= _ENDLESS else str(scheduler.end)
    found.append(f"in {'epochs' if scheduler.by_epoch else 'steps'} {scheduler.begin + 1} to {end}")
    return f"{name}{about} {' '.join(found)}"


# --- images -------------------------------------------------------------------------------------------------------------


def pixels_text(model: nn.Module) -> str | None:
    """Size, channels and normalisation of the images that student and teachers see."""
    teachers = teachers_of(model)
    parts: list[tuple[str, nn.Module, Any]] = [("student" if teachers else "model", model, getattr(model, "image_size", None))]
    chosen: Mapping[str, Any] = getattr(model, "_channels", {})
    for name, teacher in teachers.items():
        # a classifier as teacher may take the student's size
        size = getattr(teacher, "input_size", None) or getattr(teacher, "image_size", None)
        seen = "" if chosen.get(name) is None else f" (channels {' '.join(map(str, chosen[name]))})"
        parts.append((name + seen, teacher, size))
    texts = []
    for name, part, size in parts:
        found = normalisation(part)
        if found is None:
            continue
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in found)
        texts.append(f"{name} {f'{size[0]} x {size[1]} px, ' if size else ''}mean {mean}, std {std}")
    return "; ".join(texts) or None


def teachers_text(model: BaseModel) -> str | None:
    """Which objective learns from which of several teachers, and which of them guides the mask."""
    teachers, owners = teachers_of(model), getattr(model, "_pass_of", None)
    if len(teachers) < 2 or owners is None:
        return None
    texts = []
    for name, teacher in teachers.items():
        taught = [objective for objective, (owner, _) in owners.items() if owner == name]
        taught += ["the mask"] if getattr(model, "_guide", None) == name else []
        info = teacher.info
        texts.append(f"{name} ({info.kind}, {info.depth} blocks, width {info.width}) for {', '.join(taught)}")
    return "; ".join(texts)


def normalisation(module: nn.Module) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation of the pixels by which a network normalises, in its own units; None: it does not."""
    for part in module.modules():
        mean = getattr(part, "mean", None)
        std = getattr(part, "std", None)
        if isinstance(mean, Tensor) and isinstance(std, Tensor):
            return mean.flatten().tolist(), std.flatten().tolist()
    return None


def cells_text(model: BaseModel) -> str | None:
    """How many cells of an image a masked student sees."""
    mask = getattr(model, "mask", None)
    grid = getattr(model, "mask_grid", None)
    if grid is None or mask is None or not hasattr(mask, "describe"):
        return None
    size = getattr(model, "image_size", None)
    cells = f"{grid[0]} x {grid[1]}" + (f" of {size[0] // grid[0]} px" if size else "")
    views = model.views_text() if hasattr(model, "views_text") else ""
    return f"{mask.describe(grid)}{views}; grid {cells}"


def images_text(loader: DataLoader[Any], processes: int, dataset: Mapping[str, Any]) -> str:
    """How many images are used, and what leaves some of them out.

    Args:
        dataset: its config.
    """
    total = len(cast(Sized, loader.dataset))
    limits = ("limit", "limit_per_class", "label_fraction", "indices", "list_file")
    given = [f"{key}={dataset[key]}" for key in limits if dataset.get(key) not in (None, 1.0)]
    text = f"{total} used" + (f" ({', '.join(given)})" if given else "")
    batch = getattr(loader, "batch_size", None) or getattr(loader.batch_sampler, "batch_size", None)
    if batch and getattr(loader, "drop_last", False) and total % (batch * processes):
        text += f"; each epoch leaves out {total % (batch * processes)} that fill no batch, others each time"
    return text


# --- disk ---------------------------------------------------------------------------------------------------------------


def features_text(model: BaseModel, hooks: Iterable[Any], images: int) -> str | None:
    """Disk space of the store of the teacher's features."""
    folder = next((hook.folder for hook in hooks if type(hook).__name__ == "TeacherCacheHook"), None)
    stored_bytes: Callable[[int], int] | None = getattr(model, "stored_bytes", None)
    if folder is None or stored_bytes is None:
        return None
    size = stored_bytes(images)
    whose = "teacher" if len(teachers_of(model)) == 1 else "teachers"
    return f"of the {whose} take {size / _MB:.0f} MB in {folder} ({size / images / 1024:.0f} KB an image)"


def checkpoints_text(runner: Runner, loop: BaseLoop, work_dir: Path, each: int | None) -> str | None:
    """Disk space of the checkpoints, and free space."""
    hook = next((hook for hook in runner.hooks if isinstance(hook, CheckpointHook)), None)
    if hook is None:
        return None
    if each is None:
        each = estimated_bytes(runner)
    count = kept_at_once(hook, loop)
    size = each * count
    free = shutil.disk_usage(next(p for p in (work_dir, *work_dir.parents) if p.exists())).free
    enough = "" if free > size else "  NOT ENOUGH"
    return f"{each / _MB:.0f} MB each, up to {count} at a time; {free / _MB:.0f} MB free at {work_dir}{enough}"


def kept_at_once(hook: CheckpointHook, loop: BaseLoop) -> int:
    """Checkpoints that lie on disk at one time at most: those kept, the best ones, and the one that is being written."""
    best = hook.save_best
    bests = 0 if not best else len(best) if isinstance(best, (list, tuple)) else 1
    if hook.max_keep_ckpts > 0:
        return int(hook.max_keep_ckpts) + bests + 1
    length = loop.max_epochs if hook.by_epoch and loop.max_epochs else loop.max_iters
    return math.ceil(length / max(hook.interval, 1)) + bests


def estimated_bytes(runner: Runner) -> int:
    """Bytes of a checkpoint: weights, an average of them where there is one, and what the optimiser keeps."""
    model = plain_model(runner)
    weights = tensor_bytes(model.state_dict())
    copies = sum(isinstance(hook, EMAHook) for hook in runner.hooks)
    optimizer = getattr(runner.optim_wrapper, "optimizer", None)
    state = 0 if optimizer is None else tensor_bytes(optimizer.state_dict()["state"])
    if not state:  # before the first step
        defaults = getattr(optimizer, "defaults", {})
        moments = 2 if "betas" in defaults else 1 if defaults.get("momentum") else 0
        state = moments * sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return weights * (1 + copies) + state


def tensor_bytes(value: object) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(tensor_bytes, value.values()))
    return sum(map(tensor_bytes, value)) if isinstance(value, (list, tuple)) else 0
