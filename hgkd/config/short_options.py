"""Short options: top-level variables of a config that are written into their places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config

from hgkd.config.levels import MISSING, Level, Levels, same
from hgkd.config.options import option_value
from hgkd.config.schedule import rate_entries, shorter_warmup
from hgkd.errors import InvalidValueError


@dataclass(frozen=True)
class ShortOption:
    """A top-level variable of a config that stands for one or more nested keys.

    Attributes:
        places: dotted paths that get the value; within a list a number is an index, a name the ``type`` of the entry. Those
            whose parent is absent are passed over, but one must be there.
        help: what it is, for the documentation.
        existing: further places, which get the value only where they have one already.
        kind: what a value must be: 'whole' or 'number', 'range' (a number or a list of numbers), 'text' (anything).
        linked: the first place speaks for the option: whoever sets it sets the others too, unless these are set as late.
        idle: a value that means nothing where there is no place, besides None.
    """

    places: tuple[str, ...]
    help: str
    existing: tuple[str, ...] = ()
    kind: str = "text"
    linked: bool = False
    idle: object = None


_TRAIN, _BANK, _QUERY = "train_dataloader.dataset", "val_dataloader.dataset.bank", "val_dataloader.dataset.query"
_VAL = "val_dataloader.dataset"

#: Name -> option, of all short options of pretraining and fine-tuning; the page of config keys lists them.
SHORT_OPTIONS: dict[str, ShortOption] = {
    "data_root": ShortOption((f"{_TRAIN}.data_root",), "the training images: a folder, shards, Parquet, an address"),
    "list_file": ShortOption((f"{_TRAIN}.list_file",), "text file naming the training images, one a line"),
    "limit": ShortOption((f"{_TRAIN}.limit",), "maximum number of training images", kind="whole"),
    "val_train_root": ShortOption((f"{_BANK}.data_root",), "labelled images, one folder a class: the k-NN's memory"),
    "val_test_root": ShortOption((f"{_QUERY}.data_root",), "labelled images that the k-NN must classify"),
    "image_size": ShortOption(
        ("model.image_size", f"{_TRAIN}.image_size", f"{_BANK}.image_size", f"{_QUERY}.image_size"),
        "side in pixels, or [height,width]",
        existing=(f"{_VAL}.image_size",),
        linked=True,
    ),
    "val_root": ShortOption((), "labelled images that a classifier is validated on", (f"{_VAL}.data_root",)),
    "label_fraction": ShortOption((f"{_TRAIN}.label_fraction",), "share of the labels that is used, in (0, 1]", kind="number"),
    "num_classes": ShortOption(("model.num_classes",), "number of classes of a classifier", kind="whole"),
    "backbone": ShortOption(("model.classifier.backbone",), "file, export or work folder that a classifier starts from"),
    "value_range": ShortOption(
        (f"{_TRAIN}.value_range", f"{_BANK}.value_range", f"{_QUERY}.value_range"),
        "[low,high], the values of black and white in images of more than 8 bits",
        existing=(f"{_VAL}.value_range",),
    ),
    "in_chans": ShortOption(
        (
            "model.student.in_chans",
            "model.classifier.in_chans",
            *(f"{place}.in_chans" for place in (_TRAIN, _BANK, _QUERY)),
        ),
        "channels of the images; of others than RGB all are read, see docs/howto/many_channels.md",
        existing=("model.in_chans", f"{_VAL}.in_chans"),
        kind="whole",
    ),
    "teacher_channels": ShortOption(
        ("model.teacher_channels",), "the channels that a teacher sees, in its order, e.g. [2,1,0]; a single one is repeated"
    ),
    "student": ShortOption(("model.student.encoder", "model.classifier.name"), "name of the student's network"),
    "teacher": ShortOption(("model.teacher.name",), "timm name of the teacher"),
    "teacher_checkpoint": ShortOption(("model.teacher.checkpoint",), "weight file of the teacher"),
    "teacher_features": ShortOption(
        ("custom_hooks.TeacherCacheHook.folder",), "folder that keeps the teacher's features; None: they are not kept"
    ),
    "mask_ratio": ShortOption(
        ("model.mask.mask_ratio",),
        "share of hidden cells, in [0, 1), or [low,high]: a share drawn for each image",
        ("model.mask_ratio",),
        kind="range",
    ),
    "unmasked_share": ShortOption(
        ("model.mask.unmasked_share",), "share of the steps, the last ones, in which nothing is hidden", kind="number"
    ),
    "masks_per_image": ShortOption(
        ("model.masks_per_image",), "masks of each image in a step, which share the teacher's pass", kind="whole"
    ),
    "epochs": ShortOption(
        ("train_cfg.max_epochs", "param_scheduler.main.end"),
        "passes over the training images; a warm-up that is not shorter becomes a tenth of them",
        existing=("param_scheduler.only.end", "param_scheduler.decay.end"),
        kind="whole",
        linked=True,
    ),
    "warmup_epochs": ShortOption(
        ("param_scheduler.warmup.end", "param_scheduler.main.begin"),
        "epochs of rising learning rate; 0 = none",
        kind="number",
        linked=True,
        idle=0,
    ),
    "batch_size": ShortOption(("train_dataloader.batch_size",), "images a step and process", kind="whole"),
    "lr": ShortOption(("optim_wrapper.optimizer.lr",), "learning rate for the base batch size of the schedule", kind="number"),
    "workers": ShortOption(
        ("train_dataloader.num_workers", "val_dataloader.num_workers"),
        "processes that read images; 0 = none extra",
        kind="whole",
    ),
    "seed": ShortOption(("randomness.seed",), "of everything random", kind="whole"),
}


def apply_short_options(cfg: Config, typed: Mapping[str, Any] | None = None) -> list[str]:
    """Write the short options of ``cfg`` (see ``SHORT_OPTIONS``) into their places, in place; None means "not given".

    What was set last wins, be it the option or its place: a file over those that it is based on (of a config from
    :func:`read_config`), the command line over all. Afterwards option and places agree; an option whose places differ is None.
    Without ``val_train_root`` and ``val_test_root``, or without ``val_root``, a config that has these keys is trained without
    validation. ``warmup_epochs=0`` removes the warm-up from the schedule, ``teacher_features=None`` the store.

    Args:
        typed: overrides of the command line, short options or dotted paths -> values; merged into ``cfg`` first.

    Returns:
        Sentences about what was changed unasked, for the user.

    Raises:
        ValueError: an entry of a list of parts that is no part, an option that has no place in this config, that is no number
            where one is expected, or that one level sets to something else than its place; only one of the validation folders,
            or a warm-up that is negative or not shorter than the training.
    """
    levels = Levels(cfg, typed)
    check_parts(cfg)
    given = {name: _settle(cfg, levels, name, option) for name, option in SHORT_OPTIONS.items() if name in cfg}
    _drop_feature_store(cfg)
    _drop_objectives(cfg)
    _drop_validation(cfg)
    return _settle_warmup(cfg, given.get("epochs"), given.get("warmup_epochs"))


def _settle(cfg: Config, levels: Levels, name: str, option: ShortOption) -> Level:
    """Bring an option and its places into agreement, in place.

    Returns:
        Who set the value that holds.
    """
    value, level = cfg[name], levels.setter((name,), cfg[name])
    places = _places_of(cfg, option)
    path, found = places.get(option.places[0], ((), None)) if option.linked else ((), None)
    led = found is not MISSING and found is not None and levels.setter(path, found).after(level)
    if led:
        value, level = found, levels.setter(path, found)
    _check_kind(name, value, option.kind)
    if value not in (None, option.idle) and not places and not _replaced(cfg, levels, option, level):
        wanted = " or ".join((*option.places, *option.existing))
        raise InvalidValueError(
            "option-without-place", f"{name}={value!r} has no place in this config, which has no {wanted}; leave it out"
        )
    for path, found in places.values():
        _check_kind(".".join(path), found, option.kind)
        if found is MISSING or same(found, value):
            if value is not None:
                _write(cfg, path, value)
            continue
        by = levels.setter(path, found)
        if level.after(by) or (found is None and not by.after(level)):
            _write(cfg, path, value)
        elif not by.after(level) and value is not None and not led:  # of two places either may have a value of its own
            raise InvalidValueError("option-disagrees", _disagreement(name, value, level, ".".join(path), found, by))
    held = [found for _, found in _places_of(cfg, option).values() if found is not MISSING]
    if held:
        cfg[name] = held[0] if all(same(held[0], other) for other in held) else None
    elif not places and value != option.idle:
        cfg[name] = None
    return level


def _disagreement(name: str, value: object, level: Level, place: str, found: object, by: Level) -> str:
    """Two settings of one thing, neither of which is later."""
    if level is by:
        return (
            f"{name}={value!r} and {place}={found!r} are one setting under two names, and {level.name} gives both; take one of "
            "them out"
        )
    return (
        f"{name}={value!r} ({level.name}) and {place}={found!r} ({by.name}) are one setting under two names, and neither file "
        f"is based on the other; set {name} in the config that is based on both, or on the command line"
    )


def _places_of(cfg: Config, option: ShortOption) -> dict[str, tuple[tuple[str, ...], Any]]:
    """The places of an option that this config has: as they are called -> path with indices, and value or MISSING."""
    found: dict[str, tuple[tuple[str, ...], Any]] = {}
    for place in (*option.places, *option.existing):
        located = _locate(cfg, place)
        if located is None:
            continue
        path, parent = located
        present = isinstance(parent, Mapping) and path[-1] in parent
        if present or place in option.places:
            found[place] = path, parent[path[-1]] if present else MISSING
    return found


def _locate(cfg: Config, place: str) -> tuple[tuple[str, ...], Any] | None:
    """The path of a place with indices of lists, and the dict that holds its last step; None when there is none."""
    *steps, last = place.split(".")
    node = cfg
    path: list[str] = []
    for step in steps:
        if isinstance(node, (list, tuple)):
            index = _index(node, step)
            node, step = (None, step) if index is None else (node[index], str(index))
        else:
            node = node.get(step) if isinstance(node, (Mapping, Config)) else None
        path.append(step)
    return ((*path, last), node) if isinstance(node, Mapping) else None


def _index(entries: Sequence[Any], step: str) -> int | None:
    """The entry of a list that a step means: by its number, by its part in a schedule, or by its ``type``."""
    if step.isdigit():
        return int(step) if int(step) < len(entries) else None
    if step == "decay":
        return next((i for i, entry in enumerate(entries) if entry.get("param_name") == "weight_decay"), None)
    warmup, main = rate_entries(entries)
    if step in ("warmup", "main", "only"):
        return {"warmup": warmup, "main": None if warmup is None else main, "only": main if warmup is None else None}[step]
    return next((i for i, entry in enumerate(entries) if isinstance(entry, Mapping) and entry.get("type") == step), None)


def _write(cfg: Config, path: Sequence[str], value: object) -> None:
    node = cfg
    for step in path[:-1]:
        node = node[int(step)] if isinstance(node, (list, tuple)) else node[step]
    if value is None:
        node.pop(path[-1], None)  # what is not given has the default of its class
    else:
        node[path[-1]] = value


def _replaced(cfg: Config, levels: Levels, option: ShortOption, level: Level) -> bool:
    """Whether a later level has put a list, or nothing, where the places of this option were."""
    heads = {place.partition(".")[0] for place in (*option.places, *option.existing)}
    return any(
        levels.setter((head,), cfg[head]).after(level) for head in heads if head in cfg and not isinstance(cfg[head], Mapping)
    )


def _check_kind(name: str, value: Any, kind: str) -> None:
    """Refuse what is no number where one is expected; its range is checked by whoever takes it."""
    if value is None or value is MISSING or kind == "text":
        return
    if kind == "range" and isinstance(value, (list, tuple)):
        for part in value:
            _check_kind(name, part, "number")
        return
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and (kind in ("number", "range") or float(value).is_integer()):
        return
    hint = ""
    if isinstance(value, str) and value.endswith("%"):
        share = option_value(name, value[:-1])
        hint = f"; write {name}={share / 100:g}" if isinstance(share, (int, float)) else ""
    raise InvalidValueError(
        "option-not-a-number", f"{name}={value!r}: expected a {'whole number' if kind == 'whole' else 'number'}{hint}"
    )


def _drop_feature_store(cfg: Config) -> None:
    """Without a folder for the teacher's features there is no store."""
    if "teacher_features" not in cfg or cfg.teacher_features is not None or not cfg.get("custom_hooks"):
        return
    cfg.custom_hooks = [
        hook
        for hook in cfg.custom_hooks
        if not isinstance(hook, Mapping) or hook.get("type") != "TeacherCacheHook" or hook.get("folder") is not None
    ]


