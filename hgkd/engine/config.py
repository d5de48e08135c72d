"""Configs: short options written into their places, and a check that every key is read by somebody.

mmengine silently ignores top-level keys that it does not know. Here a key is read or refused, before anything is built.

A Python config is a program and runs as one. A YAML or JSON config is plain data and is held to it: mmengine 0.10.7 reads YAML
with a loader that runs what the file asks for, and builds whatever importable object a ``type`` names.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from mmengine import registry as roots
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import Registry
from mmengine.runner import Runner
from mmengine.utils import get_installed_path

from hgkd.engine.levels import MISSING, Level, Levels, read_levels, same
from hgkd.engine.options import option_value
from hgkd.engine.schedule import rate_entries, shorter_warmup
from hgkd.errors import nearest_names, unknown_name_message
from hgkd.registry import DATASETS, HOOKS, METRICS, MODELS, RUNNERS


@dataclass(frozen=True)
class ShortOption:
    """A top-level variable of a config that stands for one or more nested keys.

    Attributes:
        places: dotted paths that get the value; within a list a number is an index, a name the ``type`` of the entry. Those
            whose parent is absent are passed over, but one must be there.
        help: what it is, for the documentation.
        existing: further places, which get the value only where they have one already.
        kind: what a value must be: 'whole' or 'number', 'text' (anything).
        linked: the first place speaks for the option: whoever sets it sets the others too, unless these are set as late.
        idle: a value that means nothing where there is no place, besides None.
    """

    places: tuple[str, ...]
    help: str
    existing: tuple[str, ...] = ()
    kind: str = "text"
    linked: bool = False
    idle: Any = None


_TRAIN, _BANK, _QUERY = "train_dataloader.dataset", "val_dataloader.dataset.bank", "val_dataloader.dataset.query"
_VAL = "val_dataloader.dataset"

SHORT_OPTIONS: dict[str, ShortOption] = {
    "data_root": ShortOption((f"{_TRAIN}.data_root",), "folder of the training images"),
    "list_file": ShortOption((f"{_TRAIN}.list_file",), "text file naming the training images, one a line"),
    "limit": ShortOption((f"{_TRAIN}.limit",), "use only so many training images", kind="whole"),
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
    "student": ShortOption(("model.student.encoder", "model.classifier.name"), "timm name of the student"),
    "teacher": ShortOption(("model.teacher.name",), "timm name of the teacher"),
    "teacher_checkpoint": ShortOption(("model.teacher.checkpoint",), "weight file of the teacher"),
    "teacher_features": ShortOption(
        ("custom_hooks.TeacherCacheHook.folder",), "folder that keeps the teacher's features; None: they are not kept"
    ),
    "mask_ratio": ShortOption(
        ("model.mask.mask_ratio",), "share of hidden cells, in [0, 1)", ("model.mask_ratio",), kind="number"
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

_RUNNER_KEYS = {name for name in inspect.signature(Runner.__init__).parameters if name not in ("self", "cfg")}
# read by mmengine, but through cfg and not through the runner's arguments
_CFG_KEYS = {
    "activation_checkpointing",
    "custom_imports",
    "efficient_conv_bn_eval",
    "find_unused_parameters",
    "model_wrapper_cfg",
    "runner_type",
    "sync_bn",
}
_REGISTERED = re.compile(r"(?:(?:hgkd|mmengine)\.)?\w+")
_TOP_KEYS = _RUNNER_KEYS | _CFG_KEYS | set(SHORT_OPTIONS)

_TOP_REGISTRIES: dict[str, Registry] = {
    "model": MODELS,
    "data_preprocessor": MODELS,
    "optim_wrapper": roots.OPTIM_WRAPPERS,
    "param_scheduler": roots.PARAM_SCHEDULERS,
    "default_hooks": HOOKS,
    "custom_hooks": HOOKS,
    "train_cfg": roots.LOOPS,
    "val_cfg": roots.LOOPS,
    "test_cfg": roots.LOOPS,
    "val_evaluator": METRICS,
    "test_evaluator": METRICS,
    "visualizer": roots.VISUALIZERS,
    "log_processor": roots.LOG_PROCESSORS,
    "model_wrapper_cfg": roots.MODEL_WRAPPERS,
}
_KEY_REGISTRIES: dict[str, Registry] = {
    "dataset": DATASETS,
    "sampler": roots.DATA_SAMPLERS,
    "batch_sampler": roots.DATA_SAMPLERS,
    "collate_fn": roots.FUNCTIONS,
    "worker_init_fn": roots.FUNCTIONS,
    "optimizer": roots.OPTIMIZERS,
    "vis_backends": roots.VISBACKENDS,
}
# sections without a `type` whose keys mmengine reads by name, ignoring others
_PLAIN_SECTIONS: dict[str, frozenset[str]] = {
    "env_cfg": frozenset({"cudnn_benchmark", "mp_cfg", "dist_cfg", "resource_limit"}),
    "optim_wrapper.paramwise_cfg": frozenset(
        {
            "custom_keys",
            "bias_lr_mult",
            "bias_decay_mult",
            "norm_decay_mult",
            "dwconv_decay_mult",
            "dcn_offset_lr_mult",
            "flat_decay_mult",
            "bypass_duplicate",
            "layer_decay",
            "blocks_per_layer",
        }
    ),
    "auto_scale_lr": frozenset({"enable", "base_batch_size"}),
}


_DATA_SUFFIXES = (".yaml", ".yml", ".json")
_CODE_KEYS = ("_base_", "_scope_", "custom_imports")  # each of them can import or run a file


def read_config(path: str | os.PathLike[str]) -> Config:
    """A config file: a Python program (.py), or plain data from a source that need not be trusted (.yaml, .yml, .json).

    Args:
        path: of the file, or for one that an installed package brings ``mmdet::FOLDER/NAME.py``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or a data file that is no mapping, is damaged, or asks for code.
    """
    path = _packaged(str(path)) if "::" in str(path) else Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"config {path} does not exist")
    if path.suffix == ".py":
        return read_levels(str(path))
    if path.suffix not in _DATA_SUFFIXES:
        raise ValueError(f"config {path} must end in .py, or for plain data in {', '.join(_DATA_SUFFIXES)}")
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"config {path} is no plain {path.suffix[1:]} data: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"config {path} holds a {type(content).__name__}, expected keys and values")
    check_plain_data(content, str(path))
    return Config(content, filename=str(path))


def _packaged(name: str) -> Path:
    """The file behind 'mmdet::FOLDER/NAME.py', a config of an installed package."""
    package, _, inner = name.partition("::")
    known = [key for key in MODULE2PACKAGE if _is_there(key)]
    if package not in known:
        raise FileNotFoundError(
            f"config {name}: no package {package!r} with configs is installed; installed are {', '.join(known) or 'none'} "
            "(pip install -e '.[downstream]' brings mmdet and mmseg)"
        )
    folder = Path(get_installed_path(MODULE2PACKAGE[package])) / ".mim/configs"
    if (folder / inner).is_file():
        return folder / inner
    files = {str(file.relative_to(folder)): file for file in folder.rglob("*.py")}
    near = [path for path in files if Path(path).name in (inner, f"{inner}.py")] or nearest_names(f"{inner}", files)
    hint = f"; did you mean {' or '.join(f'{package}::{path}' for path in near)}?" if near else ""
    raise FileNotFoundError(f"config {name} does not exist in {folder}{hint}")


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def check_plain_data(content: Any, where: str) -> None:
    """Refuse a config from an untrusted source that could import or run anything but what hgkd and mmengine register.

    Args:
        where: name of the source, for the message.

    Raises:
        ValueError: names the key.
    """
    for key, value in content.items() if isinstance(content, Mapping) else enumerate(content):
        if key in _CODE_KEYS:
            raise ValueError(f"{where}: {key!r} can run code, which a config of plain data must not; write a Python config")
        names = key in ("type", "constructor", "runner_type", "default_scope")
        if names and not (isinstance(value, str) and _REGISTERED.fullmatch(value)):
            raise ValueError(
                f"{where}: {key}={value!r} is no name of a registry; a config of plain data takes registered classes only, "
                "not import paths; write a Python config"
            )
        if isinstance(value, (Mapping, list, tuple)):
            check_plain_data(value, where)


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
        ValueError: an option that has no place in this config, that is no number where one is expected, or that one level
            sets to something else than its place; only one of the validation folders, or a warm-up that is not shorter than
            the training.
    """
    levels = Levels(cfg, typed)
    given = {name: _settle(cfg, levels, name, option) for name, option in SHORT_OPTIONS.items() if name in cfg}
    _drop_feature_store(cfg)
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
        raise ValueError(f"{name}={value!r} has no place in this config, which has no {wanted}; leave it out")
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
            raise ValueError(_disagreement(name, value, level, ".".join(path), found, by))
    held = [found for _, found in _places_of(cfg, option).values() if found is not MISSING]
    if held:
        cfg[name] = held[0] if all(same(held[0], other) for other in held) else None
    elif not places and value != option.idle:
        cfg[name] = None
    return level


