"""SHA-256 of files, in one place: seals of checkpoints, run cards, names of stores."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from typing import BinaryIO

_BLOCK = 2**22


def stream_digest(file: BinaryIO, size: int | None = None) -> str:
    """SHA-256 of the next ``size`` bytes of an open file (None: all that follow), in hexadecimal; fewer when it ends before."""
    digest = hashlib.sha256()
    while size is None or size > 0:
        block = file.read(_BLOCK if size is None else min(size, _BLOCK))
        if not block:
            break
        digest.update(block)
        size = None if size is None else size - len(block)
    return digest.hexdigest()


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return stream_digest(file)


def ends_digest(file: BinaryIO, end: int = 2**16) -> str:
    """SHA-256 of the first and last ``end`` bytes of an open file, in hexadecimal; of all of a file that has no more."""
    digest = hashlib.sha256(file.read(end))
    size = file.seek(0, os.SEEK_END)
    file.seek(max(min(end, size), size - end))
    digest.update(file.read(end))
    return digest.hexdigest()


def files_digest(files: Iterable[tuple[str, int]]) -> str:
    """SHA-256 of a list of (name, size in bytes), in order: whether it is the same files, without reading them."""
    digest = hashlib.sha256()
    for name, size in files:
        digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))  # names of files may be no UTF-8
    return digest.hexdigest()
