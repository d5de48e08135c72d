"""The page of all keys of a config: those at the top, and those of every part that hgkd registers."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from docstrings import argument_text, cell, markdown, summary
from mmengine.registry import Registry, root

from hgkd import registry as registries
from hgkd.config.checking import PLAIN_SECTIONS, TOP_KEYS
from hgkd.config.short_options import SHORT_OPTIONS
from hgkd.data.transforms import eval_transform, train_transform
from hgkd.openmmlab.config import SHORT_OPTIONS as DOWNSTREAM_OPTIONS

_HEAD = """# Config keys
All keys that a config can have: at its top, and in every part that hgkd brings. A part is a dict with a `type`, the name that
is a heading here. A key that is not listed is refused before a training starts. Any key is also set on the command line by its
dotted path: `--cfg-options model.student.cell=64`. *Default* is what holds where a config does not set the key; the recipes
set many, and `hgkd train RECIPE --dry-run` shows what a training needs with them. This page is made from the code.

"""


@dataclass(frozen=True)
class Kind:
    """Parts that stand at one place of a config.

    Attributes:
        title: heading of their section.
        registry: mmengine's name of their registry.
        package: where their classes lie, below ``hgkd``.
        place: where they stand in a config.
        more: keys that every part of the kind has besides its own, name -> text.
        given: arguments that are no keys, because whoever builds the part gives them; None: all.
    """

    title: str
    registry: str
    package: str
    place: str
    more: tuple[tuple[str, str], ...] = ()
    given: frozenset[str] | None = frozenset()


_WEIGHT = ("weight", "multiplies all terms of this objective; 1.0 where it is left out")
KINDS = (
    Kind("Distillers", "model", "distillers", "`model`"),
    Kind("Students", "model", "students", "`model.student`"),
    Kind("Teachers", "model", "teachers", "`model.teacher`, or by names of yours `model.teachers.NAME`"),
    Kind("Masks", "model", "masking", "`model.mask`"),
    Kind(
        "Objectives of masked training",
        "masked objective",
        "objectives",
        "`model.objectives.NAME`",
        (_WEIGHT, ("teacher", "of several teachers the one that this objective learns from, by its name")),
    ),
    Kind("Objectives of fine-tuning", "fine-tuning objective", "objectives", "`model.objectives.NAME`", (_WEIGHT,)),
    Kind("Data sets", "dataset", "data", "`train_dataloader.dataset`, `val_dataloader.dataset`"),
    Kind("Samplers", "data sampler", "data", "`train_dataloader.sampler`", given=frozenset({"dataset"})),
    Kind(
        "Optimiser wrappers",
        "optim wrapper",
        "training",
        "`optim_wrapper`",
        (
            ("optimizer", "the optimiser: a dict with the `type` of a class of torch, and its arguments"),
            ("constructor", "what makes the groups of parameters: one of the next section"),
            ("paramwise_cfg", "keys of the constructor"),
        ),
    ),
    Kind("Constructors of optimiser wrappers", "optim wrapper constructor", "training", "`optim_wrapper.constructor`"),
    Kind(
        "Hooks",
        "hook",
        "training",
        "`default_hooks.NAME`, or the list `custom_hooks`",
        (("priority", "order among the hooks, mmengine's names: `NORMAL`, `LOW`, ..."),),
    ),
    Kind("Averages of the weights", "model", "training", "`ema_type` of mmengine's `EMAHook`", given=frozenset({"model"})),
    Kind("Metrics", "metric", "evaluation", "`val_evaluator`"),
    Kind("Runners", "runner", "training", "`runner_type`", given=None),
    Kind("Runners of detectors and segmentors", "runner", "openmmlab", "`runner_type`", given=None),
    Kind("Networks of detectors and segmentors", "model", "openmmlab", "`model`, `model.backbone`"),
    Kind("Transforms of detectors and segmentors", "transform", "openmmlab", "`pipeline` of a data set"),
    Kind("Hooks of detectors and segmentors", "hook", "openmmlab", "`custom_hooks`"),
)
# a data set's `transform` is a dict of the arguments of one of these
TRANSFORMS: tuple[tuple[str, Callable[..., Any]], ...] = (
    ("kind='train'", train_transform),
    ("kind='eval'", eval_transform),
)


@dataclass(frozen=True)
class Key:
    """A key of a part: its name, type and default as text (default None: it must be given), and its meaning (None: none)."""

    name: str
    type: str
    default: str | None
    meaning: str | None


@cache
def registered() -> dict[str, dict[str, type]]:
    """Name of a registry -> name -> class of hgkd that it holds, after every module that registers one is imported."""
    for package in sorted({kind.package for kind in KINDS}):
        module = importlib.import_module(f"hgkd.{package}")
        for found in pkgutil.walk_packages(getattr(module, "__path__", ()), f"hgkd.{package}."):
            importlib.import_module(found.name)
    own = [value for value in vars(registries).values() if isinstance(value, Registry)]
    roots = [value for value in vars(root).values() if isinstance(value, Registry)]
    children = [base.children["hgkd"] for base in roots if "hgkd" in base.children]
    parts: dict[str, dict[str, type]] = {}
    for registry in (*own, *children, *roots):
        for name, part in registry.module_dict.items():
            if getattr(part, "__module__", "").startswith("hgkd."):
                parts.setdefault(registry.name, {})[name] = part
    return parts


def parts_of(kind: Kind) -> dict[str, type]:
    """Name -> class of a kind's parts, by name."""
    prefix = f"hgkd.{kind.package}"
    found = registered().get(kind.registry, {})
    return {
        name: part
        for name, part in sorted(found.items())
        if part.__module__ == prefix or part.__module__.startswith(f"{prefix}.")
    }