def _disagreement(name: str, value: Any, level: Level, place: str, found: Any, by: Level) -> str:
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
    node: Any = cfg
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


def _write(cfg: Config, path: Sequence[str], value: Any) -> None:
    node: Any = cfg
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
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and (kind == "number" or float(value).is_integer()):
        return
    hint = ""
    if isinstance(value, str) and value.endswith("%"):
        share = option_value(name, value[:-1])
        hint = f"; write {name}={share / 100:g}" if isinstance(share, (int, float)) else ""
    raise ValueError(f"{name}={value!r}: expected a {'whole number' if kind == 'whole' else 'number'}{hint}")


def _drop_feature_store(cfg: Config) -> None:
    """Without a folder for the teacher's features there is no store."""
    if "teacher_features" not in cfg or cfg.teacher_features is not None or not cfg.get("custom_hooks"):
        return
    cfg.custom_hooks = [
        hook for hook in cfg.custom_hooks if hook.get("type") != "TeacherCacheHook" or hook.get("folder") is not None
    ]


def _drop_validation(cfg: Config) -> None:
    if "val_root" in cfg and cfg.val_root is None:
        cfg.update(dict(val_dataloader=None, val_cfg=None, val_evaluator=None))
    names = ("val_train_root", "val_test_root")
    if not any(name in cfg for name in names):
        return
    given = [name for name in names if cfg.get(name) is not None]
    if len(given) == 1:
        raise ValueError(f"{given[0]} is set without {names[1 - names.index(given[0])]}; validation needs both, or neither")
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
    if length is not None and length > 0 and main.get("begin", 0) >= total:
        if epochs is None or not epochs.after(warmup):
            raise ValueError(
                f"warmup_epochs={length} is not shorter than epochs={total}; set a smaller warmup_epochs (0 = no warm-up)"
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


def use_mixed_precision(cfg: Config) -> None:
    """Switch the optimiser wrapper of ``cfg`` to mixed precision, in place.

    bfloat16 where the device computes with it (the CPU and GPUs since Ampere), which needs no loss scaling; on older GPUs
    float16 with dynamic loss scaling.
    """
    wrapper = cfg.optim_wrapper
    kind = wrapper.get("type", "OptimWrapper")
    if kind.removeprefix("hgkd.") not in ("OptimWrapper", "AmpOptimWrapper", "BFloat16OptimWrapper"):
        raise ValueError(f"--amp replaces an OptimWrapper, but optim_wrapper.type is {kind!r}; set its precision there")
    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        wrapper.update(type="AmpOptimWrapper", dtype="float16", loss_scale="dynamic")
    else:
        wrapper.pop("dtype", None)
        wrapper.pop("loss_scale", None)
        wrapper["type"] = "hgkd.BFloat16OptimWrapper"  # with the scope, for configs of mmdet and mmseg


def check_config(cfg: Config | Mapping[str, Any]) -> None:
    """Refuse keys that nobody reads, types that nobody registered, and required options that are absent.

    Top-level keys are those of mmengine's runner and our short options. Below, every dict with a ``type`` that names a class
    of hgkd is compared with that class's arguments, recursively; other classes check theirs when they are built.

    Raises:
        ValueError: names the path of the key, its value and the nearest known names.
    """
    plain = cfg.to_dict() if isinstance(cfg, Config) else dict(cfg)
    for key, value in plain.items():
        if key not in _TOP_KEYS:
            raise ValueError(f"{key}={_short(value)}: {unknown_name_message('top-level config key', key, _TOP_KEYS)}")
    runner = plain.get("runner_type")
    if isinstance(runner, str):
        _find(RUNNERS, runner, "runner_type")
    for path, known in _PLAIN_SECTIONS.items():
        _check_plain(plain, path, known)
    for key, value in plain.items():
        _check(value, key, _TOP_REGISTRIES.get(key))


def _check(value: Any, path: str, registry: Registry | None) -> None:
    if isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _check(item, f"{path}.{i}", registry)
        return
    if not isinstance(value, Mapping):
        return
    # without a registry nobody builds from this dict, whatever its keys are called
    if "type" in value and registry is not None:
        kind = value["type"]
        cls = _find(registry, kind, f"{path}.type") if isinstance(kind, str) else kind
        if getattr(cls, "__module__", "").startswith("hgkd."):
            _check_arguments(cls, value, path, registry)
    for key, item in value.items():
        _check(item, f"{path}.{key}", _KEY_REGISTRIES.get(key, registry))


def _check_arguments(cls: Any, value: Mapping[str, Any], path: str, registry: Registry) -> None:
    accepted = _accepted(cls, registry)
    extra = {"type", "_scope_"}
    if registry is HOOKS:
        extra.add("priority")
    if registry is roots.OPTIM_WRAPPERS:
        extra |= {"constructor", "paramwise_cfg"}
    if path.startswith("model.objectives."):
        extra.add("weight")
    if accepted is not None:
        for key, item in value.items():
            if key not in accepted and key not in extra:
                message = unknown_name_message(f"option of {cls.__name__}", key, sorted(accepted))
                raise ValueError(f"{path}.{key}={_short(item)}: {message}")
    given = {*value, "dataset"} if registry is roots.DATA_SAMPLERS else value  # a sampler gets its data set from the runner
    for name in _required(cls):
        if name not in given:
            place = f"{path}.{name}"
            short = [option for option, entry in SHORT_OPTIONS.items() if place in (*entry.places, *entry.existing)]
            how = f"--cfg-options {short[0]}=..." if short else f"{place} in the config"
            raise ValueError(f"{place} is missing: {cls.__name__} needs it; set {how}")


def _check_plain(plain: Mapping[str, Any], path: str, known: frozenset[str]) -> None:
    section: Any = plain
    for step in path.split("."):
        section = section.get(step) if isinstance(section, Mapping) else None
    for key, value in section.items() if isinstance(section, Mapping) else ():
        if key not in known:
            raise ValueError(f"{path}.{key}={_short(value)}: {unknown_name_message(f'key of {path}', key, known)}")


def _chain(registry: Registry) -> Iterator[Registry]:
    """A registry of hgkd (or the child of a root that belongs to it), then its parents, all imported."""
    node: Registry | None = registry.children.get("hgkd", registry) if registry.parent is None else registry
    while node is not None:
        node.import_from_location()
        yield node
        node = node.parent


def _find(registry: Registry, name: str, path: str) -> Any:
    """The class registered as ``name``."""
    if "." in name:  # 'scope.Name' or a dotted import path
        found = registry.get(name)
        if found is not None:
            return found
    known: dict[str, Any] = {}
    for node in _chain(registry):
        for key, cls in node.module_dict.items():
            known.setdefault(key, cls)
    if name not in known:
        raise ValueError(f"{path}={name!r}: {unknown_name_message(registry.name, name, known)}")
    return known[name]


def _parameters(cls: Any) -> Mapping[str, inspect.Parameter]:
    parameters = dict(inspect.signature(cls.__init__ if inspect.isclass(cls) else cls).parameters)
    if inspect.isclass(cls):
        parameters.pop(next(iter(parameters)), None)  # self
    return parameters


def _accepted(cls: Any, registry: Registry) -> set[str] | None:
    """Names that the constructor takes; None: any name, because it hands ``**kwargs`` on to something unknown.

    A metric hands them to its base class, which is known.
    """
    names: set[str] = set()
    bases = [base for base in cls.__mro__ if "__init__" in vars(base)] if inspect.isclass(cls) else [cls]
    for base in bases if registry is METRICS else bases[:1]:
        parameters = _parameters(base)
        names |= {n for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return names
    return None


def _required(cls: Any) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [n for n, p in _parameters(cls).items() if p.default is p.empty and p.kind in kinds]


def _short(value: Any, length: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."
