"""Runs a tutorial page as its reader would, and compares what is printed with what the page shows.

A page is MyST Markdown. Its fenced blocks count, in their order, by the word after the fence:

    console   ``$ command`` lines (a ``\\`` at the end goes on in the next line), each with what it prints below it
    python    run, all in one namespace; one that begins with ``# name.py``, a comment that is a path, is written to that file
    text      after a python block: what that printed; with a tree in it (``├──``): the folder that its first line names

What is shown must be what is printed, the same lines in the same order. Numbers, times, paths before their last part, widths of
columns and how often a line is repeated may differ; a line ``...`` stands for any lines. In a tree ``...`` stands for any
further entries of that folder, and numbers in names may differ; without it the folder holds what is shown, no more.

``hgkd`` is called in this process, with arguments appended that make it tiny. Of other commands ``ls``, ``find`` and the like
are run by the shell; those that install something (`INSTALLS`) are not run, and nothing that they print is compared.
"""

import contextlib
import dataclasses
import io
import os
import re
import shlex
import subprocess
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmengine.logging import MMLogger
from tiny_commands import run_command

INSTALLS = ("git ", "pip ", "python -m venv", "python3 -m venv", "source ", ". ", "make ", "sudo ", "apt")
WIDTH = "120"  # columns of the terminal whose output the pages show
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# ([\w./-]+\.\w+)\n")
BRANCH = re.compile(r"^(?P<indent>(?:[│ ] {3})*)[├└]── (?P<name>\S+)", flags=re.MULTILINE)

Run = Callable[[list[str]], int]


class PageDiffersError(AssertionError):
    """What a page shows is not what happened."""


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its kind, its text and the number of its first line in the page."""

    kind: str
    text: str
    line: int


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of a console block, and what the page shows as its output."""

    text: str
    shown: str
    line: int


def blocks_of(page: str) -> list[Block]:
    return [Block(found[1], found[2], page.count("\n", 0, found.start(2)) + 1) for found in FENCE.finditer(page)]


def commands_of(block: Block) -> list[Command]:
    """The commands of a console block, in their order."""
    found: list[tuple[int, str, list[str]]] = []
    goes_on = False
    for number, line in enumerate(block.text.splitlines(), block.line):
        if goes_on:
            start, text, shown = found[-1]
            found[-1] = (start, f"{text} {line.strip()}", shown)
        elif line.startswith("$ "):
            found.append((number, line[2:], []))
        elif found:
            found[-1][2].append(line)
        elif line.strip():
            raise PageDiffersError(f"line {number}: a console block begins with a command, '$ ...', got {line!r}")
        if found and not found[-1][2]:
            start, text, shown = found[-1]
            goes_on = text.endswith("\\")
            found[-1] = (start, text.removesuffix("\\").rstrip(), shown)
    return [Command(text, "\n".join(shown), number) for number, text, shown in found]


def normal(line: str, values: Sequence[str] = ()) -> str:
    """A line without what may differ from run to run: numbers, times, folders before a path's last part, widths of columns.

    ``values`` are words that are results as numbers are, e.g. names of classes; any of them is as good as another.
    """
    line = re.sub(r"\x1b\[[0-9;]*m", "", line)
    line = re.sub(r"(?<![\w.~])(?:~|\.)?(?:/[^\s/'\":,;)\]]+)+/(?=[^\s/])", "/", line)
    line = re.sub(r"[-+]?(?:\d+(?:[.,:]\d+)*|\binf\b|\bnan\b)(?:e[-+]?\d+)?", "#", line)
    line = re.sub(r"# (?:ms|min|h)\b", "# s", line)
    line = re.sub(r"# (?:kB|GB)\b", "# MB", line)
    line = re.sub(r"([─━═┄-])\1+", r"\1", line)
    for value in values:
        line = re.sub(rf"\b{re.escape(value)}\b", "@", line)
    return re.sub(r"\s+", " ", line).replace("[ ", "[").strip()


def normal_lines(text: str, values: Sequence[str] = ()) -> list[str]:
    """The lines of an output that count: not empty, and of equal ones that follow each other the first."""
    lines = [line for line in (normal(line, values) for line in re.split(r"[\r\n]+", text)) if line]
    return [line for place, line in enumerate(lines) if place == 0 or line != lines[place - 1]]


def compare(shown: str, printed: str, where: str, values: Sequence[str] = ()) -> None:
    """Refuses what a page shows where it was not printed so.

    Raises:
        PageDiffersError: with the first line that differs, and all that was printed.
    """
    expected, got = normal_lines(shown, values), normal_lines(printed, values)
    parts: list[list[str]] = [[]]
    for line in expected:
        if line == "...":
            parts.append([])
        else:
            parts[-1].append(line)

    def fail(reason: str) -> None:
        raise PageDiffersError(f"{where}: {reason}\n--- printed\n{printed}\n--- compared as\n" + "\n".join(got))

    at = 0
    for number, part in enumerate(parts):
        first, last = number == 0, number == len(parts) - 1
        starts = range(at, len(got) - len(part) + 1)
        if first:
            starts = range(0, 1)
        elif last:
            starts = range(max(at, len(got) - len(part)), len(got) - len(part) + 1)
        for start in starts:
            if got[start : start + len(part)] == part:
                at = start + len(part)
                break
        else:
            lost = next((line for line in part if line not in got[at:]), None)
            fail(
                f"not printed: {lost!r}"
                if lost
                else "not printed in this order, or more is printed between: " + " | ".join(part)
            )
    if at < len(got):
        fail(f"printed, but not shown: {got[at]!r}")


