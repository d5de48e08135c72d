"""Parsing of ``--cfg-options KEY=VALUE``.

Values are read as mmengine's ``DictAction`` does, except that texts stay as typed: it takes blanks out of every value,
makes lists of what has a comma and numbers of folders that are called 2024.
"""

from __future__ import annotations

import ast
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

from mmengine.config import DictAction

_PATHS = ("_root", "_file", "_checkpoint", "_dir", "_from", "backbone", "checkpoint", "teacher_features")
"""How the last part of a key ends whose value is a path."""


class OptionsAction(DictAction):  # type: ignore[misc]
    """Collects KEY=VALUE pairs of one or more options into a dict; two values for one key are refused."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: str | Sequence[Any] | None, option_string: str | None = None
    ) -> None:
        options = dict(getattr(namespace, self.dest, None) or {})
        for pair in values or ():
            key, equals, text = pair.partition("=")
            if not equals or not key:
                parser.error(f"{option_string} takes KEY=VALUE, got {pair!r}")
            try:
                value = option_value(key, text)
            except AssertionError:  # mmengine's, of brackets
                parser.error(f"{option_string}: the brackets of {pair!r} do not close; write e.g. {key}=[1,2]")
            if key in options and options[key] != value:
                parser.error(f"{option_string} sets {key} twice, to {options[key]!r} and to {value!r}; take one of them out")
            for other in options:
                if f"{other}.".startswith(f"{key}.") and other != key:
                    parser.error(
                        f"{option_string}: {key} comes after {other}, which is a part of it and would be lost; "
                        f"write {key} before it, or one of them only"
                    )
            options[key] = value
        setattr(namespace, self.dest, options)


def option_value(key: str, text: str) -> object:
    """The value that was typed for ``key``.

    Quotes make a text of anything; brackets a list, tuple or dict, with Python's own meaning where it is Python. A path is a
    text whatever it looks like, but for None.
    """
    if text[:1] in ("'", '"', "[", "(", "{"):
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):  # e.g. names without quotes
            return DictAction._parse_iterable(text)
    if key.rpartition(".")[2].endswith(_PATHS):
        return None if text == "None" else text
    return DictAction._parse_iterable(text) if "," in text else DictAction._parse_int_float_bool(text)


def option_text(key: str, value: object) -> str:
    """Text to type for a value: the inverse of :func:`option_value`, except that tuples become lists."""
    if isinstance(value, str):
        try:
            as_it_is = option_value(key, value) == value
        except AssertionError:  # mmengine's, of brackets that do not close
            as_it_is = False
        return value if as_it_is else repr(value)
    return _inside(value) if isinstance(value, (list, tuple)) else str(value)


def _inside(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{','.join(map(_inside, value))}]"
    return repr(value)
