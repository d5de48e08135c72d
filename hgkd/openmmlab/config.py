"""Configs of mmdet and mmsegmentation on hgkd's launcher: short options written into their places, and what they must not say.

The configs stay OpenMMLab's own: inherited keys that nobody reads are theirs. What a user overrides is held to more: a key that
the config does not have is refused.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, cast

from mmengine import registry as roots
from mmengine.config import Config, ConfigDict

from hgkd.config.levels import check_list_paths, level_of, same
from hgkd.config.short_options import check_parts
from hgkd.data.pixels import as_value_range
from hgkd.errors import InvalidValueError, MissingFileError, unknown_name_message
from hgkd.openmmlab.heads import class_heads, pixel_heads
from hgkd.openmmlab.measures import evaluators_of, type_name
from hgkd.training.hooks.progress import UNREADABLE

SCOPES = ("mmdet", "mmseg")
PACKAGED = "/.mim/configs/"  # where an installed package keeps its configs
LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
# names by which config files build their parts themselves, or that hgkd reads as they are
_VARIABLES = ("backbone", "classes", "ignored_label")
# epochs that mmdet's hooks count: when the mosaics end, or how many epochs are without them
_SWITCHES = {"PipelineSwitchHook": "switch_epoch", "YOLOXModeSwitchHook": "num_last_epochs"}
SHORT_OPTIONS = {
    "data_root": "folder of the data set",
    "classes": "[names] of the data set's classes, in the order of its labels; the heads are made to fit",
    "ignored_label": "value of a label map that means 'not labelled' (segmentors)",
    "backbone": "weights of the backbone: a folder of hgkd export, or a file",
    "teacher_checkpoint": "weights of the teacher (distillation of detectors and segmentors)",
    "epochs": "epochs of the config, which repeat the images three times each in 3x recipes; the schedule is stretched to them",
    "iterations": "training steps of a config that counts steps; the schedule is stretched to them",
    "batch_size": "training images a step and process",
    "lr": "learning rate",
    "value_range": "[low,high], the values of black and white in images of more than 8 bits",
    "workers": "processes that read images; 0 = none extra",
    "seed": "of everything random",
}
_READ = {
    # by mmengine's Runner
    *("model", "work_dir", "train_dataloader", "val_dataloader", "test_dataloader", "train_cfg", "val_cfg", "test_cfg"),
    *("auto_scale_lr", "optim_wrapper", "param_scheduler", "val_evaluator", "test_evaluator", "default_hooks", "custom_hooks"),
    *("data_preprocessor", "load_from", "resume", "launcher", "env_cfg", "log_processor", "log_level", "visualizer"),
    *("default_scope", "randomness", "experiment_name", "model_wrapper_cfg", "sync_bn", "find_unused_parameters"),
    *("activation_checkpointing", "efficient_conv_bn_eval", "compile"),
    # by hgkd, and by the tools of mmdet and mmseg
    *("backbone", "runner_type", "tracker", "tta_model", "tta_pipeline"),
}


def is_downstream(cfg: Config) -> bool:
    """Whether a config is one of mmdet or mmsegmentation."""
    return cfg.get("default_scope") in SCOPES


def merge_options(cfg: Config, options: Mapping[str, Any]) -> None:
    """Override keys of a downstream config in place: short options, and dotted paths.

    A short option that a config sets over the one that it is based on counts as well, see :func:`file_options`. The first part
    of a path must be a key that a run reads. A later one may be new, as many settings have defaults, unless it looks like a
    misspelling of one that is there. What is set by its path stays as it was typed: no short option moves or stretches it.

    Raises:
        ValueError: an unknown or misspelt key, one that nobody reads, a path through what has no parts, a short option that
            has no place in the config or is no number where one is expected, or one that is set to something else by its path.
    """
    for key, value in file_options(cfg).items():
        _apply(cfg, key, value)
    short = {key: value for key, value in options.items() if key in SHORT_OPTIONS}
    paths = {key: value for key, value in options.items() if key not in short}
    _check_agreement(short, paths)
    for key, value in paths.items():
        head = key.partition(".")[0]
        if head not in cfg and head not in _READ:
            raise InvalidValueError(
                "config-key-unknown",
                f"{key}={value!r}: {unknown_name_message('config key', head, sorted({*_READ, *cfg.keys(), *SHORT_OPTIONS}))}",
            )
        _check_read(cfg, key, value)
        _check_path(cfg, key, options)
    check_list_paths(cfg, paths)
    leading = {place: key for key, (place, *_) in PLACES.items() if key in ("epochs", "iterations") and place in paths}
    short = {key: paths[place] for place, key in leading.items()} | short
    cfg.merge_from_dict({key: value for key, value in paths.items() if key not in leading})
    for key, value in short.items():
        _apply(cfg, key, value)
    deleted = tuple(key.removesuffix("_delete_") for key in paths if key.endswith("._delete_"))
    cfg.merge_from_dict({key: value for key, value in paths.items() if not deleted or not key.startswith(deleted)})
    check_parts(cfg)


def _apply(cfg: Config, key: str, value: object) -> None:
    if value is not None:  # None: not given
        _SETTERS[key](cfg, value)


def _check_agreement(short: Mapping[str, Any], paths: Mapping[str, Any]) -> None:
    """Refuse a short option and its path that were typed with two values."""
    for key, value in short.items():
        for place in PLACES.get(key, ()):
            if place in paths and value is not None and not same(paths[place], value):
                raise InvalidValueError(
                    "option-given-twice",
                    f"{key}={value!r} and {place}={paths[place]!r} are one setting under two names, and the command line "
                    "gives both; take one of them out",
                )


def file_options(cfg: Config) -> dict[str, Any]:
    """The short options that a config file sets over what it is based on, as a variable that builds nothing itself.

    Not those of OpenMMLab's own files, nor one whose place the same file, or one based on it, sets: that is how their configs
    are built.
    """
    root = level_of(cfg)
    found: dict[str, Any] = {}
    for key in SHORT_OPTIONS:
        level = None if root is None else root.setter((key,))
        if root is None or level is None or not level.bases or PACKAGED in level.name or key in _VARIABLES:
            continue
        by = [root.setter(place.split(".")) for place in PLACES.get(key, ())]
        built = key == "data_root" and any(name in level.own for name in LOADERS)
        if not built and not any(other is level or (other is not None and other.after(level)) for other in by):
            found[key] = level.own[key]
    return found


def _check_read(cfg: Config, path: str, value: object) -> None:
    """Refuse a variable by which a config file built its parts: they are built, and nobody reads it any more."""
    head, _, rest = path.partition(".")
    if head in _READ and not (head == "data_preprocessor" and head in cfg.model):  # then the runner takes the model's
        return
    telling = not isinstance(cfg.get(head), (bool, type(None)))  # others stand everywhere
    places = [place for key in cfg if telling and key in _READ for place in _places(cfg[key], cfg[head], key)]
    told = ", ".join(f"{place}.{rest}" if rest else place for place in places[:4])
    raise InvalidValueError(
        "option-changes-nothing",
        f"{path}={value!r} changes nothing: {head!r} is a variable of the config file, which has built its parts with it "
        "already. Set the parts themselves by their paths"
        + (f"; the same value stands at {told}" + (f" and {len(places) - 4} more" if places[4:] else "") if places else ""),
    )


def _places(part: object, value: object, path: str) -> Iterator[str]:
    """Paths of what equals a value."""
    if type(part) is type(value) and part == value:
        yield path
    elif isinstance(part, Mapping):
        for key, inner in part.items():
            yield from _places(inner, value, f"{path}.{key}")
    elif isinstance(part, (list, tuple)):
        for index, inner in enumerate(part):
            yield from _places(inner, value, f"{path}.{index}")


def _check_path(cfg: Config, path: str, options: Mapping[str, Any]) -> None:
    """Refuse a part of a dotted path that is not there, where one that is nearly the same is, or where there can be none."""
    place, *parts = path.split(".")
    if place not in cfg:
        return
    level = cfg[place]
    for part in parts:
        if f"{place}._delete_" in options:  # mmengine's way to replace a part by another
            return
        if isinstance(level, list):
            if not part.isdigit() or int(part) >= len(level):
                raise InvalidValueError(
                    "list-index-out-of-range",
                    f"{path}: {place} is a list of {len(level)}, so {part!r} is no part of it; "
                    f"give a number below {len(level)}",
                )
            level = level[int(part)]
        elif isinstance(level, Mapping):
            near = difflib.get_close_matches(part, map(str, level), n=1, cutoff=0.8)
            if part not in level and near:
                raise InvalidValueError(
                    "config-part-unknown",
                    f"{path}: there is no {part!r} there, but {near[0]!r}; correct it, or write it into a config file if a new "
                    "key is meant",
                )
            if part not in level:
                return
            level = level[part]
        else:
            raise InvalidValueError(
                "config-value-without-parts",
                f"{path}: {place} is {level!r}, which has no part {part!r}; set {place} itself, or add {place}._delete_=True "
                "to put such parts in its place",
            )
        place = f"{place}.{part}"


def whole_number(option: str, value: Any, least: int = 1) -> int:
    """A count that a user gave, as a number or its text.

    Raises:
        ValueError: not a whole number, or below ``least``.
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not number.is_integer() or number < least:
        raise InvalidValueError("option-not-a-whole-number", f"{option}={value!r}: expected a whole number, {least} or more")
    return int(number)