def check_tree(text: str, where: str) -> None:
    """Refuses a shown tree that is not that of the folder.

    Raises:
        PageDiffersError: an entry is missing, or one is there that is not shown and for which no ``...`` stands.
    """
    root = Path(text.splitlines()[0].split()[0]).expanduser()
    if not root.is_dir():
        raise PageDiffersError(f"{where}: there is no folder {root}")
    children: dict[Path, list[str]] = {}
    path = [root]
    for found in BRANCH.finditer(text):
        depth = len(found["indent"]) // 4
        folder = path[depth]
        name = found["name"].rstrip("/")
        children.setdefault(folder, []).append(name)
        path[depth + 1 :] = [_entry(folder, name)]
    for folder, names in children.items():
        there = {_plain(entry.name) for entry in folder.iterdir()} if folder.is_dir() else set()
        shown = {_plain(name) for name in names}
        missing = shown - there - {"..."}
        if missing:
            raise PageDiffersError(
                f"{where}: not in {folder}: {min(missing)}; there is {', '.join(sorted(there)) or 'nothing'}"
            )
        if "..." not in shown and there - shown:
            raise PageDiffersError(f"{where}: in {folder}, but not shown: {min(there - shown)}")


def _plain(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _entry(folder: Path, name: str) -> Path:
    """The entry of a folder that has this name but for its numbers."""
    alike = [entry for entry in folder.iterdir() if _plain(entry.name) == _plain(name)] if folder.is_dir() else []
    return max(alike, key=lambda entry: (entry.name == name, entry.is_dir()), default=folder / name)


def run_page(
    page: Path, run: Run = run_command, names: dict[str, Any] | None = None, values: Sequence[str] = ()
) -> dict[str, Any]:
    """Run all blocks of a page in the current folder, and compare.

    Args:
        page: the Markdown file.
        run: runs the words of an ``hgkd`` command, the command first; returns its exit code.
        names: the namespace of the python blocks.
        values: words of the output that are results, see :func:`normal`.

    Returns:
        The namespace after the last block.

    Raises:
        PageDiffersError: something failed, or what it printed or left is not what the page shows.
    """
    names = {"__name__": "__main__"} if names is None else names
    printed: str | None = None  # by the python block before
    for block in blocks_of(page.read_text(encoding="utf-8")):
        where = f"{page.name}, line {block.line}"
        before, printed = printed, None
        if block.kind == "console":
            for command in commands_of(block):
                if not command.text.startswith(INSTALLS):
                    here = f"{page.name}, line {command.line}: {command.text}"
                    compare(command.shown, _printed_by(command.text, run, here), here, values)
        elif block.kind == "python":
            file = FILE.match(block.text)
            if file:
                Path(file[1]).parent.mkdir(parents=True, exist_ok=True)
                Path(file[1]).write_text(block.text, encoding="utf-8")
            else:
                code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
                printed = _captured(lambda code=code: exec(code, names) or 0, where)
        elif block.kind == "text":
            if BRANCH.search(block.text):
                check_tree(block.text, where)
            elif before is not None:
                compare(block.text, before, where, values)
    return names


def _printed_by(text: str, run: Run, where: str) -> str:
    if text.startswith("hgkd "):
        return _captured(lambda: run(shlex.split(text, comments=True)[1:]), where)
    words = text.split()
    if words[0] == "cd":
        os.chdir(Path(words[1]).expanduser())
        return ""
    done = subprocess.run(["bash", "-c", text], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise PageDiffersError(f"{where}: exit code {done.returncode}\n{done.stdout}")
    return done.stdout


def _captured(job: Callable[[], int], where: str) -> str:
    """What a job prints, to both streams."""
    out = io.StringIO()
    MMLogger._instance_dict.clear()  # a process of its own would have none: they write to an earlier command's output
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = WIDTH
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            code = job()
    except (Exception, SystemExit) as error:
        told = "".join(traceback.format_exception(error))
        raise PageDiffersError(f"{where}: {error!r}\n{told}\n{out.getvalue()[-5000:]}") from error
    finally:
        MMLogger._instance_dict.clear()
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    if code:
        raise PageDiffersError(f"{where}: exit code {code}\n{out.getvalue()[-5000:]}")
    return out.getvalue()


def lines_shown(page: str) -> Sequence[int]:
    """Numbers, from 0, of a page's lines that show what a command prints: not ``...``, not empty, not of an installation."""
    found = []
    for block in blocks_of(page):
        for command in commands_of(block) if block.kind == "console" else []:
            if not command.text.startswith(INSTALLS):
                lines = command.shown.splitlines()
                start = block.line - 1 + block.text.splitlines().index(lines[0], command.line - block.line) if lines else 0
                found += [start + place for place, line in enumerate(lines) if normal(line) not in ("", "...")]
    return found
