"""A page for every public package and module: what it exports, from its docstrings."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import hgkd

_INDEX = """Python API
==========
Every public name, from the docstrings. A package shows what it exports; import from there. Images are float tensors
(B, C, H, W) in [0, 1], masks are bool with True = visible, grids are (rows, columns).

.. toctree::
   :maxdepth: 1

"""
# the command line has a page of its own
_NOT_SHOWN = ("hgkd.cli",)


@dataclass(frozen=True)
class Entry:
    """A public name.

    Attributes:
        page: package or module whose page shows it.
        path: where to import it from, dotted.
        home: where it is defined, dotted.
        value: the object.
    """

    page: str
    path: str
    home: str
    value: object

    @property
    def is_data(self) -> bool:
        """Whether it is neither a class nor a function."""
        return not (inspect.isclass(self.value) or inspect.isroutine(self.value))

    @property
    def said(self) -> str | None:
        """Its docstring; of a constant the comment ``#:`` above it. None: it has none."""
        return _comments(self.home.rpartition(".")[0]).get(self.home) if self.is_data else _own_doc(self.value)


def pages() -> list[str]:
    """Dotted names of the packages and modules that have a page, ``hgkd`` first."""
    found = ["hgkd"]
    found += [f"hgkd.{module.name}" for module in pkgutil.iter_modules(hgkd.__path__) if not module.name.startswith("_")]
    return [name for name in found if name not in _NOT_SHOWN]


@cache
def entries_of(page: str) -> tuple[Entry, ...]:
    """The public names of a page: a package's exports, or without any all public names of its modules."""
    module = importlib.import_module(page)
    if hasattr(module, "__all__"):
        names = [name for name in module.__all__ if not name.startswith("_")]
        found = [_entry(page, module, name) for name in names]
        return tuple(entry for entry in found if entry.page == page)
    if hasattr(module, "__path__"):
        inner = [importlib.import_module(f"{page}.{found.name}") for found in pkgutil.iter_modules(module.__path__)]
    else:
        inner = [module]
    return tuple(
        Entry(page, f"{part.__name__}.{name}", f"{part.__name__}.{name}", getattr(part, name))
        for part in inner
        for name in _defined(part)
    )


@cache
def known() -> dict[str, Entry]:
    """Every public name by its path and its home."""
    entries = [entry for page in pages() for entry in entries_of(page)]
    return {name: entry for entry in entries for name in (entry.home, entry.path)}


def undocumented() -> list[str]:
    """Public names, and public methods and properties of public classes, that have no docstring."""
    missing = []
    for page in pages():
        if not importlib.import_module(page).__doc__:
            missing.append(page)
        for entry in entries_of(page):
            if not entry.said:
                missing.append(entry.path)
            if inspect.isclass(entry.value):
                missing += [
                    f"{entry.path}.{name}" for name in members(entry.value) if not inspect.getdoc(getattr(entry.value, name))
                ]
    return missing


def members(cls: type) -> list[str]:
    """Public methods and properties that a class itself defines."""
    kinds = (types.FunctionType, classmethod, staticmethod, property)
    return [name for name, value in vars(cls).items() if not name.startswith("_") and isinstance(value, kinds)]


def texts() -> dict[str, str]:
    """File name without suffix -> reStructuredText, of all pages and their index."""
    found = {"index": _INDEX + "".join(f"   {page}\n" for page in pages())}
    for page in pages():
        blocks = [f"{page}\n{'=' * len(page)}\n\n.. automodule:: {page}\n   :no-members:\n\n"]
        blocks += list(_blocks(page))
        found[page] = "".join(blocks)
    return found


def _blocks(page: str) -> Iterator[str]:
    section = page
    for entry in entries_of(page):
        module = entry.path.rpartition(".")[0]
        if module != section:
            section = module
            yield f"{module}\n{'-' * len(module)}\n\n.. automodule:: {module}\n   :no-members:\n\n"
        if entry.is_data:
            text = "\n".join(f"   {line}".rstrip() for line in (entry.said or "").splitlines())
            names = entry.value if isinstance(entry.value, (tuple, dict)) else ()
            held = ", ".join(f"``{name}``" for name in names)
            yield f".. py:data:: {entry.path}\n\n{text}\n\n" + (f"   {held}\n\n" if held else "")
        elif inspect.isclass(entry.value):
            yield f".. autoclass:: {entry.path}\n   :members:\n   :show-inheritance:\n\n"
        else:
            yield f".. autofunction:: {entry.path}\n\n"
    elsewhere = [name for name in getattr(importlib.import_module(page), "__all__", ()) if not name.startswith("_")]
    others = [_entry(page, importlib.import_module(page), name) for name in elsewhere]
    others = [entry for entry in others if entry.page != page]
    if others:
        links = ", ".join(f":py:obj:`{entry.path.rpartition('.')[2]} <{entry.path}>`" for entry in others)
        yield f"Exported here, too: {links}.\n"


def _entry(page: str, module: types.ModuleType, name: str) -> Entry:
    """A name that a package exports, on the page of the package nearest to where it is defined."""
    value = getattr(module, name)
    home = _home(page, name, value)
    shown = page
    for other in pages():
        exports = getattr(importlib.import_module(other), "__all__", None)
        if other != "hgkd" and page != "hgkd" and home.startswith(f"{other}.") and (exports is None or name in exports):
            shown = other
    if shown != page and not hasattr(importlib.import_module(shown), "__all__"):
        return Entry(shown, home, home, value)
    return Entry(shown, f"{shown}.{name}", home, value)


def _home(page: str, name: str, value: object) -> str:
    """Dotted path of the module that defines a name, and the name."""
    module = getattr(value, "__module__", None)
    if isinstance(module, str) and module.startswith("hgkd") and getattr(value, "__name__", None) == name:
        return f"{module}.{name}"
    if isinstance(value, types.ModuleType):
        return value.__name__
    source = ast.parse(Path(str(importlib.import_module(page).__file__)).read_text(encoding="utf-8"))
    for statement in source.body:
        if isinstance(statement, ast.ImportFrom) and any(alias.name == name for alias in statement.names):
            return _home(str(statement.module), name, value)
    return f"{page}.{name}"


def _defined(module: types.ModuleType) -> list[str]:
    """Public classes and functions that a module defines, in the order of its source, then its commented constants."""
    mine = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    ]
    return mine + [
        path.rpartition(".")[2] for path in _comments(module.__name__) if not path.rpartition(".")[2].startswith("_")
    ]


@cache
def _comments(module: str) -> dict[str, str]:
    """Dotted path of a constant -> the comment ``#:`` above its assignment."""
    file = importlib.import_module(module).__file__
    lines = Path(str(file)).read_text(encoding="utf-8").splitlines()
    found = {}
    for node in ast.parse("\n".join(lines)).body:
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0] if isinstance(node, ast.Assign) else None
        if isinstance(target, ast.Name):
            above = node.lineno - 2
            text: list[str] = []
            while above >= 0 and lines[above].startswith("#:"):
                text.insert(0, lines[above][2:].strip())
                above -= 1
            if text:
                found[f"{module}.{target.id}"] = " ".join(text)
    return found


def _own_doc(value: object) -> str | None:
    """A docstring of its own: not the one that dataclasses make, nor that of a base class."""
    text = vars(value).get("__doc__") if inspect.isclass(value) else getattr(value, "__doc__", None)
    made = inspect.isclass(value) and text and text.startswith(f"{value.__name__}(")
    return None if made else text
