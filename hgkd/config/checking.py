"""Checking configs: every key is read by somebody, and every value is of the kind that its reader takes.

mmengine silently ignores top-level keys that it does not know, and trips on values of another kind far from where they stand.
Here a key is read or refused, before anything is built, and a value is compared with the annotation of the argument that it
becomes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal

from mmengine import registry as roots
from mmengine.config import Config
from mmengine.registry import Registry
from mmengine.runner import Runner

from hgkd.config.kinds import kinds_of, misfit, words_of
from hgkd.config.short_options import SHORT_OPTIONS
from hgkd.errors import InvalidValueError, unknown_name_message
from hgkd.registry import (
    DATASETS,
    FINETUNING_OBJECTIVES,
    HOOKS,
    MASKED_OBJECTIVES,
    METRICS,
    MODELS,
    RUNNERS,
    unknown_objective_message,
)

#: Keys at the top of a config besides the short options, key -> what it is. mmengine's runner reads them, as its arguments or
#: through its cfg.
TOP_KEYS: dict[str, str] = {
    "model": "what is trained: a distiller, or mmdet's or mmseg's detector or segmentor",
    "work_dir": "the work folder: checkpoints, logs, pictures; ``--work-dir`` sets it",
    "train_dataloader": "torch's ``DataLoader`` of the training images: data set, sampler, ``batch_size``, ``num_workers``",
    "val_dataloader": "the same for the validation; None: no validation",
    "test_dataloader": "the same for ``hgkd test``",
    "train_cfg": "the training loop: ``max_epochs`` or ``max_iters``, and how often to validate (``val_interval``)",
    "val_cfg": "the validation loop; ``{}`` for mmengine's",
    "test_cfg": "the loop of ``hgkd test``; ``{}`` for mmengine's",
    "auto_scale_lr": "``base_batch_size``: the batch size over all processes that the learning rate is meant for; ``enable``",
    "optim_wrapper": "the optimiser, with gradient clipping and precision",
    "param_scheduler": "list of mmengine's schedulers of the learning rate, the weight decay or the momentum",
    "val_evaluator": "the metric of the validation, or a list",
    "test_evaluator": "the same for ``hgkd test``",
    "default_hooks": "mmengine's usual hooks by name, e.g. ``checkpoint`` and ``logger``",
    "custom_hooks": "list of further hooks",
    "data_preprocessor": "what moves a batch to the device, where the model does not bring it",
    "load_from": "checkpoint whose weights a new run starts from",
    "resume": "go on in the work folder's last checkpoint; ``--resume`` sets it",
    "launcher": "how processes were started: none, pytorch or slurm; ``--launcher`` sets it",
    "env_cfg": "mmengine's settings of cuDNN, multiprocessing and ``torch.distributed``",
    "log_processor": "mmengine's smoothing of the logged numbers",
    "log_level": "least level of the messages that are shown, e.g. INFO",
    "visualizer": "where numbers and pictures are recorded: mmengine's ``vis_backends``",
    "default_scope": "whose registries names are looked up in: hgkd, mmdet or mmseg",
    "randomness": "``seed``, and ``deterministic`` for torch's deterministic algorithms",
    "experiment_name": "name of the run in logs",
    "activation_checkpointing": "list of modules, e.g. student.encoder.layer1, whose activations are computed again in the "
    "backward pass: less memory, more time",
    "custom_imports": "modules with parts of your own, e.g. ``dict(imports=['my_parts'])``",
    "efficient_conv_bn_eval": "mmengine's: modules whose frozen norms are computed with their convolution",
    "find_unused_parameters": "several processes: True where a step leaves parameters without gradient",
    "fsdp": "True: divide the parameters among the processes (not of detectors and segmentors)",
    "kernels": "how the sparse engine chooses its kernels: 'measure' on this machine (default), by a 'rule', or always 'torch' "
    "or 'fused'; ``HGKD_KERNELS`` wins",
    "model_wrapper_cfg": "mmengine's wrapper of the model for several processes, in place of torch's usual one",
    "runner_type": "class of the runner; the recipes set it",
    "sync_bn": "several processes: True normalises over the batches of all",
    "tracker": "wandb or mlflow: where the run is recorded, too",
}
_RUNNER_KEYS = {name for name in inspect.signature(Runner.__init__).parameters if name not in ("self", "cfg")}
_TOP_KEYS = _RUNNER_KEYS | set(TOP_KEYS) | set(SHORT_OPTIONS)

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
_KEY_REGISTRIES: dict[str, Registry | None] = {
    "dataset": DATASETS,
    "sampler": roots.DATA_SAMPLERS,
    "batch_sampler": roots.DATA_SAMPLERS,
    "collate_fn": roots.FUNCTIONS,
    "worker_init_fn": roots.FUNCTIONS,
    "optimizer": roots.OPTIMIZERS,
    "vis_backends": roots.VISBACKENDS,
    "encoder_kwargs": None,  # of another library's network, e.g. its norm_cfg; checked when that is built
}
# sections without a `type` whose keys mmengine reads by name, ignoring others
PLAIN_SECTIONS: dict[str, frozenset[str]] = {
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
_MAYBE_DICT = dict[str, Any] | None
# kinds of the runner's arguments by their annotations, and of settings whose readers have none; path -> kind, least value
_KINDS: Mapping[str, tuple[Any, float | None]] = MappingProxyType(
    {
        **{key: (kind, None) for key, kind in kinds_of(Runner).items() if key in _RUNNER_KEYS},
        **{
            f"{name}_dataloader.{key}": kind
            for name in ("train", "val", "test")
            for key, kind in {
                "dataset": (dict[str, Any], None),
                "sampler": (_MAYBE_DICT, None),
                "batch_size": (int | None, 1),
                "num_workers": (int, 0),
            }.items()
        },
        "train_cfg.max_epochs": (int, None),
        "train_cfg.val_interval": (int, None),
        "train_cfg.val_begin": (int, 0),
        "default_hooks": (dict[str, _MAYBE_DICT] | None, None),
        "runner_type": (str, None),
        "experiment_name": (str | int | None, None),
        "optim_wrapper.optimizer": (dict[str, Any], None),
        "optim_wrapper.clip_grad": (_MAYBE_DICT, None),
        "default_hooks.checkpoint.interval": (int, -1),
        "randomness.seed": (int | None, 0),
        "auto_scale_lr.base_batch_size": (int, 1),
        "env_cfg.mp_cfg": (dict[str, Any], None),
        "env_cfg.dist_cfg": (dict[str, Any], None),
        "activation_checkpointing": (list[str] | None, None),
        "custom_imports": (_MAYBE_DICT, None),
        "find_unused_parameters": (bool, None),
        "log_level": (Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL", "NOTSET"] | int, None),
        "kernels": (Literal["measure", "rule", "torch", "fused"], None),
        "sync_bn": (bool | str | None, None),
        "work_dir": (str, None),
    }
)
_TRAINING = ("train_dataloader", "train_cfg", "optim_wrapper")


def check_config(cfg: Config | Mapping[str, Any]) -> None:
    """Refuse keys that nobody reads, types that nobody registered, required options that are absent, and values of another
    kind.

    Top-level keys are those of mmengine's runner and our short options. Below, every dict with a ``type`` that names a class
    of hgkd is compared with that class's arguments, recursively; other classes check theirs when they are built.

    Raises:
        ValueError: names the path of the key, its value and what is expected there.
    """
    plain = cfg.to_dict() if isinstance(cfg, Config) else dict(cfg)
    for key, value in plain.items():
        if key not in _TOP_KEYS:
            raise InvalidValueError(
                "config-key-unknown", f"{key}={_short(value)}: {unknown_name_message('top-level config key', key, _TOP_KEYS)}"
            )
    runner = plain.get("runner_type")
    if isinstance(runner, str):
        _find(RUNNERS, runner, "runner_type")
    for path, (kind, least) in _KINDS.items():
        _check_setting(plain, path, kind, least)
    _check_training(plain)
    for path, known in PLAIN_SECTIONS.items():
        _check_plain(plain, path, known)
    for key, value in plain.items():
        _check(value, key, _TOP_REGISTRIES.get(key))


def _check(value: object, path: str, registry: Registry | None) -> None:
    if isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            _check(item, f"{path}.{i}", registry)
        return
    if not isinstance(value, Mapping):
        return
    # without a registry nobody builds from this dict, whatever its keys are called
    if "type" in value and registry is not None:
        kind = value["type"]
        if kind is None or isinstance(kind, (int, float, list, tuple, Mapping)):
            raise InvalidValueError(
                "type-not-a-name", f"{path}.type={_short(kind)}: expected the name of what is built, a text"
            )
        cls = _find(registry, kind, f"{path}.type") if isinstance(kind, str) else kind
        if getattr(cls, "__module__", "").startswith("hgkd."):
            _check_arguments(cls, value, path, registry)
        if hasattr(cls, "objective_registry"):
            _check_objectives(value.get("objectives") or {}, f"{path}.objectives", cls.objective_registry)
            value = {key: item for key, item in value.items() if key != "objectives"}
    for key, item in value.items():
        _check(item, f"{path}.{key}", _KEY_REGISTRIES.get(key, registry))


def _check_objectives(objectives: object, path: str, registry: Registry) -> None:
    for name, item in objectives.items() if isinstance(objectives, Mapping) else ():
        _check(item, f"{path}.{name}", registry)


def _check_arguments(cls: Callable[..., object], value: Mapping[str, Any], path: str, registry: Registry) -> None:
    accepted = _accepted(cls, registry)
    extra = {"type", "_scope_"}
    if registry is HOOKS:
        extra.add("priority")
    if registry is roots.OPTIM_WRAPPERS:
        extra |= {"constructor", "paramwise_cfg"}
    if path.startswith("model.objectives."):
        _refuse_misfit(f"{path}.weight", value.get("weight", 1.0), float)
        extra |= {"weight", "teacher"} if registry is MASKED_OBJECTIVES else {"weight"}
    if accepted is not None:
        for key, item in value.items():
            if key not in accepted and key not in extra:
                message = unknown_name_message(f"option of {cls.__name__}", key, sorted(accepted))
                raise InvalidValueError("argument-refused", f"{path}.{key}={_short(item)}: {message}")
    for key, kind in _annotations(cls, registry).items():
        if key in value:
            _refuse_misfit(f"{path}.{key}", value[key], kind)
    given = {*value, "dataset"} if registry is roots.DATA_SAMPLERS else value  # a sampler gets its data set from the runner
    for name in _required(cls):
        if name not in given:
            place = f"{path}.{name}"
            short = [option for option, entry in SHORT_OPTIONS.items() if place in (*entry.places, *entry.existing)]
            how = f"--cfg-options {short[0]}=..." if short else f"{place} in the config"
            raise InvalidValueError("argument-missing", f"{place} is missing: {cls.__name__} needs it; set {how}")


def _refuse_misfit(path: str, value: object, kind: Any) -> None:
    wrong = misfit(path, value, kind)
    if wrong is not None:
        place, found, wanted = wrong
        raise InvalidValueError("value-of-another-kind", f"{place}={_short(found)}: expected {words_of(wanted)}")


_NOTHING = object()


def _found(plain: Mapping[str, Any], path: str) -> object:
    """What stands at a path; ``_NOTHING`` where there is no such place."""
    found: object = plain
    for step in path.split("."):
        found = found.get(step, _NOTHING) if isinstance(found, Mapping) else _NOTHING
    return found


def _check_setting(plain: Mapping[str, Any], path: str, kind: Any, least: float | None) -> None:
    value = _found(plain, path)
    if value is _NOTHING:
        return
    _refuse_misfit(path, value, kind)
    if least is not None and isinstance(value, (int, float)) and value < least:
        raise InvalidValueError("value-too-small", f"{path}={value}: expected {words_of(kind)}, {least:g} or more")


def _check_training(plain: Mapping[str, Any]) -> None:
    """Refuse a training without one of its parts, or without an end."""
    given = {key: plain.get(key) for key in _TRAINING}
    absent = [key for key, value in given.items() if value is None]
    if absent and len(absent) < len(_TRAINING):
        raise InvalidValueError(
            "training-part-missing",
            f"{absent[0]} is absent or None, and a training needs {', '.join(_TRAINING)}; leave it as the recipe has it (where "
            "nothing is trained, all three are None)",
        )
    loop = given["train_cfg"]
    if isinstance(loop, Mapping) and loop.get("by_epoch") and loop.get("max_epochs") is None:
        raise InvalidValueError(
            "argument-missing", "train_cfg.max_epochs is missing: a training needs a length; set epochs=..."
        )


def _check_plain(plain: Mapping[str, Any], path: str, known: frozenset[str]) -> None:
    section = _found(plain, path)
    for key, value in section.items() if isinstance(section, Mapping) else ():
        if key not in known:
            raise InvalidValueError(
                "part-key-unknown", f"{path}.{key}={_short(value)}: {unknown_name_message(f'key of {path}', key, known)}"
            )


def _chain(registry: Registry) -> Iterator[Registry]:
    """A registry of hgkd (or the child of a root that belongs to it), then its parents, all imported."""
    node: Registry | None = registry.children.get("hgkd", registry) if registry.parent is None else registry
    while node is not None:
        node.import_from_location()
        yield node
        node = node.parent


def _find(registry: Registry, name: str, path: str) -> type:
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
        objective = registry in (MASKED_OBJECTIVES, FINETUNING_OBJECTIVES)
        told = unknown_objective_message(registry, name) if objective else unknown_name_message(registry.name, name, known)
        raise InvalidValueError("type-not-found", f"{path}={name!r}: {told}")
    return known[name]


def _parameters(cls: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    parameters = dict(inspect.signature(cls.__init__ if inspect.isclass(cls) else cls).parameters)
    if inspect.isclass(cls):
        parameters.pop(next(iter(parameters)), None)  # self
    return parameters


def _annotations(cls: Callable[..., object], registry: Registry) -> dict[str, Any]:
    """Kinds of the arguments that :func:`_accepted` names."""
    kinds: dict[str, Any] = {}
    for base in reversed(_constructors(cls, registry)):
        kinds |= kinds_of(base)
    return kinds


def _constructors(cls: Callable[..., object], registry: Registry) -> list[Any]:
    """Whose arguments a class takes: its own, or those that it inherits; of a metric, which hands the rest on, all bases'."""
    bases = [base for base in cls.__mro__ if "__init__" in vars(base)] if inspect.isclass(cls) else [cls]
    return bases if registry is METRICS else bases[:1]


def _accepted(cls: Callable[..., object], registry: Registry) -> set[str] | None:
    """Names that the constructor takes; None: any name, because it hands ``**kwargs`` on to something unknown.

    A metric hands them to its base class, which is known.
    """
    names: set[str] = set()
    for base in _constructors(cls, registry):
        parameters = _parameters(base)
        names |= {n for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return names
    return None


def _required(cls: Callable[..., object]) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [n for n, p in _parameters(cls).items() if p.default is p.empty and p.kind in kinds]


def _short(value: object, length: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= length else text[: length - 3] + "..."
