"""Resuming: which settings come from the checkpoint, and which from the config.

mmengine 0.10.7 takes the settings of optimiser and schedule from the checkpoint, whatever the config says now: more epochs are
trained at the last rate of the old schedule, and a lower ``lr`` changes nothing. Here the config is in force. What has been
learnt (weights, moments, average, loss scale, position) is the checkpoint's; where settings differ, the schedule is computed
anew up to the position of the checkpoint, and the difference is said. Without a difference nothing is touched. What else
differs between the two configs, in model, images and update, is said from the text of the old one, which checkpoints hold.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmengine.hooks import EMAHook
from mmengine.optim import OptimWrapper
from mmengine.runner import IterBasedTrainLoop, Runner

from hgkd.errors import InvalidValueError
from hgkd.weights.run_file import literal_config

# of a scheduler's state: where it is, not what it does; base values are the groups' own
_POSITION = frozenset({"last_step", "_global_step", "_last_value", "verbose", "base_values"})
# parts of a config that are compared as written -> without what changes no result, and the optimiser, which is told as built
_COMPARED: dict[str, frozenset[str]] = {
    "model": frozenset(),
    "train_dataloader": frozenset(
        {"num_workers", "persistent_workers", "pin_memory", "prefetch_factor", "multiprocessing_context"}
    ),
    "optim_wrapper": frozenset({"optimizer"}),
}
# of these the checkpoint's are in force, and ``DistillRunner.load_checkpoint`` says so
_PIXELS = re.compile(r"model\.((student|classifier)\.)?(normalize|mean|std)(\.|$)")
_ABSENT = "(absent)"
_SCALER_POSITION = frozenset({"scale", "_growth_tracker"})


def images_of(runner: Runner) -> dict[str, int]:
    """Facts that, with the seed, fix the order of a training's images, as checkpoints hold them in ``meta['images']``."""
    loader = runner.train_dataloader
    batch = getattr(loader.batch_sampler, "batch_size", loader.batch_size)  # of a loader with a batch sampler torch says None
    found = {"images": len(loader.dataset), "batch_size": batch, "processes": runner.world_size}
    repeats = getattr(loader.sampler, "repeats", 1)
    return found if repeats == 1 else {**found, "repeats": repeats}


def images_that_differ(meta: Mapping[str, Any], runner: Runner) -> str:
    """How the images of a run differ from those of the checkpoint with this ``meta``, in words; empty: not as
    far as is known."""
    now, before = images_of(runner), meta.get("images")
    if not isinstance(before, Mapping):  # written before 2026-11-28
        return ""
    names = dict.fromkeys([*before, *now])
    return ", ".join(f"{n} {before.get(n, 1)} -> {now.get(n, 1)}" for n in names if before.get(n, 1) != now.get(n, 1))


def config_changes(source: str, meta: Mapping[str, Any], config: str) -> str | None:
    """Which settings of model, images and update are others than those that a checkpoint was written with.

    Neither text is run: as far as they are plain values, they are compared.

    Args:
        source: name of the checkpoint, for messages.
        meta: the checkpoint's.
        config: of this run, as mmengine writes it (``Config.pretty_text``).

    Returns:
        Each key with both values, or what cannot be compared; None: nothing differs.
    """
    before, now = literal_config(meta.get("cfg")), literal_config(config)
    lost = [part for part in _COMPARED if not (isinstance(before.get(part), dict) and isinstance(now.get(part), dict))]
    changes: dict[str, tuple[Any, Any]] = {}
    for part in [part for part in _COMPARED if part not in lost]:
        old, new = (
            _flat({key: value for key, value in config[part].items() if key not in _COMPARED[part]}, part)
            for config in (before, now)
        )
        for key in dict.fromkeys([*new, *old]):
            values = old.get(key, _ABSENT), new.get(key, _ABSENT)
            if not _same(*values) and not _PIXELS.match(key):
                changes[key] = values
    said = [f"the config of this start differs from that of {source} and is in force: {_words(changes)}"] if changes else []
    said += [f"whether {', '.join(lost)} differs from that of {source} cannot be read from its config"] if lost else []
    return "; ".join(said) or None


