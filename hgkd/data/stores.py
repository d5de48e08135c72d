"""Where files lie: on a disk of this machine (here), or behind an address (:mod:`hgkd.data.remote`).

What reads images, shards and tables asks a store for names, sizes and bytes, and does not know which of the two it has.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import BinaryIO

from hgkd.data.folders import Content, search
from hgkd.data.pixels import open_image

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_address(text: str) -> bool:
    """Whether a text is a URL, as of a web server or an object store, and no path."""
    return _ADDRESS.match(text) is not None and not text.startswith("file://")


class Store(ABC):
    """Files below a root, by their names relative to it.

    Attributes:
        root: absolute folder, or address.
    """

    root: str

    @abstractmethod
    def search(self, extensions: tuple[str, ...]) -> Content:
        """Everything below the root; errors as of :func:`hgkd.data.folders.search`."""

    @abstractmethod
    def path(self, name: str) -> str:
        """Absolute path or address of a file, for messages."""

    @abstractmethod
    def name_of(self, entry: str) -> str | None:
        """The name that an entry of a list means, relative or absolute; None: it is not below the root."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is such a file."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of a file; -1 when it is not there."""

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """A file, to read and to seek in; OSError: it cannot be read."""

    @abstractmethod
    def read(self, name: str, offset: int, size: int) -> bytes:
        """A part of a file; OSError: it cannot be read, or ends earlier."""

    @abstractmethod
    def prepare(self, names: list[str]) -> None:
        """Make ready to read these files, all of which are needed."""

    @abstractmethod
    def copy(self, name: str) -> AbstractContextManager[str]:
        """Context with the path of a file on this machine, which may go at its end."""


class LocalStore(Store):
    """A folder of this machine."""

    def __init__(self, root: str) -> None:
        self.root = root

    def search(self, extensions: tuple[str, ...]) -> Content:
        return search(self.root, extensions=extensions)

    def path(self, name: str) -> str:
        return os.path.join(self.root, name)

    def name_of(self, entry: str) -> str | None:
        path = os.path.normpath(entry)
        try:
            below = os.path.commonpath([os.path.normpath(self.path(path)), self.root]) == self.root
        except ValueError:  # another drive of Windows
            return None
        return path if below else None

    def exists(self, name: str) -> bool:
        return os.path.lexists(self.path(name))

    def size(self, name: str) -> int:
        return os.path.getsize(self.path(name)) if os.path.exists(self.path(name)) else -1

    def open(self, name: str) -> BinaryIO:
        return open_image(self.path(name))

    def read(self, name: str, offset: int, size: int) -> bytes:
        return read_part(self.path(name), offset, size)

    def prepare(self, names: list[str]) -> None:
        pass

    def copy(self, name: str) -> AbstractContextManager[str]:
        return nullcontext(self.path(name))


def read_part(path: str, offset: int, size: int) -> bytes:
    """``size`` bytes of a file from ``offset`` on.

    Raises:
        OSError: the file is not there any more, or is shorter than it was.
    """
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)  # Windows has no os.pread
        content = file.read(size)
    if len(content) != size:
        raise OSError(f"{path} ends within this member")
    return content
