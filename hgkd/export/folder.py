"""Export folders: one appears complete or not at all, and only an earlier export is ever replaced."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hgkd.errors import ExistingFileError, InvalidValueError
from hgkd.weights.export_folder import CARD_FILE, CARD_PAGE, read_card
from hgkd.writing import share, writing

PAGE = "README.md"
_CARDS = {CARD_FILE, CARD_PAGE, PAGE}


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Context with a folder to write into, which takes the place of ``out`` at its end, and vanishes when it fails.

    Raises:
        WriteError: the disk is full or read-only; ``out`` is as it was.
    """
    with writing(out, "nothing was left there; free some space or choose another --out"):
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            yield work
            share(work)
            _move(work, out)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def check_free(out: Path, force: bool, target: str) -> None:
    """Raise unless ``out`` may be made: FileExistsError, or ValueError when ``force`` would delete what is no export.

    Args:
        target: that is to be written; a folder holds one.
    """
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise ExistingFileError("output-is-a-file", f"{out} exists and is not a folder; choose another --out")
    names = {file.relative_to(out).as_posix() for file in out.rglob("*") if not file.is_dir() or not any(file.iterdir())}
    if not names:
        return
    held = read_card(out).get("target", target)
    if not force and held != target:
        raise ExistingFileError(
            "folder-of-another-target",
            f"{out} holds an export to {held}, and a folder holds one target; choose another --out for {target}, or --force to "
            "replace what is there",
        )
    if not force:
        raise ExistingFileError(
            "folder-not-empty", f"{out} exists and is not empty; choose another --out, or --force to replace an export"
        )
    try:
        listed = set(json.loads((out / CARD_FILE).read_text(encoding="utf-8"))["files"]) | _CARDS
    except (OSError, ValueError, KeyError, TypeError):
        listed = set()
    if not names <= listed:
        raise InvalidValueError(
            "force-on-other-things",
            f"{out} holds other things than an export ({', '.join(sorted(names - listed)[:3])}), "
            "so --force does not replace it; choose another --out",
        )


def _move(work: Path, out: Path) -> None:
    """Put ``work`` in the place of ``out``; an earlier export is moved aside first and deleted last."""
    if not out.exists():
        work.rename(out)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    out.rename(aside / "export")
    try:
        work.rename(out)
    except OSError:
        (aside / "export").rename(out)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)