def _set_data_root(cfg: Config, value: str) -> None:
    root = str(Path(value).expanduser())
    datasets = list(datasets_of(cfg))
    old = {str(part["data_root"]).rstrip("/") for part in (cfg, *datasets) if part.get("data_root")} - {""}
    for name in (*LOADERS, "val_evaluator", "test_evaluator"):
        if cfg.get(name):
            cfg[name] = _moved(cfg[name], old, root)
    cfg.data_root = root
    for dataset in datasets_of(cfg):
        dataset["data_root"] = root


def _moved(part: object, old: Collection[str], new: str) -> object:
    """A part of a config, with all paths inside the folders ``old`` inside the folder ``new`` instead."""
    if isinstance(part, Mapping):
        return type(part)({key: _moved(value, old, new) for key, value in part.items()})  # type: ignore[call-arg]
    if isinstance(part, (list, tuple)):
        return type(part)(_moved(value, old, new) for value in part)
    if not isinstance(part, str):
        return part
    above = [folder for folder in old if part.startswith(f"{folder}/")]
    return new + part.removeprefix(max(above, key=len)) if above else part


def _set_classes(cfg: Config, value: Any) -> None:
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else ()
    if not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise InvalidValueError(
            "classes-not-names",
            f"classes={value!r}: expected names, e.g. classes=[cell,platelet]; quote those that look like numbers: "
            "classes=\"['1','2']\"",
        )
    heads = list(class_heads(cfg.model, "model"))
    if not heads:
        raise InvalidValueError(
            "option-without-place",
            f"classes={list(names)}: no head of this config has num_classes (it matches texts, or divides classes into things "
            "and stuff); write them into a config file",
        )
    for _, head in heads:
        cast(dict[str, Any], head)["num_classes"] = len(names)
    for dataset in datasets_of(cfg):
        # the colours of other classes would be too few, or wrong; each library has its own word for random ones
        palette: list[Any] | None = None if cfg.default_scope == "mmdet" else []
        dataset["metainfo"] = {**(dataset.get("metainfo") or {}), "classes": names, "palette": palette}


