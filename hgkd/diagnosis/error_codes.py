"""The codes of the errors that users see, read from the source of the installed package."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from hgkd.writing import written_beside

PACKAGE = Path(__file__).parents[1]
CODE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)+")
_HEAD = """# Errors by their code
A user's mistake ends with one line, `error: what is wrong and what to do [code]`, and exit code 2. The words may be improved
from one version to the next, the code stays. In Python: `hgkd.errors.code_of(error)`. `hgkd doctor errors WORD` searches this
list, in which `{...}` stands for a value. Written by `hgkd doctor errors --out docs/reference/errors.md`.

| code | error | raised in | message |
|---|---|---|---|
"""


@dataclass(frozen=True, order=True)
class CodedError:
    """A place that raises an error with a code.

    Attributes:
        code: name of the cause.
        kind: class of the error.
        module: dotted name of its module.
        message: its message, with values as ``{name}``.
    """

    code: str
    kind: str
    module: str
    message: str


def coded_errors(package: Path = PACKAGE) -> list[CodedError]:
    """All places of a package that make an error with a code, by code."""
    found = set()
    for file in package.rglob("*.py"):
        module = ".".join(file.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(file.read_text(encoding="utf-8"))
        texts = _texts(tree)
        for call in made_errors(tree):
            if (code := code_given(call)) is not None:
                found.add(CodedError(code, _class_of(call), module, " ".join(template(call.args[-1], texts).split())))
    return sorted(found)


def made_errors(tree: ast.AST) -> Iterator[ast.Call]:
    """The calls of a module that make an error: of a class named ``...Error``, or of a function whose result is raised."""
    raised = {id(node.exc) for node in ast.walk(tree) if isinstance(node, ast.Raise)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (id(node) in raised or ast.unparse(node.func).endswith("Error")):
            yield node


def code_given(call: ast.Call) -> str | None:
    """The code that a call gives to its error; None: it gives none."""
    first = call.args[0] if len(call.args) > 1 else None
    given = isinstance(first, ast.Constant) and isinstance(first.value, str) and CODE.fullmatch(first.value)
    return str(first.value) if given and isinstance(first, ast.Constant) else None


def template(message: ast.expr, texts: Mapping[str, ast.expr] = MappingProxyType({})) -> str:
    """A message with its values as ``{name}``, or ``{...}`` where they are computed.

    Args:
        texts: the module's names and functions that stand for a text.
    """
    if isinstance(message, ast.Constant):
        return str(message.value)
    if isinstance(message, ast.JoinedStr):
        return "".join(template(part, texts) for part in message.values)
    if isinstance(message, ast.FormattedValue):
        return template(message.value, texts)
    if isinstance(message, ast.BinOp) and (_is_text(message.left) or _is_text(message.right)):
        return template(message.left, texts) + template(message.right, texts)
    if isinstance(message, ast.Call) and ast.unparse(message.func) == "unknown_name_message":
        return f"unknown {template(message.args[0])} {template(message.args[1])}; did you mean {{...}}?"
    name = ast.unparse(message.func if isinstance(message, ast.Call) else message).removeprefix("self.")
    if name in texts and not isinstance(message, ast.Attribute):
        return template(texts[name])
    if isinstance(message, ast.Name):
        return f"{{{name.strip('_').lower()}}}"
    return f"{{{message.attr}}}" if isinstance(message, ast.Attribute) and not message.attr.startswith("_") else "{...}"


def _texts(tree: ast.AST) -> dict[str, ast.expr]:
    """Names that are set to a text once, and functions that return one, of a module."""
    found: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(node.value)
        elif isinstance(node, ast.FunctionDef):
            given = [inner.value for inner in ast.walk(node) if isinstance(inner, ast.Return) and inner.value is not None]
            found.setdefault(node.name, []).extend(given)
    return {name: values[0] for name, values in found.items() if len(values) == 1 and _is_text(values[0])}


def _is_text(value: ast.expr) -> bool:
    if isinstance(value, ast.BinOp):
        return _is_text(value.left)
    return isinstance(value, ast.JoinedStr) or (isinstance(value, ast.Constant) and isinstance(value.value, str))


def _class_of(call: ast.Call) -> str:
    name = ast.unparse(call.func)
    return name if name.endswith("Error") else "NoSparseRuleError"  # hgkd.sparse.rules makes its errors by a function


def page(package: Path = PACKAGE) -> str:
    """The text of docs/reference/errors.md."""
    rows = (
        f"| `{error.code}` | {error.kind} | `{error.module.removeprefix('hgkd.')}` | {_escaped(error.message)} |"
        for error in coded_errors(package)
    )
    return _HEAD + "\n".join(rows) + "\n"


def write_page(path: str | os.PathLike[str]) -> int:
    """Write docs/reference/errors.md; the number of its codes.

    Raises:
        hgkd.writing.WriteError: the file cannot be written.
    """
    with written_beside(path) as file:
        file.write_text(page(), encoding="utf-8")
    return len({error.code for error in coded_errors()})


def _escaped(text: str) -> str:
    return re.sub(r"([|<>*_`\[\]])", r"\\\1", text)
