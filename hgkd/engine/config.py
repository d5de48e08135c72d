"""Configs: short options written into their places, and a check that every key is read by somebody.

mmengine silently ignores top-level keys that it does not know. Here a key is read or refused, before anything is built.

A Python config is a program and runs as one. A YAML or JSON config is plain data and is held to it: mmengine 0.10.7 reads YAML
with a loader that runs what the file asks for, and builds whatever importable object a ``type`` names.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from mmengine import registry as roots
from mmengine.config import Config
from mmengine.registry import Registry
from mmengine.runner import Runner

from hgkd.errors import unknown_name_message
from hgkd.registry import DATASETS, HOOKS, METRICS, MODELS, RUNNERS


@dataclass(frozen=True)
class ShortOption:
    """A top-level variable of a config that stands for one or more nested keys.

    Attributes:
        places: dotted paths that get the value; within a list a number is an index, a name the ``type`` of the entry. Those
            whose parent is absent are passed over, but one must be there.
        help: what it is, for the documentation.
        existing: further places, which get the value only where they have one already.
    """

    places: tuple[str, ...]
    help: str
    existing: tuple[str, ...] = ()


_TRAIN, _BANK, _QUERY = "train_dataloader.dataset", "val_dataloader.dataset.bank", "val_dataloader.dataset.query"
_VAL = "val_dataloader.dataset"

SHORT_OPTIONS: dict[str, ShortOption] = {
    "data_root": ShortOption((f"{_TRAIN}.data_root",), "folder of the training images"),
    "list_file": ShortOption((f"{_TRAIN}.list_file",), "text file naming the training images, one a line"),
    "limit": ShortOption((f"{_TRAIN}.limit",), "use only so many training images"),
    "val_train_root": ShortOption((f"{_BANK}.data_root",), "labelled images, one folder a class: the k-NN's memory"),
    "val_test_root": ShortOption((f"{_QUERY}.data_root",), "labelled images that the k-NN must classify"),
    "image_size": ShortOption(
        ("model.image_size", f"{_TRAIN}.image_size", f"{_BANK}.image_size", f"{_QUERY}.image_size"),
        "side in pixels, or [height,width]",
        existing=(f"{_VAL}.image_size",),
    ),
    "val_root": ShortOption((), "labelled images that a classifier is validated on", (f"{_VAL}.data_root",)),
    "label_fraction": ShortOption((f"{_TRAIN}.label_fraction",), "share of the labels that is used, in (0, 1]"),
    "num_classes": ShortOption(("model.num_classes",), "number of classes of a classifier"),
    "backbone": ShortOption(("model.classifier.backbone",), "file, export or work folder that a classifier starts from"),
    "value_range": ShortOption(
        (f"{_TRAIN}.value_range", f"{_BANK}.value_range", f"{_QUERY}.value_range"),
        "[low,high], the values of black and white in images of more than 8 bits",
        existing=(f"{_VAL}.value_range",),
    ),
    "student": ShortOption(("model.student.encoder", "model.classifier.name"), "timm name of the student"),
    "teacher": ShortOption(("model.teacher.name",), "timm name of the teacher"),
    "teacher_checkpoint": ShortOption(("model.teacher.checkpoint",), "weight file of the teacher"),
    "teacher_features": ShortOption(("custom_hooks.TeacherCacheHook.folder",), "folder that keeps the teacher's features"),
    "mask_ratio": ShortOption(("model.mask.mask_ratio",), "share of hidden cells, in [0, 1)", ("model.mask_ratio",)),
    "epochs": ShortOption(("train_cfg.max_epochs", "param_scheduler.1.end"), "passes over the training images"),
    "warmup_epochs": ShortOption(
        ("param_scheduler.0.end", "param_scheduler.1.begin"), "epochs of rising learning rate; 0 = none"
    ),
    "batch_size": ShortOption(("train_dataloader.batch_size",), "images a step and process"),
    "lr": ShortOption(("optim_wrapper.optimizer.lr",), "learning rate for the base batch size of the schedule"),
    "workers": ShortOption(
        ("train_dataloader.num_workers", "val_dataloader.num_workers"),
        "processes that read images; 0 = none extra",
    ),
    "seed": ShortOption(("randomness.seed",), "of everything random"),
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

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or a data file that is no mapping, is damaged, or asks for code.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"config {path} does not exist")
    if path.suffix == ".py":
        return Config.fromfile(str(path))
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


def apply_short_options(cfg: Config) -> None:
    """Write the short options of ``cfg`` (see ``SHORT_OPTIONS``) into their places, in place; None means "not given".

    Without ``val_train_root`` and ``val_test_root``, or without ``val_root``, a config that has these keys is trained without
    validation.
    ``warmup_epochs=0`` removes the warm-up from the schedule.

    Raises:
        ValueError: an option that has no place in this config, only one of the validation folders, or a warm-up that is not
            shorter than the training.
    """
    _drop_validation(cfg)
    for name, option in SHORT_OPTIONS.items():
        value = cfg.get(name)
        if value is None:
            continue
        found = [_set(cfg, place, value) for place in option.places if _parent(cfg, place) is not None]
        found += [_set(cfg, place, value) for place in option.existing if _steps(place)[-1] in (_parent(cfg, place) or ())]
        if not found:
            places = " or ".join((*option.places, *option.existing))
            raise ValueError(f"{name}={value!r} has no place in this config, which has no {places}; leave it out")
    _check_warmup(cfg)


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


def _check_warmup(cfg: Config) -> None:
    schedule = cfg.get("param_scheduler")
    if not isinstance(schedule, list) or len(schedule) != 2 or cfg.get("warmup_epochs") is None:
        return
    warm, main = schedule
    if warm.get("end") == 0:
        cfg.param_scheduler = [main]
    elif main.get("begin", 0) >= main.get("end", float("inf")):
        raise ValueError(
            f"warmup_epochs={warm.get('end')} is not shorter than epochs={main.get('end')}; "
            "set a smaller warmup_epochs (0 = no warm-up)"
        )


def _steps(place: str) -> list[str | int]:
    return [int(step) if step.isdigit() else step for step in place.split(".")]


def _parent(cfg: Config, place: str) -> Any:
    """The dict or list that holds the last step of a place, or None when there is none."""
    node: Any = cfg
    for step in _steps(place)[:-1]:
        if isinstance(step, int):
            node = node[step] if isinstance(node, list) and step < len(node) else None
        elif isinstance(node, list):
            node = next((entry for entry in node if entry.get("type") == step), None)
        else:
            node = node.get(step) if isinstance(node, (Mapping, Config)) else None
    return node


def _set(cfg: Config, place: str, value: Any) -> bool:
    _parent(cfg, place)[_steps(place)[-1]] = value
    return True


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