def _flat(value: Any, key: str) -> dict[str, Any]:
    """Dotted key -> value; lists count as one value, unless there are dicts in them."""
    items: Any = None
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)) and any(isinstance(item, dict) for item in value):
        items = enumerate(value)
    if not items:
        return {key: value}
    return {name: leaf for inner, item in items for name, leaf in _flat(item, f"{key}.{inner}").items()}


@dataclass(frozen=True)
class ReadCheckpoint:
    """Of a checkpoint that was read, what is compared with the run that goes on from it."""

    meta: Mapping[str, Any]
    schedules: Sequence[Mapping[str, Any]] | None
    has_average: bool

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> ReadCheckpoint:
        """Before any hook has seen it: ``EMAHook`` takes its part out."""
        schedules = checkpoint.get("param_schedulers")
        return cls(checkpoint.get("meta") or {}, copy.deepcopy(schedules), "ema_state_dict" in checkpoint)


class ConfiguredSettings:
    """Settings of optimiser, schedule and loss scaler as a config describes them, taken before a checkpoint is loaded.

    Args:
        runner: whose optimiser wrapper and schedulers are built, and have not made a step.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        wrapper = runner.optim_wrapper
        self._kind = type(wrapper.optimizer).__name__
        self._groups = [_settings(group) for group in wrapper.optimizer.param_groups]
        self._base = copy.deepcopy(getattr(wrapper, "base_param_settings", None))
        self._schedules = [copy.deepcopy(scheduler.state_dict()) for scheduler in self._schedulers]
        self._scaler = _scaler_settings(wrapper)

    @property
    def _schedulers(self) -> list[Any]:
        found = self.runner.param_schedulers or []
        return list(found) if isinstance(found, (list, tuple)) else [s for part in found.values() for s in part]

    def put_in_force(self, source: str, read: ReadCheckpoint) -> str | None:
        """Let the config's settings replace those that were loaded, where the two differ.

        Args:
            source: name of the checkpoint, for messages.

        Returns:
            What differs and what is in force now; None when nothing differs.

        Raises:
            ValueError: another optimiser, a moving average that the config lacks, or a schedule that follows the validation
                and has other settings, so that it cannot be computed anew.
        """
        self._check_kind(source, read)
        optimizer = self.runner.optim_wrapper.optimizer
        loaded = [_settings(group) for group in optimizer.param_groups]
        changes = {**_group_changes(loaded, self._groups), **_schedule_changes(read.schedules, self._schedules)}
        scaler = _scaler_settings(self.runner.optim_wrapper)
        for name in self._scaler:
            if not _same(scaler.get(name), self._scaler[name]):
                changes[f"loss scale {name}"] = (scaler.get(name), self._scaler[name])
        if not changes:
            return None
        if any(getattr(scheduler, "need_val_args", False) for scheduler in self._schedulers):
            raise InvalidValueError(
                "resume-other-settings",
                f"{source} was written with other settings ({_words(changes)}), and a schedule that follows the validation "
                "cannot be computed anew. Resume with the settings that it was written with, or start anew in another work "
                "folder",
            )
        was = optimizer.param_groups[0]["lr"]
        self._rebuild()
        rate = optimizer.param_groups[0]["lr"]
        return (
            f"{source} was written with other settings; those of this start are in force now: {_words(changes)}. The learning "
            f"rate goes on at {float(rate):.4g} (the checkpoint's was {float(was):.4g}). To go on as before, resume with the "
            "settings of the first start"
        )

    def _check_kind(self, source: str, read: ReadCheckpoint) -> None:
        if read.has_average and not any(isinstance(hook, EMAHook) for hook in self.runner.hooks):
            raise InvalidValueError(
                "resume-without-average",
                f"{source} holds a moving average of the weights, and this config has no EMAHook: training would go on from "
                "the average with the optimiser state of the weights. Resume with the EMAHook that it was written with, or "
                "start anew in another work folder",
            )
        before = read.meta.get("optimizer")
        groups = self.runner.optim_wrapper.optimizer.param_groups
        foreign = {key for key in groups[0] if not key.startswith("initial_")} - self._groups[0].keys() - {"params"}
        if (before or self._kind) != self._kind or (before is None and foreign):
            what = before or f"one with {', '.join(sorted(foreign))}"
            raise InvalidValueError(
                "resume-other-optimizer",
                f"{source} holds the state of another optimiser ({what}) than this config's {self._kind}. Resume with the "
                "optimiser that it was written with, or start anew in another work folder",
            )

    def _rebuild(self) -> None:
        """Groups, schedule and scaler as at the beginning, then the schedule stepped to where the training is."""
        wrapper, loop = self.runner.optim_wrapper, self.runner.train_loop
        for group, settings in zip(wrapper.optimizer.param_groups, self._groups, strict=True):
            for key in [key for key in group if key not in settings and key.startswith("initial_")]:
                del group[key]
            group.update(copy.deepcopy(settings))
        if self._base is not None:
            wrapper.base_param_settings = copy.deepcopy(self._base)
        if self._scaler:
            wrapper.loss_scaler.load_state_dict({**wrapper.loss_scaler.state_dict(), **self._scaler})
        for scheduler, state in zip(self._schedulers, self._schedules, strict=True):
            scheduler.__dict__ = {"optimizer": scheduler.optimizer, **copy.deepcopy(state)}
        # mmengine steps them after each step, and after each epoch of loops that count epochs
        steps = 0 if isinstance(loop, IterBasedTrainLoop) else len(loop.dataloader)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of steps of a schedule before any of the optimiser
            for step in range(1, loop.iter + 1):
                for scheduler in self._schedulers:
                    if not scheduler.by_epoch:
                        scheduler.step()
                for scheduler in self._schedulers:
                    if scheduler.by_epoch and steps and step % steps == 0:
                        scheduler.step()


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}


def _scaler_settings(wrapper: OptimWrapper) -> dict[str, Any]:
    state = wrapper.loss_scaler.state_dict() if hasattr(wrapper, "loss_scaler") else {}
    return {key: value for key, value in state.items() if key not in _SCALER_POSITION}


def _group_changes(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Any, Any]]:
    """Setting -> (loaded, config's), of the first group where it differs; of what a schedule moves, the value
    it starts from."""
    changes: dict[str, tuple[Any, Any]] = {}
    for old, new in zip(before, now, strict=True):
        for key in new:
            if key.startswith("initial_") or key not in old:
                continue
            values = old.get(f"initial_{key}", old[key]), new.get(f"initial_{key}", new[key])
            if not _same(*values):
                changes.setdefault(key, values)
    return changes


def _schedule_changes(
    before: Sequence[Mapping[str, Any]] | None, now: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[Any, Any]]:
    if before is None or isinstance(before, Mapping):
        before = [] if before is None else [state for part in before.values() for state in part]
    if len(before) != len(now):
        return {"schedules": (len(before), len(now))}
    changes: dict[str, tuple[Any, Any]] = {}
    for old, new in zip(before, now, strict=True):
        for key in sorted((old.keys() | new.keys()) - _POSITION):
            if not _same(old.get(key), new.get(key)):
                changes.setdefault(f"{new.get('param_name', '')} schedule {key}".strip(), (old.get(key), new.get(key)))
    return changes


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, float) or isinstance(right, float):
        try:
            return math.isclose(float(left), float(right), rel_tol=1e-9)
        except TypeError:
            return False
    return bool(left == right)


def _words(changes: Mapping[str, tuple[Any, Any]]) -> str:
    def text(value: object) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{name} {text(old)} -> {text(new)}" for name, (old, new) in changes.items())
