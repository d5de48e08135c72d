"""Images in tar shards, the layout of the webdataset library: read by number, so that nothing else about a run changes.

A shard is an uncompressed .tar; what stands before the first dot of a member's name is its sample's key, what follows its kind
(webdataset/webdataset, README; ``000017.jpg``, ``000017.json``). Members that are images take part, others are passed over.

webdataset itself (1.0, which has dropped ``wids``) only streams: it neither says where a member lies nor goes to it. A stream
shuffled in a buffer cannot be resumed at a step, and divides shards, not images, between processes. So the library *writes*
shards (``hgkd make-shards``), and they are read here through an index of (shard, offset, size) that Python's ``tarfile``
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

from hgkd.data.folders import DOTTED, SHARD_EXTENSION, Content, is_system, kind_name, printable, search
from hgkd.errors import DataError

__all__ = ["SHARD_EXTENSION", "Place", "ShardIndex", "find_shards", "index_shards", "kind_of", "shard_members"]

Place = tuple[int, int, int]  # number of the shard, offset of the first byte, size in bytes


def find_shards(folder: str) -> list[str]:
    """Paths of all .tar files below ``folder``, relative to it, sorted; links are followed, cycles are not."""
    return search(folder).shards


def kind_of(member: str) -> str:
    """Extension of a member's name, from its first dot on: '.jpg', '.seg.png'; empty for hidden and undotted names."""
    key, dot, kind = PurePosixPath(member).name.partition(".")
    return dot + kind.lower() if key else ""


def shard_members(
    path: str | os.PathLike[str], kinds: Sequence[str], left_out: Content | None = None
) -> list[tuple[str, int, int]]:
    """Members of a shard whose kind is one of ``kinds``: (name, offset of the first byte, size in bytes), in their order.

    Args:
        left_out: counts the others, by kind.

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
            f"shard {printable(os.fspath(path))} is damaged or no uncompressed tar file, after {count} members ({error}); pack "
            "it again (without compression: images are compressed already), or remove it",
        ) from error
    return found


def _left_out_kind(member: tarfile.TarInfo, kinds: Sequence[str]) -> str:
    if not member.isreg():
        return "links and devices"
    if member.name.lower().endswith(tuple(kinds)):
        return DOTTED
    return kind_name(member.name)


class ShardIndex:
    """Index of images in shards: file, offset and size of each.

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


def index_shards(root: str, kinds: Sequence[str], left_out: Content | None = None) -> tuple[list[str], list[str], list[Place]]:
    """All shards below ``root``, and of every image in them 'shard/member' and its place.

    Args:
        left_out: counts the members that are no images, by kind.

    Raises:
        DataError: a shard is damaged.
    """
    shards = find_shards(root)
    names: list[str] = []
    places: list[Place] = []
    for number, shard in enumerate(shards):
        for name, offset, size in shard_members(os.path.join(root, shard), kinds, left_out):
            names.append(f"{shard}/{name}")
            places.append((number, offset, size))
    return shards, names, places