def _set_ignored_label(cfg: Config, value: Any) -> None:
    label = whole_number("ignored_label", value, least=0)
    model = cfg.model.get("student", cfg.model)
    heads = list(pixel_heads(model))
    if not heads:
        raise InvalidValueError(
            "option-without-place",
            f"ignored_label={label}: this config has no head that classifies places; take the option out",
        )
    for _, head in heads:
        cast(dict[str, Any], head)["ignore_index"] = label
    for part in (model, cfg):
        if part.get("data_preprocessor"):
            part.data_preprocessor.seg_pad_val = label
    for loader in LOADERS:
        for metric in evaluators_of(cfg, loader):
            if type_name(metric) == "IoUMetric":
                cast(dict[str, Any], metric)["ignore_index"] = label
    for pipeline in pipelines_of(cfg):
        for step in pipeline:
            if type_name(step) == "RandomCrop":
                step["ignore_index"] = label


def _set_backbone(cfg: Config, value: str) -> None:
    cfg.backbone = str(value)


def _set_teacher(cfg: Config, value: str) -> None:
    if "teacher_checkpoint" not in cfg.model:
        raise InvalidValueError(
            "teacher-option-without-teacher",
            f"teacher_checkpoint={value}: this config trains without a teacher; use one of downstream/*/mgd_*.py",
        )
    cfg.model.teacher_checkpoint = str(Path(value).expanduser())