def _drop_objectives(cfg: Config) -> None:
    """Take out the objectives that are set to None, as mmengine does with default hooks."""
    model = cfg.get("model")
    objectives = model.get("objectives") if isinstance(model, Mapping) else None
    if isinstance(objectives, Mapping) and None in objectives.values():
        model["objectives"] = {name: objective for name, objective in objectives.items() if objective is not None}


def check_parts(cfg: Config) -> None:
    """Refuse what stands for a list of parts and is none, and entries that are no parts; None takes away a part by its name,
    and none of a list.

    Raises:
        ValueError: names the first of them.
    """
    for key in ("custom_hooks", "param_scheduler"):
        entries = cfg.get(key)
        if isinstance(entries, (str, int, float)):
            kind = repr(entries) if isinstance(entries, str) else "..."
            raise InvalidValueError(
                "parts-not-a-list",
                f'{key}={entries!r} is no list of parts; write "{key}=[dict(type={kind})]", or [] for none',
            )
        for place, entry in enumerate(entries if isinstance(entries, (list, tuple)) else ()):
            if entry is None or isinstance(entry, (str, int, float, list, tuple)):
                raise InvalidValueError(
                    "list-entry-no-part",
                    f"{key}.{place}={entry!r} is no part: an entry is dict(type=..., ...). To leave one out, write a config "
                    f"whose {key} is a list of the others",
                )


