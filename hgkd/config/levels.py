"""Origin of a config's keys: a file of its ``_base_`` chain, a program, or the command line.

mmengine merges a chain into one dict and forgets who said what. A short option such as ``batch_size`` and the place that it
stands for (``train_dataloader.batch_size``) are one setting under two names, so what was said last can only be known from
the levels: a file is later than the files that it is based on, and the command line is later than every file.
"""

from __future__ import annotations

import copy
import importlib
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config

from hgkd.errors import InvalidValueError, MissingPackageError

MISSING = type("Missing", (), {"__repr__": lambda self: "nothing"})()
_LOCK = threading.RLock()
_ATTRIBUTE = "_hgkd_level"
_OWN_SCOPE = "hgkd"


@dataclass(frozen=True, eq=False)
class Level:
    """Settings of one source, without those that it inherits.

    Attributes:
        name: for messages: a file, or 'the command line'.
        own: its keys, nested, as they are written.
        bases: the levels that it is based on.
    """

    name: str
    own: Mapping[str, Any]
    bases: tuple[Level, ...] = ()

    def setter(self, path: Sequence[str]) -> Level | None:
        """The latest level that sets a path or replaces what is around it; None: nobody does."""
        if self.value(path) is not None:
            return self
        found = (base.setter(path) for base in self.bases)
        return next((level for level in found if level is not None), None)

    def value(self, path: Sequence[str]) -> list[Any] | None:
        """Value that this level itself gives a path: [value], [MISSING] where it replaces what is around by something without
        it, None where it says nothing.
        """
        node = self.own
        for step in path:
            if isinstance(node, Mapping):
                if step not in node:
                    return [MISSING] if node.get("_delete_") else None
                node = node[step]
            elif isinstance(node, (list, tuple)):  # a list replaces the base's
                index = int(step) if step.isdigit() else len(node)
                node = node[index] if index < len(node) else MISSING
            else:
                return [MISSING]
        return [node]

    def after(self, other: Level) -> bool:
        """Whether this level is based on another, directly or through others."""
        return any(base is other or base.after(other) for base in self.bases)


class Levels:
    """The levels of a config: its file, what a program has changed since, and what was typed.

    Args:
        cfg: without typed options, and unchanged since it was read but by a program.
        typed: options, short or dotted -> value; they are merged into ``cfg``, in place.
    """

    def __init__(self, cfg: Config, typed: Mapping[str, Any] | None = None) -> None:
        file = level_of(cfg) or Level(cfg.filename or "the config", copy.deepcopy(cfg.to_dict()))
        self._program = Level("the program", {}, (file,))
        self._typed = Level("the command line", nested(typed or {}), (self._program,))
        check_list_paths(cfg, typed or {})
        try:
            cfg.merge_from_dict(copy.deepcopy(dict(typed or {})))
        except KeyError as error:  # an index beyond the end of a list
            raise InvalidValueError("argument-value-refused", f"{', '.join(typed or ())}: {error.args[0]}") from error

    def setter(self, path: Sequence[str], value: object) -> Level:
        """Level that has set a path to the value that it has."""
        found = self._typed.setter(path)
        said = None if found is None else found.value(path)
        return self._program if found is None or said is None or not same(said[0], value) else found


def check_list_paths(cfg: Config, options: Mapping[str, Any]) -> None:
    """Refuse dotted paths into lists that mmengine's merging cannot follow: it changes an entry that is a dict, and no other.

    Raises:
        ValueError: names the path, and the list that is to be written whole.
    """
    for path, value in options.items():
        node: Any = cfg._cfg_dict
        steps = path.split(".")
        for depth, step in enumerate(steps):
            if isinstance(node, Mapping):
                node = node.get(step)
                continue
            if not isinstance(node, (list, tuple)) or (step.isdigit() and int(step) >= len(node)):
                break  # mmengine says how many there are
            entry = node[int(step)] if step.isdigit() else None
            kept = isinstance(entry, Mapping) and (depth + 1 < len(steps) or isinstance(value, Mapping))
            if isinstance(node, tuple) or not kept:
                place = ".".join(steps[:depth])
                raise InvalidValueError(
                    "list-entry-not-replaced",
                    f"{path}={value!r}: {place} is a list, of which a path changes parts of an entry that is a dict, by its "
                    f"number ({place}.0.KEY=...), and takes away or replaces none; give the whole list, or write it into a "
                    "config",
                )
            node = entry
        else:
            if isinstance(node, (list, tuple)) and isinstance(value, Mapping):  # mmengine would look for its keys in the list
                raise InvalidValueError(
                    "list-replaced-by-dict",
                    f"{path}={value!r}: {path} is a list of {len(node)}, and a dict cannot take its place; give a list, "
                    f"[dict(...)], or change an entry, {path}.0.KEY=...",
                )


def nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted paths -> values as nested dicts; of a list an index is a key."""
    made: dict[str, Any] = {}
    for path, value in options.items():
        *steps, last = path.split(".")
        node = made
        for step in steps:
            inner = node.get(step)
            node[step] = node = dict(inner) if isinstance(inner, Mapping) else {}
        node[last] = value
    return made


def same(left: object, right: object) -> bool:
    """Equal, where a tuple may be written as a list."""
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right) and isinstance(left, bool) == isinstance(right, bool)


def read_levels(path: str) -> Config:
    """Read a config as ``Config.fromfile`` does, noting which file of the chain sets what; see :class:`Levels`.

    Raises:
        MissingPackageError: a file of the chain is of a package that is not installed.
        ValueError, FileNotFoundError: of mmengine, or of :func:`import_custom_modules`.
    """
    with _LOCK, _noted() as root:
        try:
            cfg = Config.fromfile(path, import_custom_modules=False)
        except ModuleNotFoundError as error:
            if error.name is not None:  # an import in the file; where the package of a base is absent mmengine names none
                raise
            package = str(error).partition(" ")[0]
            wanted = "'hgkd[downstream]'" if package in ("mmdet", "mmsegmentation") else package
            raise MissingPackageError(
                "base-package-missing",
                f"config {path} is based on a file of {package}, which is not installed; pip install {wanted}",
            ) from error
    _drop_own_scope(cfg._cfg_dict)
    import_custom_modules(cfg, root.folders())
    if root.files:
        object.__setattr__(cfg, _ATTRIBUTE, root.files[0].level())
    return cfg


def _drop_own_scope(part: object) -> None:
    """Take ``_scope_ = "hgkd"`` out of a config, in place.

    mmengine marks with it what ``_base_ = "hgkd::..."`` brings. In hgkd's own recipes that scope holds anyway, and where a part
    is handed on as keyword arguments (loops, ``collate_fn``) the mark would go with them. In the recipes of detectors and
    segmentors nearly all is mmdet's or mmseg's, and what is hgkd's says so in its ``type``.
    """
    if isinstance(part, dict):
        if part.get("_scope_") == _OWN_SCOPE:
            del part["_scope_"]
        for value in part.values():
            _drop_own_scope(value)
    elif isinstance(part, (list, tuple)):
        for value in part:
            _drop_own_scope(value)


def import_custom_modules(cfg: Config, folders: Sequence[Path]) -> None:
    """Import what ``custom_imports`` of a config names: a module on the path, or one next to the config.

    A folder whose module is imported goes to the end of ``sys.path``, so that processes which read images find it, too.

    Raises:
        ValueError: there is no such module, it does not import, or another of its name has been imported before.
    """
    wanted = cfg.get("custom_imports")
    if not wanted:
        return
    if not isinstance(wanted, Mapping) or not wanted.get("imports"):
        raise InvalidValueError(
            "custom-imports-without-names", f"custom_imports={wanted!r}: expected the modules, dict(imports=['my_parts'])"
        )
    names = wanted["imports"] if isinstance(wanted["imports"], (list, tuple)) else [wanted["imports"]]
    for name in names:
        top = name.partition(".")[0]
        beside = next((folder for folder in folders if (folder / f"{top}.py").is_file() or (folder / top).is_dir()), None)
        if beside is not None and str(beside) not in sys.path:
            sys.path.append(str(beside))
        where = f"{cfg.filename}: custom_imports names {name!r}"
        try:
            found = importlib.import_module(name)
        except ImportError as error:
            if wanted.get("allow_failed_imports"):
                continue
            raise InvalidValueError(
                "custom-import-fails",
                f"{where}, which does not import ({error}); it is looked for on Python's path (PYTHONPATH) and beside "
                f"the config, in {', '.join(map(str, folders))}",
            ) from error
        file = getattr(found, "__file__", None)
        if beside is not None and file is not None and not Path(file).is_relative_to(beside):
            raise InvalidValueError(
                "custom-import-hidden",
                f"{where}, and {beside / top} is beside it, but Python has another module of that name, {file}; rename yours",
            )


def level_of(cfg: Config) -> Level | None:
    """The level of the Python file that a config was read from, by :func:`read_levels` or by mmengine; None: of no file."""
    level: Level | None = vars(cfg).get(_ATTRIBUTE)
    name = cfg.filename
    if level is None and name is not None and str(name).endswith(".py") and Path(name).is_file():
        level = vars(read_levels(str(name))).get(_ATTRIBUTE)  # who has changed it since is told by its values
    return level


class _Note:
    """A file that is being read: its bases, and its own keys as soon as they are known."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.files: list[_Note] = []
        self.own: dict[str, Any] | None = None

    def folders(self) -> list[Path]:
        """The folders of the files below, without repetition; a base's after those of what is based on it."""
        found = [folder for file in self.files for folder in (Path(file.name).absolute().parent, *file.folders())]
        return list(dict.fromkeys(found))

    def level(self) -> Level:
        return Level(self.name, self.own or {}, tuple(file.level() for file in self.files))


@contextmanager
def _noted() -> Iterator[_Note]:
    """Context that notes which files mmengine reads in this thread, and what each says before it is merged over its bases.

    mmengine has no other way to tell: its reader takes a file and gives back the merged whole.
    """
    read, merge = Config._file2dict, Config._merge_a_into_b
    thread, open_files = threading.get_ident(), [_Note("")]

    def noting_read(filename: str, *args: object, **options: object) -> object:
        if threading.get_ident() != thread:
            return read(filename, *args, **options)
        note = _Note(str(filename))
        open_files[-1].files.append(note)
        open_files.append(note)
        try:
            return read(filename, *args, **options)
        finally:
            open_files.pop()

    def noting_merge(a: Mapping[str, Any], b: object, *args: object, **options: object) -> object:
        note = open_files[-1]
        if threading.get_ident() == thread and note.own is None:  # the first merge of a file is of the whole of it
            note.own = copy.deepcopy(dict(a))
        return merge(a, b, *args, **options)

    Config._file2dict, Config._merge_a_into_b = staticmethod(noting_read), staticmethod(noting_merge)
    try:
        yield open_files[0]
    finally:
        Config._file2dict, Config._merge_a_into_b = staticmethod(read), staticmethod(merge)