def _set_epochs(cfg: Config, value: int) -> None:
    _stretch(cfg, "max_epochs", "epochs", value)


def _set_iterations(cfg: Config, value: int) -> None:
    _stretch(cfg, "max_iters", "iterations", value)


def _stretch(cfg: Config, key: str, option: str, value: int) -> None:
    if key not in cfg.train_cfg:
        other = "iterations" if option == "epochs" else "epochs"
        raise InvalidValueError(
            "schedule-option-without-place", f"{option}={value} has no place in this config, which counts {other}; set {other}"
        )
    value = whole_number(option, value)
    old = int(cfg.train_cfg[key])
    for part in _dicts(cfg.get("param_scheduler")):
        if bool(part.get("by_epoch", True)) != (key == "max_epochs"):
            continue  # a warm-up in steps stays as long as it is
        whole = "end" in part and part.get("T_max") == part["end"] - part.get("begin", 0)
        for name in ("begin", "end", "T_max"):
            if name in part:
                part[name] = round(part[name] * value / old)
        if "end" in part:
            part["end"] = max(part["end"], part.get("begin", 0) + 1)
        if "T_max" in part:  # a cosine that ends before its time would rise again
            part["T_max"] = part["end"] - part.get("begin", 0) if whole else max(part["T_max"], 1)
        if "milestones" in part:
            part["milestones"] = [round(step * value / old) for step in part["milestones"]]
    for hook in _dicts(cfg.get("custom_hooks")):
        name = _SWITCHES.get(type_name(hook), "")
        if key == "max_epochs" and name in hook:
            hook[name] = min(round(hook[name] * value / old), value - 1)
    cfg.train_cfg[key] = value
    cfg.train_cfg["val_interval"] = min(cfg.train_cfg.get("val_interval", 1), value)
    hook = cfg.default_hooks.checkpoint
    hook["interval"] = min(hook.get("interval", 1), value)


def _set_batch_size(cfg: Config, value: int) -> None:
    cfg.train_dataloader.batch_size = whole_number("batch_size", value)


def _set_lr(cfg: Config, value: float) -> None:
    try:
        cfg.optim_wrapper.optimizer.lr = float(value)
    except ValueError as error:
        raise InvalidValueError("option-not-a-number", f"lr={value!r}: expected a number") from error


def _set_workers(cfg: Config, value: int) -> None:
    workers = whole_number("workers", value, least=0)
    for name in LOADERS:
        if cfg.get(name):
            cfg[name].num_workers = workers
            cfg[name].persistent_workers = workers > 0


def _set_value_range(cfg: Config, value: Any) -> None:
    limits = as_value_range(value)
    for pipeline in pipelines_of(cfg):
        for step in pipeline:
            if step["type"] in ("LoadImageFromFile", "hgkd.LoadReadableImage"):
                step["value_range"] = None if limits is None else list(limits)


def _set_seed(cfg: Config, value: int) -> None:
    cfg.randomness = {**(cfg.get("randomness") or {}), "seed": whole_number("seed", value, least=0)}


PLACES: dict[str, tuple[str, ...]] = {
    "teacher_checkpoint": ("model.teacher_checkpoint",),
    "epochs": ("train_cfg.max_epochs",),
    "iterations": ("train_cfg.max_iters",),
    "batch_size": ("train_dataloader.batch_size",),
    "lr": ("optim_wrapper.optimizer.lr",),
    "workers": tuple(f"{name}.num_workers" for name in LOADERS),
    "seed": ("randomness.seed",),
}
"""The paths that a short option is another name for; ``data_root`` changes parts of paths."""