def _drop_validation(cfg: Config) -> None:
    if "val_root" in cfg and cfg.val_root is None:
        cfg.update(dict(val_dataloader=None, val_cfg=None, val_evaluator=None))
    names = ("val_train_root", "val_test_root")
    if not any(name in cfg for name in names):
        return
    given = [name for name in names if cfg.get(name) is not None]
    if len(given) == 1:
        raise InvalidValueError(
            "validation-half-set",
            f"{given[0]} is set without {names[1 - names.index(given[0])]}; validation needs both, or neither",
        )
    if not given:
        for key in ("val_dataloader", "val_cfg", "val_evaluator"):
            cfg[key] = None


def _settle_warmup(cfg: Config, epochs: Level | None, warmup: Level | None) -> list[str]:
    """Take out a warm-up of 0, and shorten one that the training has been made too short for.

    Args:
        epochs, warmup: who set them.
    """
    schedule = cfg.get("param_scheduler")
    first, second = rate_entries(schedule)
    if first is None or second is None or warmup is None:
        return []
    warm, main = schedule[first], schedule[second]
    length, total = warm.get("end"), main.get("end", float("inf"))
    if length is not None and length < 0:  # the main schedule would start in its middle
        raise InvalidValueError(
            "warmup-negative", f"warmup_epochs={length} is negative; set warmup_epochs=0 (no warm-up), or a number above it"
        )
    if length is not None and length > 0 and main.get("begin", 0) >= total:
        if epochs is None or not epochs.after(warmup):
            raise InvalidValueError(
                "warmup-too-long",
                f"warmup_epochs={length} is not shorter than epochs={total}; set warmup_epochs=0 "
                "(no warm-up), or another number below it",
            )
        shorter = shorter_warmup(total, whole=not (warm.get("convert_to_iter_based") and main.get("convert_to_iter_based")))
        warm["end"] = main["begin"] = cfg.warmup_epochs = shorter
        remark = f"the warm-up of {length:g} epochs is not shorter than epochs={total:g}: it takes {shorter:g} now"
        remarks = [f"{remark} (warmup_epochs=... sets it)"]
    else:
        remarks = []
    if warm.get("end") == 0:
        cfg.param_scheduler = [entry for i, entry in enumerate(schedule) if i != first]
    return remarks