def keys_of(part: Callable[..., Any], given: frozenset[str] | None = frozenset()) -> list[Key]:
    """The keys of a part in the order of its arguments; those of its base follow where it hands ``**kwargs`` on."""
    if given is None:
        return []
    keys: dict[str, Key] = {}
    for parameter in _parameters(part):
        if parameter.name not in given and parameter.name not in keys:
            annotation = "" if parameter.annotation is parameter.empty else inspect.formatannotation(parameter.annotation)
            default = None if parameter.default is parameter.empty else _shown(parameter.default)
            name = parameter.name
            keys[name] = Key(name, annotation.strip("'"), default, argument_text(part, name))
    return list(keys.values())


def _shown(value: object) -> str:
    return getattr(value, "__name__", None) or repr(value)


def _parameters(part: Callable[..., Any]) -> Iterator[inspect.Parameter]:
    bases = [base for base in part.__mro__ if "__init__" in vars(base)] if inspect.isclass(part) else [part]
    for base in bases:
        if base is object:
            return
        signature = list(inspect.signature(vars(base)["__init__"] if inspect.isclass(part) else base).parameters.values())
        named = signature[1:] if inspect.isclass(part) else signature
        yield from (p for p in named if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
        if not any(p.kind is p.VAR_KEYWORD for p in named):
            return


def page() -> str:
    """The text of the page."""
    blocks = [_HEAD, _short_options(), _top_keys()]
    for kind in KINDS:
        parts = parts_of(kind)
        if not parts:
            continue
        blocks.append(f"## {kind.title}\nPlace in a config: {kind.place}.\n\n")
        if kind.more:
            blocks.append(f"Keys of each besides its own:\n\n{_rows(('key', 'meaning'), kind.more)}")
        for name, part in parts.items():
            blocks.append(f"### {name}\n{summary(part)}\n\n{_key_table(keys_of(part, kind.given))}")
    blocks.append("## Transforms of images\nPlace in a config: `transform` of a data set, a dict of these keys.\n\n")
    for title, function in TRANSFORMS:
        rows = [key for key in keys_of(function) if key.name not in ("image_size", "in_chans")]
        blocks.append(f"### `{title}`\n{summary(function)}\n\n{_key_table(rows)}")
    return "".join(blocks).rstrip() + "\n"


def _short_options() -> str:
    rows = []
    for name, option in SHORT_OPTIONS.items():
        places = ", ".join(f"`{place}`" for place in (*option.places, *option.existing))
        rows.append((name, markdown(option.help), places))
    own = _rows(("option", "meaning", "written to"), rows)
    downstream = _rows(("option", "meaning"), [(name, markdown(text)) for name, text in DOWNSTREAM_OPTIONS.items()])
    return (
        "## Short options\nA variable at the top of a config that is written to one or more places. On the command line: "
        f"`--cfg-options NAME=VALUE`.\n\n{own}### Of detectors and segmentors\n\n{downstream}"
    )


def _top_keys() -> str:
    sections = "".join(
        f"Keys of `{path}`: {', '.join(f'`{key}`' for key in sorted(keys))}.\n\n" for path, keys in PLAIN_SECTIONS.items()
    )
    return f"## Keys at the top\n{_rows(('key', 'meaning'), [(k, markdown(v)) for k, v in TOP_KEYS.items()])}{sections}"


def _key_table(keys: list[Key]) -> str:
    if not keys:
        return "No keys of its own.\n\n"
    rows = [
        (
            key.name,
            f"`{key.type}`" if key.type else "",
            "must be given" if key.default is None else f"`{key.default}`",
            key.meaning,
        )
        for key in keys
    ]
    return _rows(("key", "type", "default", "meaning"), [tuple(text or "" for text in row) for row in rows])


def _rows(head: tuple[str, ...], rows: Any) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| `{name}` | {' | '.join(cell(text) for text in rest)} |" for name, *rest in rows]
    return "\n".join(lines) + "\n\n"