_SETTERS: dict[str, Callable[[Config, Any], None]] = {
    "data_root": _set_data_root,
    "classes": _set_classes,
    "ignored_label": _set_ignored_label,
    "backbone": _set_backbone,
    "teacher_checkpoint": _set_teacher,
    "epochs": _set_epochs,
    "iterations": _set_iterations,
    "batch_size": _set_batch_size,
    "lr": _set_lr,
    "value_range": _set_value_range,
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


def pipelines_of(cfg: Mapping[str, Any], loaders: Sequence[str] = LOADERS) -> Iterator[Sequence[dict[str, Any]]]:
    """The pipelines of :func:`datasets_of`, and of a training those that a hook puts in their place (RTMDet's second stage)."""
    for dataset in datasets_of(cfg, loaders):
        yield dataset.get("pipeline") or []
    if LOADERS[0] in loaders:
        for hook in _dicts(cfg.get("custom_hooks")):
            yield hook.get("switch_pipeline") or []


def dataset_class(dataset: Mapping[str, Any], scope: str) -> type:
    """The class of a data set's config, in the registry of mmdet or mmseg."""
    with roots.DATASETS.switch_scope_and_registry(scope) as registry:
        found = registry.get(dataset["type"])
    if found is None:
        raise InvalidValueError("data-set-unknown", f"{scope} has no data set {dataset['type']!r}")
    return found


def _dicts(*parts: Mapping[str, Any] | Iterable[dict[str, Any]] | None) -> Iterator[dict[str, Any]]:
    for part in parts:
        if isinstance(part, Mapping):
            yield part  # type: ignore[misc]
        elif part:
            yield from part


def skip_unreadable_images(cfg: Config, work_dir: str) -> None:
    """Let all images be read by ``hgkd.LoadReadableImage``, in place.

    Training images that it refuses are left out, their names go into ``work_dir``; one of validation or test ends the run.
    """
    report = str(Path(work_dir) / UNREADABLE)
    for loader in LOADERS:
        for pipeline in pipelines_of(cfg, [loader]):
            load_with_care(pipeline, {"report": report} if loader == LOADERS[0] else {"required": True})
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
            raise MissingFileError(
                "model-config-missing",
                f"model config {source} does not exist; give a path, or one like 'mmdet::retinanet/NAME.py'",
            )
        cfg = Config.fromfile(source)
    if "model" not in cfg:
        raise InvalidValueError("config-without-model", f"{source} has no 'model'")
    return ConfigDict(cfg.model)


def without_scope(part: object, scope: str | None) -> Any:
    """A copy of a part of a config without the keys ``_scope_`` that name the scope which holds there anyway.

    mmengine marks with them what a file inherits from another package (``_base_ = "mmdet::..."``). Its registries drop the mark
    when they build; whatever hands such a part on as keyword arguments (loops here, norms and convolutions in mmcv,
    ``collate_fn`` in mmengine) would pass it on.
    """
    if isinstance(part, (list, tuple)):
        return type(part)(without_scope(item, scope) for item in part)
    if not isinstance(part, dict) or part.get("_scope_") not in (None, scope):  # another one holds for all inside
        return part
    return type(part)({key: without_scope(value, scope) for key, value in part.items() if key != "_scope_"})


def drop_downloads(model: MutableMapping[str, Any], path: str = "model") -> list[str]:
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
        parts = value if isinstance(value, (list, tuple)) else [value]
        fetched = [file for part in parts if "://" in (file := _weight_file_of(key, part))]
        if fetched:
            model[key] = [part for part in parts if _weight_file_of(key, part) not in fetched] or None
            dropped += [f"{path}.{key}: {file} is not downloaded; backbone=FILE loads local weights" for file in fetched]
        else:
            dropped += drop_downloads(value, f"{path}.{key}")
    return dropped


def _weight_file_of(key: str, part: object) -> str:
    """The weights that ``pretrained``, or one part of an ``init_cfg``, names; empty where there are none."""
    file = part.get("checkpoint") if key == "init_cfg" and isinstance(part, Mapping) else part if key == "pretrained" else None
    return file if isinstance(file, str) else ""
