"""Writing files whole or not at all, with one sentence when the disk does not take them."""

from __future__ import annotations

import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from hgkd.errors import InvalidValueError, StoppedError, first_line

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# how libraries with file writing of their own report what the disk said: safetensors (Rust), torch (C++), protobuf
_FOREIGN = re.compile(
    r"No space left|File too large|Read-only file system|Disk quota|Permission denied|Input/output error|IoError"
    r"|PytorchStreamWriter|file write failed|unexpected pos|Failed to serialize",
    re.IGNORECASE,
)


PARTIAL = ".partial"  # ends the name of a file that is being written


class WriteError(StoppedError):
    """A file cannot be written; what was there before is untouched."""


def user_cache(variable: str, name: str) -> Path:
    """Folder for what can be made again: what an environment variable says, else ``hgkd/NAME`` of the user's cache folder."""
    chosen = os.environ.get(variable) or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hgkd" / name
    return Path(chosen).expanduser().absolute()


@contextmanager
def writing(path: str | os.PathLike[str], remedy: str = "free some space or name another place") -> Iterator[None]:
    """Context in which ``path`` is written: what the disk refuses becomes one sentence.

    Args:
        path: file or folder, for the message.

    Raises:
        WriteError: the disk is full or read-only, or the place is not ours to write to.
    """
    try:
        yield
    except Exception as error:
        cause = error.__cause__ if isinstance(error, WriteError) else error  # of a file within a folder the folder is told
        reason = _reason(cause) if isinstance(cause, Exception) else None
        if reason is None:
            raise
        raise WriteError("file-not-written", f"cannot write {path}: {reason}{_free(Path(path))}; {remedy}") from error


@contextmanager
def written_beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Context with a file to write, which takes the place of ``path`` at its end and vanishes when it fails.

    Raises:
        WriteError: see :func:`writing`; what was at ``path`` is untouched.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        with replacing(path, Path(name)) as beside:
            yield beside
            share(beside)


def share(path: Path) -> None:
    """Give a file, or a folder and all in it, the access that new ones have: tempfile and safetensors give it to the owner
    alone."""
    mask = os.umask(0)
    os.umask(mask)
    for part in (path, *path.rglob("*")):
        part.chmod((0o777 if part.is_dir() else 0o666) & ~mask)


@contextmanager
def replacing(path: str | os.PathLike[str], beside: Path | None = None) -> Iterator[Path]:
    """Context as :func:`written_beside`, for callers with a sentence of their own: errors of the disk are raised unchanged.

    Args:
        beside: the file to write; None: ``path`` with the ending ``.partial``, which one process at a time may write. Such a
            file is all that a process leaves which is killed.
    """
    path = Path(path)
    beside = path.with_name(f"{path.name}{PARTIAL}") if beside is None else beside
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a small file in UTF-8 by :func:`replacing`, so that it is never seen half-written."""
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], content: bytes | memoryview) -> None:
    """Write a file by :func:`replacing`, so that it is never seen half-written, and nothing is left where that fails."""
    with replacing(path) as beside:
        beside.write_bytes(content)


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Context with a stream in memory to fill, which becomes ``path`` as :func:`written_beside` has it.

    For writers that pass over what the disk refuses, such as Pillow's, and so matplotlib's.

    Raises:
        WriteError: see :func:`writing`; what was at ``path`` is untouched.
    """
    content = io.BytesIO()
    yield content
    with written_beside(path) as beside:
        beside.write_bytes(content.getvalue())


def filled(text: str, begin: str, end: str, content: str, where: str) -> str:
    """``text`` with what stands between two markers replaced.

    Args:
        where: the page, for the message.

    Raises:
        ValueError: a marker is missing.
    """
    if begin not in text or end not in text:
        raise InvalidValueError(
            "page-without-markers", f"{where} needs the lines {begin.strip()!r} and {end.strip()!r} round its table"
        )
    return text[: text.index(begin) + len(begin)] + content + text[text.index(end) :]


@contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Context in which one process at a time is, of all that name this file; others wait.

    The file is made, and stays: removing it would let two in. A file system without locks lets all of them in.
    """
    with open(path, "ab") as handle:
        if fcntl is None:
            yield
            return
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield  # closing unlocks


def _reason(error: Exception) -> str | None:
    """What the disk said; None when the error is about something else."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.strerror or str(error)
    if isinstance(error, (ValueError, TypeError, StoppedError)):
        return None
    return first_line(error) if _FOREIGN.search(str(error)) else None


def _free(path: Path) -> str:
    place = next((folder for folder in path.absolute().parents if folder.is_dir()), None)
    return "" if place is None else f", {shutil.disk_usage(place).free / 2**20:.0f} MB are free on its disk"
