"""Whether a value of a config is of the kind that a signature asks for.

Plain data (numbers, texts, lists, dicts, None) are judged. Objects, which a Python config may hold, are left to their readers.
"""

from __future__ import annotations

import inspect
import os
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_PLAIN = (str, int, float, list, tuple, Mapping, types.NoneType)
_WORDS: dict[Any, str] = {
    **{str: "a text", os.PathLike: "a path", Path: "a path", types.NoneType: "None"},
    **{int: "a whole number", float: "a number", bool: "True or False"},
}


def kinds_of(call: Callable[..., object]) -> dict[str, Any]:
    """Argument -> annotation, of a function, or of a class's constructor; without those that cannot be evaluated."""
    try:
        hints = get_type_hints(call.__init__ if inspect.isclass(call) else call)
    except (NameError, TypeError, AttributeError):  # names that are there for a type checker alone
        return {}
    return {name: hint for name, hint in hints.items() if name != "return"}


def fits(value: object, wanted: Any) -> bool:
    """Whether a value can be meant where an annotation stands; a number without a fraction is a whole one, however written."""
    if wanted is None or wanted is types.NoneType:
        return value is None
    origin, inner = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in inner)
    if origin is Literal:
        return value in inner
    kind = wanted if origin is None else origin
    if kind in (Any, object) or not isinstance(kind, type) or not isinstance(value, _PLAIN):
        return True
    if kind in (Sequence, list, tuple):
        items = value if isinstance(value, (list, tuple)) else None
        return items is not None and (len(inner) != 1 or all(fits(item, inner[0]) for item in items))
    if kind in (Mapping, dict):
        return isinstance(value, Mapping) and (len(inner) != 2 or all(fits(item, inner[1]) for item in value.values()))
    if kind is bool:
        return isinstance(value, bool) or value in (0, 1)
    if kind in (int, float):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number and (kind is float or float(value).is_integer())  # type: ignore[arg-type]  # of a number
    described = isinstance(value, Mapping) and "type" in value and kind is not str  # of what is built before it is handed on
    return isinstance(value, kind) or described


def misfit(path: str, value: object, wanted: Any) -> tuple[str, object, Any] | None:
    """Path, value and kind of the innermost part of a value that does not fit; None: it fits."""
    if fits(value, wanted):
        return None
    for part in get_args(wanted) if get_origin(wanted) in (Union, types.UnionType) else (wanted,):
        kind, inner = get_origin(part), get_args(part)
        items: Any = ()
        if kind in (Mapping, dict) and len(inner) == 2 and isinstance(value, Mapping):
            items = ((key, item, inner[1]) for key, item in value.items())
        elif kind in (Sequence, list, tuple) and len(inner) == 1 and isinstance(value, (list, tuple)):
            items = ((place, item, inner[0]) for place, item in enumerate(value))
        for key, item, asked in items:
            found = misfit(f"{path}.{key}", item, asked)
            if found is not None:
                return found
    return path, value, wanted


def words_of(wanted: Any) -> str:
    """An annotation in words."""
    if wanted is None:
        return "None"
    origin, inner = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        named = dict.fromkeys(words_of(part) for part in inner if part is not types.NoneType)
        return " or ".join([*named, *(["None"] if types.NoneType in inner else [])])
    if origin is Literal:
        return " or ".join(map(repr, inner))
    kind = wanted if origin is None else origin
    if kind in (Sequence, list, tuple):
        return f"a list, each of it {words_of(inner[0])}" if len(inner) == 1 and inner[0] in _WORDS else "a list"
    if kind in (Mapping, dict):
        return "a dict"
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))
