"""Images in tar shards, the layout of the webdataset library: read by number, so that nothing else about a run changes.

A shard is an uncompressed .tar; what stands before the first dot of a member's name is its sample's key, what follows its kind
(webdataset/webdataset, README; ``000017.jpg``, ``000017.json``). Members that are images take part, others are passed over.

webdataset itself (1.0, which has dropped ``wids``) only streams: it neither says where a member lies nor goes to it. A stream
shuffled in a buffer cannot be resumed at a step, and divides shards, not images, between processes. So the library *writes*
shards (``hgkd make-shards``), and they are read here through an index of (shard, offset, size) that Python's ``tarfile``
makes from the headers at the start. :class:`hgkd.data.EpochSampler` then draws from all images, resumes at a step without
reading those before it, and gives every process its own, as with files. The price is a seek an image, and the headers at the
start (docs/howto/scaling.md).

Nothing is ever unpacked, so a member's name reaches no file; links and devices are no images.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from hgkd.data.folders import DOTTED, Content, is_system, kind_name, printable
from hgkd.data.remote import RemoteStore
from hgkd.data.sources import ImageSource, Names
from hgkd.data.stores import Store
from hgkd.errors import DataError

Place = tuple[int, int, int]  # number of the shard, offset of the first byte, size in bytes
Member = tuple[str, int, int]  # name, offset, size


def kind_of(member: str) -> str:
    """Extension of a member's name, from its first dot on: '.jpg', '.seg.png'; empty for hidden and undotted names."""
    key, dot, kind = PurePosixPath(member).name.partition(".")
    return dot + kind.lower() if key else ""


def shard_members(
    path: str | os.PathLike[str], kinds: Sequence[str], left_out: Content | None = None, called: str | None = None
) -> list[Member]:
    """Members of a shard whose kind is one of ``kinds``: (name, offset of the first byte, size in bytes), in their order.

    Args:
        left_out: counts the others, by kind.
        called: the shard's name for messages, where ``path`` is that of a copy.

    Raises:
        DataError: no uncompressed tar file, or one that ends too early.
    """
    found = []
    left_out = Content() if left_out is None else left_out
    count = 0
    try:
        with tarfile.open(path, "r:", errors="surrogateescape") as shard:
            for count, member in enumerate(shard, start=1):  # noqa: B007 (told when it fails)
                if member.isdir():
                    continue
                if any(map(is_system, PurePosixPath(member.name).parts)):
                    left_out.system += 1
                elif member.isreg() and not member.issparse() and kind_of(member.name) in kinds:
                    found.append((member.name, member.offset_data, member.size))
                else:
                    left_out.left_out[_left_out_kind(member, kinds)] += 1
        if any(offset + size > os.path.getsize(path) for _, offset, size in found[-1:]):
            raise tarfile.ReadError("unexpected end of data")
    except tarfile.TarError as error:
        raise DataError(
            "shard-damaged",
            f"shard {called or printable(os.fspath(path))} is damaged or no uncompressed tar file, after {count} members "
            f"({error}); pack it again (without compression: images are compressed already), or remove it",
        ) from error
    return found


def _left_out_kind(member: tarfile.TarInfo, kinds: Sequence[str]) -> str:
    if not member.isreg():
        return "links and devices"
    if member.name.lower().endswith(tuple(kinds)):
        return DOTTED
    return kind_name(member.name)


class ShardImages(ImageSource):
    """Images in shards: file, offset and size of each.

    Args:
        store: of the shards.
        shards: their names.
        names: 'shard/member' of each image.
        places: of the images.
    """

    def __init__(
        self, store: Store, shards: Sequence[str], names: Iterable[str], places: Sequence[Place] | NDArray[np.int64]
    ) -> None:
        self.store = store
        self.shards = list(shards)
        self._names = Names(names)
        # arrays: reference counting would copy a list of a million tuples into every forked worker
        self._places = np.array(places, dtype=np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def size(self, index: int) -> int:
        return int(self._places[index, 2])

    def open(self, index: int) -> BinaryIO:
        shard, offset, size = (int(value) for value in self._places[index])
        return io.BytesIO(self.store.read(self.shards[shard], offset, size))

    def taken(self, places: Sequence[int]) -> ShardImages:
        rows = self._places[np.asarray(places, dtype=np.int64)]
        return ShardImages(self.store, self.shards, (self._names[place] for place in places), rows)


def index_shards(store: Store, shards: Sequence[str], kinds: Sequence[str], left_out: Content | None = None) -> ShardImages:
    """The images of some shards.

    Args:
        left_out: counts the members that are no images, by kind.

    Raises:
        DataError: a shard is damaged.
        StoppedError, FileNotFoundError: one behind an address cannot be had.
    """
    left_out = Content() if left_out is None else left_out
    store.prepare(list(shards))
    names: list[str] = []
    places: list[Place] = []
    for number, shard in enumerate(shards):
        plain = shard.partition("?")[0] if isinstance(store, RemoteStore) else shard
        for name, offset, size in _members(store, shard, kinds, left_out):
            names.append(f"{plain}/{name}")
            places.append((number, offset, size))
    return ShardImages(store, shards, names, places)


def _members(store: Store, shard: str, kinds: Sequence[str], left_out: Content) -> list[Member]:
    if not isinstance(store, RemoteStore):
        return shard_members(store.path(shard), kinds, left_out)

    def index() -> bytes:
        others = Content()
        with store.copy(shard) as path:
            found = shard_members(path, kinds, others, store.path(shard))
        return json.dumps([found, others.left_out, others.system]).encode()

    # kept, or a shard that does not fit into the cache would be fetched for its headers at every start
    kind = f"index-{hashlib.sha256(' '.join(kinds).encode()).hexdigest()[:8]}"
    found, others, system = json.loads(store.note(shard, kind, index))
    left_out.left_out.update(others)
    left_out.system += system
    return [(name, offset, size) for name, offset, size in found]
