"""Configs of mmdet and mmsegmentation on hgkd's launcher: short options written into their places, and what they must not say.

The configs stay OpenMMLab's own: inherited keys that nobody reads are theirs. What a user overrides is held to more: a key that
the config does not have is refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine import registry as roots
from mmengine.config import Config, ConfigDict

from hgkd.engine.hooks import UNREADABLE
from hgkd.errors import unknown_name_message

SCOPES = ("mmdet", "mmseg")
LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
SHORT_OPTIONS = {
    "data_root": "folder of the data set",
    "backbone": "weights of the backbone: a folder of tools/export.py, or a file",
    "teacher_checkpoint": "weights of the teacher (distillation of detectors and segmentors)",
    "epochs": "epochs of the config, which repeat the images three times each in 3x recipes; the schedule is stretched to them",
    "iterations": "training steps of a config that counts steps; the schedule is stretched to them",
    "batch_size": "training images a step and process",
    "lr": "learning rate",
    "workers": "processes that read images; 0 = none extra",
    "seed": "of everything random",
}


def is_downstream(cfg: Config) -> bool:
    """Whether a config is one of mmdet or mmsegmentation."""
    return cfg.get("default_scope") in SCOPES


def merge_options(cfg: Config, options: Mapping[str, Any]) -> None:
    """Override keys of a downstream config in place: short options, and dotted paths.

    The first part of a path must be there. A later one may be new, as many settings have defaults, unless it looks like a
    misspelling of one that is there.

    Raises:
        ValueError: an unknown or misspelt key, or a short option that has no place in the config.
    """
    short = {key: value for key, value in options.items() if key in SHORT_OPTIONS}
    for key in options:
        head = key.partition(".")[0]
        if key not in short and head not in cfg:
            raise ValueError(
                f"{key}={options[key]!r}: {unknown_name_message('config key', head, [*cfg.keys(), *SHORT_OPTIONS])}"
            )
        if key not in short:
            _check_spelling(cfg, key)
    cfg.merge_from_dict({key: value for key, value in options.items() if key not in short})
    for key, value in short.items():
        if value is not None:
            _PLACES[key](cfg, value)


def _check_spelling(cfg: Config, path: str) -> None:
    """Refuse a part of a dotted path that is not there, where one that is nearly the same is."""
    head, *parts = path.split(".")
    level: Any = cfg[head]
    for part in parts:
        if isinstance(level, (list, tuple)) and part.isdigit() and int(part) < len(level):
            level = level[int(part)]
        elif isinstance(level, Mapping) and part not in level:
            near = difflib.get_close_matches(part, map(str, level), n=1, cutoff=0.8)
            if near:
                raise ValueError(
                    f"{path}: there is no {part!r} there, but {near[0]!r}; correct it, or write it into a config file if a new "
                    "key is meant"
                )
            return
        elif isinstance(level, Mapping):
            level = level[part]
        else:
            return


def _set_data_root(cfg: Config, value: str) -> None:
    root, old = str(Path(value).expanduser()), str(cfg.get("data_root", ""))
    cfg.data_root = root
    for dataset in datasets_of(cfg):
        dataset["data_root"] = root
    for evaluator in _dicts(cfg.get("val_evaluator"), cfg.get("test_evaluator")):
        file = evaluator.get("ann_file")
        if file and old and str(file).startswith(old):
            evaluator["ann_file"] = str(Path(root) / str(file)[len(old) :].lstrip("/"))


def _set_backbone(cfg: Config, value: str) -> None:
    cfg.backbone = str(value)


def _set_teacher(cfg: Config, value: str) -> None:
    if "teacher_checkpoint" not in cfg.model:
        raise ValueError(f"teacher_checkpoint={value}: this config trains without a teacher; use one of downstream/*/mgd_*.py")
    cfg.model.teacher_checkpoint = str(Path(value).expanduser())


def _set_epochs(cfg: Config, value: int) -> None:
    _stretch(cfg, "max_epochs", "epochs", int(value))


def _set_iterations(cfg: Config, value: int) -> None:
    _stretch(cfg, "max_iters", "iterations", int(value))


def _stretch(cfg: Config, key: str, option: str, value: int) -> None:
    if key not in cfg.train_cfg:
        other = "iterations" if option == "epochs" else "epochs"
        raise ValueError(f"{option}={value} has no place in this config, which counts {other}; set {other}")
    if value < 1:
        raise ValueError(f"{option} must be 1 or more, got {value}")
    old = int(cfg.train_cfg[key])
    for part in cfg.get("param_scheduler") or []:
        if bool(part.get("by_epoch", True)) != (key == "max_epochs"):
            continue  # a warm-up in steps stays as long as it is
        for name in ("begin", "end", "T_max"):
            if name in part:
                part[name] = round(part[name] * value / old)
        if "end" in part:
            part["end"] = max(part["end"], part.get("begin", 0) + 1)
        if "milestones" in part:
            part["milestones"] = [round(step * value / old) for step in part["milestones"]]
    cfg.train_cfg[key] = value
    cfg.train_cfg["val_interval"] = min(cfg.train_cfg.get("val_interval", 1), value)
    hook = cfg.default_hooks.checkpoint
    hook["interval"] = min(hook.get("interval", 1), value)


def _set_batch_size(cfg: Config, value: int) -> None:
    cfg.train_dataloader.batch_size = int(value)


def _set_lr(cfg: Config, value: float) -> None:
    cfg.optim_wrapper.optimizer.lr = float(value)


def _set_workers(cfg: Config, value: int) -> None:
    for name in LOADERS:
        if cfg.get(name):
            cfg[name].num_workers = int(value)
            cfg[name].persistent_workers = int(value) > 0


def _set_seed(cfg: Config, value: int) -> None:
    cfg.randomness = {**(cfg.get("randomness") or {}), "seed": int(value)}


_PLACES: dict[str, Callable[[Config, Any], None]] = {
    "data_root": _set_data_root,
    "backbone": _set_backbone,
    "teacher_checkpoint": _set_teacher,
    "epochs": _set_epochs,
    "iterations": _set_iterations,
    "batch_size": _set_batch_size,
    "lr": _set_lr,
    "workers": _set_workers,
    "seed": _set_seed,
}


def datasets_of(cfg: Mapping[str, Any], loaders: Sequence[str] = LOADERS) -> Iterator[dict[str, Any]]:
    """The data sets that read files, inside wrappers such as ``RepeatDataset`` too."""
    waiting = [cfg[name]["dataset"] for name in loaders if cfg.get(name)]
    while waiting:
        dataset = waiting.pop(0)
        inner = dataset.get("datasets") or ([dataset["dataset"]] if "dataset" in dataset else [])
        waiting += inner
        if not inner:
            yield dataset


def dataset_class(dataset: Mapping[str, Any], scope: str) -> Any:
    """The class of a data set's config, in the registry of mmdet or mmseg."""
    with roots.DATASETS.switch_scope_and_registry(scope) as registry:
        found = registry.get(dataset["type"])
    if found is None:
        raise ValueError(f"{scope} has no data set {dataset['type']!r}")
    return found


