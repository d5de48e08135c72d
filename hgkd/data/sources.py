"""What a ``data_root`` may be, as one thing: images by number, each with a name and its bytes.

| data_root | images |
|---|---|
| a folder of image files, a list | :class:`FileImages` |
| a folder of tar shards, shards | :class:`hgkd.data.shards.ShardImages` |
| a folder of Parquet or Arrow files (Hugging Face), such files | :class:`hgkd.data.tables.TableImages` |

Each of them on a disk or behind an address (:mod:`hgkd.data.stores`), and each also as a pattern: ``data/train-*.parquet``,
``https://host/images-{000..099}.tar``. The data sets, the sampler and whatever else takes images by number do not know which.
"""

from __future__ import annotations

import glob
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from hgkd.data.folders import IMAGE_EXTENSIONS, SHARD_EXTENSION, TABLE_EXTENSIONS, Content, printable, sort_in
from hgkd.data.remote import RemoteStore
from hgkd.data.stores import LocalStore, Store, is_address
from hgkd.errors import InvalidValueError, MissingFileError, MissingPackageError

_CONTAINERS = (SHARD_EXTENSION, *TABLE_EXTENSIONS)
_WILD = re.compile(r"[*\[{]")


class Names:
    """Strings in two arrays: reference counting would copy a list of a million objects into every forked worker."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]].tobytes())


@dataclass(frozen=True)
class Blocks:
    """Which images are read together, where one of them costs as much as all.

    Attributes:
        of: block of each image, (N,), from 0.
        window: so many blocks a process keeps in its memory.
    """

    of: NDArray[np.int64]
    window: int


class ImageSource(ABC):
    """Images by number.

    Attributes:
        store: where their files lie.
        blocks: which of them should follow each other; None: any order costs the same.
    """

    store: Store
    blocks: Blocks | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """Name below the store's root, by which an image is known; in a shard 'shard/member', in a table 'table/row'."""

    @abstractmethod
    def size(self, index: int) -> int:
        """Bytes of an image, in a table of the table's file, which tells whether it was changed; -1: it is not there."""

    @abstractmethod
    def open(self, index: int) -> BinaryIO:
        """An image's file; OSError: it cannot be read."""

    @abstractmethod
    def taken(self, places: Sequence[int]) -> ImageSource:
        """The source of these images only, in this order."""

    def path(self, index: int) -> str:
        """Absolute path or address of an image, for messages."""
        return self.store.path(self.name(index))


class FileImages(ImageSource):
    """Images that are files of their own."""

    def __init__(self, store: Store, names: Iterable[str]) -> None:
        self.store = store
        self._names = Names(names)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def size(self, index: int) -> int:
        return self.store.size(self._names[index])

    def open(self, index: int) -> BinaryIO:
        return self.store.open(self._names[index])

    def taken(self, places: Sequence[int]) -> FileImages:
        return FileImages(self.store, (self._names[place] for place in places))


def root_text(data_root: str | os.PathLike[str]) -> str:
    """A ``data_root`` as a path of this machine, '~' as it is, or an address.

    Raises:
        ValueError: it is empty, which the system would take for the current folder.
    """
    text = os.fspath(data_root).removeprefix("file://")
    if not text:
        raise InvalidValueError(
            "data-root-empty",
            f"data_root {data_root!r} is empty (an unset variable?); set it to the folder of the images, '.' if it is this one",
        )
    return text


def locate(data_root: str | os.PathLike[str], extensions: tuple[str, ...] = IMAGE_EXTENSIONS) -> tuple[Store, Content]:
    """The store that a ``data_root`` names, and what is in it.

    Raises:
        ValueError: the text is empty.
        FileNotFoundError: there is nothing.
        DataError: a folder that cannot be listed.
        StoppedError, ModuleNotFoundError, ValueError: an address that cannot be read, see :mod:`hgkd.data.remote`.
    """
    text = root_text(data_root)
    if is_address(text):
        return _located(text, extensions)
    text = os.path.abspath(os.path.expanduser(text))
    if os.path.isdir(text):
        store: Store = LocalStore(text)
        return store, store.search(extensions)
    names = [text] if text.lower().endswith(_CONTAINERS) and os.path.isfile(text) else []
    if not names and not os.path.exists(text) and _WILD.search(text):
        names = [path for part in _braces(text) for path in sorted(glob.glob(part, recursive=True))]
    if not names:
        why = "is not a folder" if os.path.exists(text) else "does not exist"
        raise MissingFileError(
            "data-root-missing",
            f"data_root {printable(text)} {why}; set it to the folder that holds the images, or to .tar or .parquet files",
        )
    root = _fixed(text)
    return LocalStore(root), _sorted_in((os.path.relpath(path, root) for path in names), extensions)


def store_of(data_root: str | os.PathLike[str]) -> Store:
    """The store of the entries of a list.

    Raises:
        ValueError: the text is empty.
        FileNotFoundError: no such folder.
        ModuleNotFoundError, ValueError: see :class:`hgkd.data.remote.RemoteStore`.
    """
    text = root_text(data_root)
    if is_address(text):
        return RemoteStore(text)
    text = os.path.abspath(os.path.expanduser(text))
    if not os.path.isdir(text):
        why = "is not a folder" if os.path.exists(text) else "does not exist"
        raise MissingFileError(
            "data-root-missing", f"data_root {printable(text)} {why}; set it to the folder of the listed files"
        )
    return LocalStore(text)


def is_source(text: str) -> bool:
    """Whether a text names images itself, and not a list of them: an address, a folder, shards, tables or a pattern."""
    plain = text.partition("?")[0].lower()
    if is_address(text) or plain.endswith(_CONTAINERS):
        return not plain.endswith((".txt", ".csv", ".tsv"))
    path = os.path.expanduser(text)
    return os.path.isdir(path) or (not os.path.exists(path) and _WILD.search(text) is not None)


def _located(address: str, extensions: tuple[str, ...]) -> tuple[Store, Content]:
    plain, mark, query = address.partition("?")
    wild = _WILD.search(plain)
    if not wild and not plain.lower().endswith(_CONTAINERS):
        store = RemoteStore(address)
        return store, store.search(extensions)
    root = _fixed(plain)
    store = RemoteStore(root)
    names: list[str] = []
    for part in _braces(plain) if wild else [plain]:
        name = part.removeprefix(root.rstrip("/") + "/")
        names += store.matching(name) if _WILD.search(name) else [name + mark + query]
    if not names:
        raise MissingFileError("pattern-without-files", f"data_root {address}: no file fits this pattern; look at the address")
    return store, _sorted_in(names, extensions)


def _sorted_in(names: Iterable[str], extensions: tuple[str, ...]) -> Content:
    found = Content()
    for name in names:
        sort_in(found, name, extensions)
    found.sort()
    return found


def _fixed(pattern: str) -> str:
    """The folder above the first part of a pattern that may differ."""
    start = _WILD.search(pattern)
    return (pattern[: start.start()] if start else pattern).rpartition("/")[0] or "/"


def _braces(pattern: str) -> list[str]:
    if "{" not in pattern:
        return [pattern]
    try:
        import braceexpand
    except ImportError as error:
        raise MissingPackageError(
            "braceexpand-missing", f"{pattern} has braces, which need braceexpand ({error}); pip install 'hgkd[remote]'"
        ) from error
    try:
        return list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise InvalidValueError(
            "pattern-braces-unbalanced", f"data_root {pattern}: {error}; write e.g. images-{{000..099}}.tar"
        ) from error
