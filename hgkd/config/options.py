"""Parsing of ``--cfg-options KEY=VALUE``.

Values are read as mmengine's ``DictAction`` does, except that texts stay as typed (it takes blanks out of every value, makes
lists of what has a comma and numbers of folders that are called 2024), and that dicts are read as well, as in a config.
"""

from __future__ import annotations

import ast
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

from mmengine.config import DictAction

from hgkd.errors import InvalidValueError

_PATHS = ("_root", "_file", "_checkpoint", "_dir", "_from", "backbone", "checkpoint", "teacher_features")
"""How the last part of a key ends whose value is a path."""
_STARTS = re.compile(r"""['"\[({]|dict\(""")
_DICT_WITHIN = re.compile(r"(?:^|[\[(,]\s*)(?:\{|dict\()")


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
            except InvalidValueError as error:
                parser.error(f"{option_string}: {error}")
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

    Quotes make a text of anything; brackets a list, tuple or dict, with Python's own meaning where it is Python, ``dict(a=1)``
    and names without quotes included. A path is a text whatever it looks like, but for None.

    Raises:
        ValueError: brackets that do not close, or a dict that is not Python.
    """
    if _STARTS.match(text):
        try:
            return ast.literal_eval(_AsWritten().visit(ast.parse(text, mode="eval")))
        except (ValueError, TypeError, SyntaxError):  # e.g. paths without quotes; a dict as a key is a TypeError
            return _parsed(key, text)
    if key.rpartition(".")[2].endswith(_PATHS):
        return None if text == "None" else text
    return _parsed(key, text) if "," in text else DictAction._parse_int_float_bool(text)


class _AsWritten(ast.NodeTransformer):
    """What a config may hold besides literals: ``dict(a=1)``, and by a shell's habits names without quotes."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(DictAction._parse_int_float_bool(node.id))

    def visit_Call(self, node: ast.Call) -> ast.expr:
        names = [keyword.arg for keyword in node.keywords]
        if not isinstance(node.func, ast.Name) or node.func.id != "dict" or node.args or None in names:
            return node
        return ast.Dict([ast.Constant(name) for name in names], [self.visit(keyword.value) for keyword in node.keywords])


def _parsed(key: str, text: str) -> object:
    """Numbers, None and texts without quotes, and lists of them by commas."""
    if _DICT_WITHIN.search(text):
        raise InvalidValueError(
            "option-dict-not-read",
            f"the dict of '{key}={text}' is not written as Python reads it; write e.g. \"{key}=dict(type='EMAHook')\", or one "
            f"option an entry, {key}.NAME=VALUE",
        )
    text = text.strip()
    parts = _parts(key, text)
    if len(parts) > 1 or text.endswith(","):
        return [_parsed(key, part) for part in parts]
    if text[:1] + text[-1:] in ("()", "[]"):
        within = [_parsed(key, part) for part in _parts(key, text[1:-1])]
        return tuple(within) if text[0] == "(" else within
    return DictAction._parse_int_float_bool(text.strip("'\""))


def _parts(key: str, text: str) -> list[str]:
    """What stands between the commas, those in brackets left; nothing after the last one is no part."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "([") - (sign in ")]")
        if depth < 0:
            break
        if sign == "," and not depth:
            parts.append("")
        else:
            parts[-1] += sign
    if depth:
        raise InvalidValueError(
            "option-brackets-open", f"the brackets of '{key}={text}' do not close; write e.g. {key}=[1,2], or a text in quotes"
        )
    return parts if parts[-1] or len(parts) == 1 else parts[:-1]


def option_text(key: str, value: object) -> str:
    """Text to type for a value: the inverse of :func:`option_value`, except that tuples become lists."""
    if isinstance(value, str):
        try:
            as_it_is = option_value(key, value) == value
        except InvalidValueError:
            as_it_is = False
        return value if as_it_is else repr(value)
    return _inside(value) if isinstance(value, (list, tuple)) else str(value)


def _inside(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{','.join(map(_inside, value))}]"
    return repr(value)
