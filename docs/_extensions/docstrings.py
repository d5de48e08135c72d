"""What docstrings say about arguments, and their reStructuredText as Markdown."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

_ENTRY = re.compile(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: \([^)]*\))?: +(\S.*)?")
_ROLE = re.compile(r":(?:\w+:)?\w+:`[~!]?([^`<]+?)(?: <[^>]*>)?`")
_SEE = re.compile(r"see :(?:class|meth|func):`[~!]?\.?([\w.]+)`\.?")


def entries(text: str | None, section: str = "Args") -> dict[str, str]:
    """Name -> text of the entries below ``Args:`` (or another header) of a docstring; ``a, b: ...`` counts for both."""
    found: dict[str, str] = {}
    names: list[str] = []
    inside, depth = False, 0
    for line in inspect.cleandoc(text or "").splitlines():
        indent = len(line) - len(line.lstrip())
        if line.strip() and indent == 0:
            inside, names, depth = line == f"{section}:", [], 0
            continue
        if not inside or not line.strip():
            continue
        depth = depth or indent
        head = _ENTRY.fullmatch(line.strip()) if indent == depth else None
        if head:
            names = [name.lstrip("*") for name in head[1].split(", ")]
            found.update(dict.fromkeys(names, head[2] or ""))
        else:
            for name in names:
                found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def argument_text(part: Callable[..., Any], name: str) -> str | None:
    """What is said about an argument of a class or a function: by itself, or by the class that it has the argument from.

    ``see :class:`Other`.`` stands for what the other says about its argument of that name.

    Returns:
        Markdown, or None where nothing is said. Of an argument that a class outside of hgkd reads, whose it is.
    """
    said = _said(part, name)
    return None if said is None else markdown(said)


def _said(part: Callable[..., Any], name: str) -> str | None:
    if not inspect.isclass(part):
        said = entries(part.__doc__).get(name)
        return None if said is None else _followed(said, part, name)
    for owner in part.__mro__:
        init = vars(owner).get("__init__")
        if not owner.__module__.startswith("hgkd"):
            if init is not None and name in inspect.signature(init).parameters:
                return f"see ``{owner.__name__}`` of {owner.__module__.partition('.')[0]}"
            continue
        for text in (vars(owner).get("__doc__"), getattr(init, "__doc__", None)):
            said = entries(text).get(name)
            if said is not None:
                return _followed(said, owner, name)
    return None


def _followed(said: str, owner: Callable[..., Any], name: str) -> str:
    """A text with what its pointer points to in the pointer's place."""
    pointer = _SEE.match(said)
    if pointer is None:
        return said
    module, _, last = pointer[1].rpartition(".")
    home = importlib.import_module(module or owner.__module__)
    target = getattr(home, last, None)
    there = None if target is None or target is owner else _said(target, name)
    return said if there is None else f"{there.rstrip('.')}. {said[pointer.end() :].lstrip(',;. ')}".strip()


def summary(part: object) -> str:
    """First paragraph of a docstring, as Markdown on one line; empty where there is none."""
    return markdown(inspect.cleandoc(getattr(part, "__doc__", None) or "").split("\n\n")[0])


def markdown(text: str) -> str:
    """Roles and double backquotes as code, everything else as it is written, on one line."""
    text = _ROLE.sub(lambda role: f"`{role[1].rpartition('.')[2]}`", " ".join(text.split())).replace("``", "`")
    parts = text.split("`")
    return "`".join(part if i % 2 else escaped(part) for i, part in enumerate(parts))


def escaped(text: str) -> str:
    """Text whose characters mean themselves in Markdown."""
    return re.sub(r"([\\<>*_\[\]$])", r"\\\1", text)


def cell(text: str) -> str:
    """Text of a cell of a Markdown table."""
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(text.split()))
