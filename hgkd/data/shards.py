"""Images in tar shards, the layout of the webdataset library: read by number, so that nothing else about a run changes.

A shard is an uncompressed .tar; what stands before the first dot of a member's name is its sample's key, what follows its kind
(webdataset/webdataset, README; ``000017.jpg``, ``000017.json``). Members that are images take part, others are passed over.

webdataset itself (1.0, which has dropped ``wids``) only streams: it neither says where a member lies nor goes to it. A stream
shuffled in a buffer cannot be resumed at a step, and divides shards, not images, between processes. So the library *writes*
shards (``tools/make_shards.py``), and they are read here through an index of (shard, offset, size) that Python's ``tarfile``
makes from the headers at the start. :class:`hgkd.data.EpochSampler` then draws from all images, resumes at a step without
reading those before it, and gives every process its own, as with files. The price is a seek an image, and the headers at the
start (docs/scaling.md).

Nothing is ever unpacked, so a member's name reaches no file; links and devices are no images.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

import numpy as np

from hgkd.errors import DataError

SHARD_EXTENSION = ".tar"
Place = tuple[int, int, int]  # number of the shard, offset of the first byte, size in bytes


def find_shards(folder: str) -> list[str]:
    """Paths of all .tar files below ``folder``, relative to it, sorted."""
    return sorted(
        os.path.relpath(os.path.join(here, name), folder)
        for here, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(SHARD_EXTENSION)
    )


def kind_of(member: str) -> str:
    """What follows the first dot of a member's name, that included: '.jpg', '.seg.png'; empty for hidden and undotted names."""
    key, dot, kind = PurePosixPath(member).name.partition(".")
    return dot + kind.lower() if key else ""


def shard_members(path: str | os.PathLike[str], kinds: Sequence[str]) -> list[tuple[str, int, int]]:
    """Members of a shard whose kind is one of ``kinds``: (name, offset of the first byte, size in bytes), in their order.

    Raises:
        DataError: no uncompressed tar file, or one that ends too early.
    """
    found = []
    count = 0
    try:
        with tarfile.open(path, "r:") as shard:
            for count, member in enumerate(shard, start=1):  # noqa: B007 (told when it fails)
                if member.isreg() and not member.issparse() and kind_of(member.name) in kinds:
                    found.append((member.name, member.offset_data, member.size))
        if any(offset + size > os.path.getsize(path) for _, offset, size in found[-1:]):
            raise tarfile.ReadError("unexpected end of data")
    except tarfile.TarError as error:
        raise DataError(
            f"shard {os.fspath(path)} is damaged or no uncompressed tar file, after {count} members ({error}); pack it again "
            "(without compression: images are compressed already), or remove it"
        ) from error
    return found


class ShardIndex:
    """Where every image of some shards lies.

    Args:
        root: folder of the shards.
        shards: their paths, relative to ``root``.
        places: of the images.
    """

    def __init__(self, root: str, shards: Sequence[str], places: Iterable[Place]) -> None:
        self.root = root
        self.shards = list(shards)
        # arrays: reference counting would copy a list of a million tuples into every forked worker
        self._places = np.array(list(places), dtype=np.int64).reshape(-1, 3)

    def size(self, index: int) -> int:
        """Bytes of an image."""
        return int(self._places[index, 2])

    def read(self, index: int) -> bytes:
        """The bytes of an image.

        Raises:
            OSError: the shard is not there any more, or is shorter than it was.
        """
        shard, offset, size = (int(value) for value in self._places[index])
        path = os.path.join(self.root, self.shards[shard])
        with open(path, "rb", buffering=0) as file:
            content = os.pread(file.fileno(), size, offset)
        if len(content) != size:
            raise OSError(f"{path} ends within this member")
        return content


def index_shards(root: str, kinds: Sequence[str]) -> tuple[list[str], list[str], list[Place]]:
    """All shards below ``root``, and of every image in them 'shard/member' and its place.

    Raises:
        DataError: a shard is damaged.
    """
    shards = find_shards(root)
    names: list[str] = []
    places: list[Place] = []
    for number, shard in enumerate(shards):
        for name, offset, size in shard_members(os.path.join(root, shard), kinds):
            names.append(f"{shard}/{name}")
            places.append((number, offset, size))
    return shards, names, places
