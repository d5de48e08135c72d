"""The page of all commands with their options, read from their parsers."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence
from unittest import mock

from docstrings import cell, escaped

from hgkd.cli.main import COMMANDS

# a second parser that a command takes by its first argument
_SECOND = {"evaluate": "compare"}
_HEAD = """# Commands
Every command of `hgkd` with all its options. `hgkd COMMAND --help` shows the same. A mistake of the user ends with exit code 2
and one line that says what to do; `--debug` shows where it comes from. [Errors](errors.md) lists their codes. This page is made
from the code.

"""


class _Found(BaseException):
    """Ends a command at the moment when it has made its parser."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parser = parser


def parser_of(name: str, arguments: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of a command; ``arguments`` choose the second one of a command that has two."""

    def found(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise _Found(parser)

    program = f"hgkd {name}"
    with mock.patch.object(argparse.ArgumentParser, "parse_known_args", found), mock.patch.object(sys, "argv", [program]):
        try:
            importlib.import_module(f"hgkd.cli.{name.replace('-', '_')}").main(list(arguments))
        except _Found as end:
            end.parser.prog = " ".join((program, *arguments))
            return end.parser
    raise RuntimeError(f"hgkd {name} has no parser")


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Name after ``hgkd`` -> parser, of every command, and of every command within one."""
    found: dict[str, argparse.ArgumentParser] = {}
    for name in COMMANDS:
        parser = parser_of(name)
        found[name] = parser
        for inner, sub in _inner(parser):
            sub.prog = f"hgkd {name} {inner}"
            found[f"{name} {inner}"] = sub
        if name in _SECOND:
            found[f"{name} {_SECOND[name]}"] = parser_of(name, (_SECOND[name],))
    return found


def _inner(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def options_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The arguments of a command that its help shows, without ``--help`` and ``--debug``."""
    passed_over = (argparse._HelpAction, argparse._SubParsersAction)
    return [
        action
        for action in parser._actions
        if not isinstance(action, passed_over) and action.help != argparse.SUPPRESS and "--debug" not in action.option_strings
    ]


def page() -> str:
    """The text of the page."""
    rows = [f"| [`hgkd {name}`](#hgkd-{name}) | {escaped(text)} |" for name, text in COMMANDS.items()]
    blocks = [_HEAD, "\n".join(["| command | what it does |", "|---|---|", *rows]), "\n\n"]
    for name, parser in parsers().items():
        blocks.append(f"{'###' if ' ' in name else '##'} hgkd {name}\n")
        if parser.description:
            blocks.append(_text_block(parser.description))
        inner = [f"`hgkd {name} {sub}`" for sub, _ in _inner(parser)]
        if inner:
            blocks.append(f"Has commands of its own: {', '.join(inner)}.\n\n")
        blocks.append(_text_block(_usage(parser)))
        blocks.append(_option_table(options_of(parser)))
        if parser.epilog:
            blocks.append(_text_block(parser.epilog))
    return "".join(blocks).rstrip() + "\n"


def _usage(parser: argparse.ArgumentParser) -> str:
    wide = argparse.HelpFormatter(parser.prog, width=110)
    wide.add_usage(parser.usage, parser._actions, parser._mutually_exclusive_groups)
    return wide.format_help()


def _text_block(text: str) -> str:
    return f"```text\n{text.strip()}\n```\n\n"


def _option_table(actions: list[argparse.Action]) -> str:
    if not actions:
        return ""
    rows = [f"| {_names(action)} | {_default(action)} | {cell(_meaning(action))} |" for action in actions]
    return "\n".join(["| option | default | meaning |", "|---|---|---|", *rows]) + "\n\n"


def _names(action: argparse.Action) -> str:
    shown = _values(action)
    names = [name.replace("_", "-") if name.startswith("--") else name for name in action.option_strings]
    return cell(", ".join(f"`{f'{name} {shown}'.strip()}`" for name in dict.fromkeys(names)) or f"`{shown}`")


def _values(action: argparse.Action) -> str:
    """What stands after an option, or for an argument without one."""
    if isinstance(action.metavar, tuple):
        return " ".join(action.metavar)
    value = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
    if isinstance(action.nargs, int):
        return " ".join([value] * action.nargs)
    return {"*": f"[{value} ...]", "+": f"{value} ...", "?": f"[{value}]"}.get(str(action.nargs), value)


def _default(action: argparse.Action) -> str:
    if action.required:
        return "must be given"
    nothing = action.default in (None, False, argparse.SUPPRESS, "", {}, [])
    return "" if nothing else cell(f"`{action.default}`")


def _meaning(action: argparse.Action) -> str:
    text = escaped((action.help or "") % {"default": action.default, "prog": "hgkd", "dest": action.dest})
    if action.choices is not None:
        names = ", ".join(f"`{choice}`" for choice in action.choices)
        text = f"{text}; one of {names}" if text else f"one of {names}"
    return text