def amp_dtype() -> torch.dtype:
    """What ``--amp`` computes in: bfloat16 where the device has it, else float16; GPUs before Ampere only emulate bfloat16."""
    emulates = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.float16 if emulates else torch.bfloat16


def use_mixed_precision(cfg: Config) -> None:
    """Switch the optimiser wrapper of ``cfg`` to mixed precision, in place.

    bfloat16 where the device computes with it (the CPU and GPUs since Ampere), which needs no loss scaling; on older GPUs
    float16 with dynamic loss scaling.
    """
    wrapper = cfg.optim_wrapper
    kind = wrapper.get("type", "OptimWrapper")
    if kind.removeprefix("hgkd.") not in ("OptimWrapper", "AmpOptimWrapper", "BFloat16OptimWrapper"):
        raise InvalidValueError(
            "amp-wrapper-replaced",
            f"--amp replaces an OptimWrapper, but optim_wrapper.type is {kind!r}; set its precision there",
        )
    if amp_dtype() is torch.float16:
        wrapper.update(type="AmpOptimWrapper", dtype="float16", loss_scale="dynamic")
    else:
        wrapper.pop("dtype", None)
        wrapper.pop("loss_scale", None)
        wrapper["type"] = "hgkd.BFloat16OptimWrapper"  # with the scope, for configs of mmdet and mmseg
