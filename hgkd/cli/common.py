"""Shared parts of the commands: parser, launch options, and the form in which a user's mistake is reported."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table

from hgkd.errors import USER_ERRORS, code_of, first_line

Main = Callable[[Sequence[str]], int]


def command_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows the description as it is written, with ``--debug``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    # for the help: `command` reads it and takes it away
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show where an error comes from")
    return parser


def print_table(table: Table) -> None:
    """Print a table such that nothing of it is cut off: as wide as it is, but on a narrow terminal, where long words go on
    below."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, console.measure(table).maximum)
    for column in table.columns:
        column.overflow = "fold"
    console.print(table)


def device_name(text: str) -> str:
    """A device of this machine, or 'auto'; argparse's ``type`` of ``--device``."""
    if text != "auto":
        try:
            torch.empty(0, device=text)
        except (RuntimeError, AssertionError) as error:
            why = f"{text!r} is no device of this machine ({first_line(error)}); take cpu, or leave it out"
            raise ArgumentTypeError(why) from None
    return text


def add_config_options(parser: argparse.ArgumentParser, text: str = "override keys of the config") -> None:
    """Add ``--cfg-options``."""
    from hgkd.config.options import OptionsAction  # mmengine's, which not every command needs

    parser.add_argument("--cfg-options", nargs="+", action=OptionsAction, default={}, metavar="KEY=VALUE", help=text)


def add_launcher(parser: argparse.ArgumentParser) -> None:
    """Add ``--launcher`` and what launchers pass on."""
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm"), default="none", help="how processes were started")
    parser.add_argument("--local_rank", "--local-rank", type=_set_local_rank, help=argparse.SUPPRESS)


def _set_local_rank(text: str) -> int:
    os.environ.setdefault("LOCAL_RANK", str(int(text)))
    return int(text)


def command(main: Main) -> Callable[[Sequence[str] | None], int]:
    """Make the body of a command its entry point: arguments of this process by default, a user's mistake in one sentence.

    The sentence ends with the error's code (docs/reference/errors.md). Exit code 2 for a user's mistake; ``--debug``, anywhere,
    shows its traceback instead. Other exceptions are faults of hgkd and always show theirs.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        given = list(sys.argv[1:] if argv is None else argv)
        arguments = [argument for argument in given if argument != "--debug"]
        try:
            return main(arguments)
        except (*USER_ERRORS, OSError) as error:  # a full disk and a folder without permission are the user's to mend
            code = code_of(error)
            if len(arguments) < len(given):
                print("" if code is None else f"error code: {code}", end="\n" * (code is not None), file=sys.stderr)
                raise
            print(f"error: {error}{'' if code is None else f' [{code}]'}\n(--debug shows where it comes from)", file=sys.stderr)
            return 2

    return run