def _dicts(*parts: Any) -> Iterator[dict[str, Any]]:
    for part in parts:
        if isinstance(part, Mapping):
            yield part  # type: ignore[misc]
        elif part:
            yield from part


def read_with_care(cfg: Config, work_dir: str) -> None:
    """Let all images be read by ``hgkd.LoadReadableImage``, in place.

    Training images that it refuses are left out, their names go into ``work_dir``; one of validation or test ends the run.
    """
    report = str(Path(work_dir) / UNREADABLE)
    for loader in LOADERS:
        for dataset in datasets_of(cfg, [loader]):
            load_with_care(dataset.get("pipeline") or [], {"report": report} if loader == LOADERS[0] else {"required": True})
    if cfg.get(LOADERS[0]):
        cfg.custom_hooks = [*(cfg.get("custom_hooks") or []), {"type": "hgkd.UnreadableImagesHook"}]


def load_with_care(pipeline: Sequence[Any], options: Mapping[str, Any]) -> None:
    """Replace ``LoadImageFromFile`` by ``hgkd.LoadReadableImage`` with these options more, in place."""
    for step in pipeline:
        if step["type"] == "LoadImageFromFile":
            step.update(type="hgkd.LoadReadableImage", **options)


def drop_teacher(cfg: Config) -> None:
    """Make the config of a distillation that of its student alone, in place; others stay as they are."""
    if "student" in cfg.model:
        cfg.model = model_config(cfg.model.student)


def model_config(source: str | Mapping[str, Any]) -> ConfigDict:
    """The config of a model: given as it is, or that of a config file (a path, or 'mmdet::...' and 'mmseg::...').

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file describes no model.
    """
    if isinstance(source, Mapping):
        return ConfigDict(source)
    if "::" in source:
        # not mmengine.hub.get_config, which runs pip where it finds no package
        cfg = Config.fromstring(f"_base_ = {source!r}", ".py")
    else:
        if not Path(source).is_file():
            raise FileNotFoundError(
                f"model config {source} does not exist; give a path, or one like 'mmdet::retinanet/NAME.py'"
            )
        cfg = Config.fromfile(source)
    if "model" not in cfg:
        raise ValueError(f"{source} has no 'model'")
    return ConfigDict(cfg.model)


def drop_downloads(model: Any, path: str = "model") -> list[str]:
    """Remove pretrained weights that would be fetched from the internet from a model's config, in place.

    Returns:
        A line for the log for each.
    """
    if isinstance(model, (list, tuple)):
        return [line for index, item in enumerate(model) for line in drop_downloads(item, f"{path}.{index}")]
    dropped: list[str] = []
    if not isinstance(model, dict):
        return dropped
    for key, value in model.items():
        file = (
            value.get("checkpoint")
            if key == "init_cfg" and isinstance(value, Mapping)
            else value
            if key == "pretrained"
            else None
        )
        if isinstance(file, str) and "://" in file:
            model[key] = None
            dropped.append(f"{path}.{key}: {file} is not downloaded; backbone=FILE loads local weights")
        else:
            dropped += drop_downloads(value, f"{path}.{key}")
    return dropped
