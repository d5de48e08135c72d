"""Pack a folder or list of images into tar shards, for disks and networks that are slow with many small files.

    hgkd make-shards photos shards --max-mb 500
    hgkd train CONFIG --cfg-options data_root=shards

The files' bytes are copied as they are, so the images are the same; the webdataset library writes them in its layout, and reads
them. Shards appear complete, one after the other; a folder whose packing did not come to its end is refused as data. A source
of shards is packed anew. pip install 'hgkd[shards]'.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from PIL import Image

from hgkd.cli.common import command, command_parser
from hgkd.data import UnlabelledImages
from hgkd.data.folders import UNFINISHED_EXTENSION, is_image_name, printable
from hgkd.data.pixels import FORMATS
from hgkd.errors import DataError, ExistingFileError, InvalidValueError, StoppedError

if TYPE_CHECKING:
    from webdataset import ShardWriter

_MARK = f"packing{UNFINISHED_EXTENSION}"  # lies in the folder until all is packed


def make_shards(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    max_mb: float = 500,
    max_images: int = 100_000,
    list_file: str | os.PathLike[str] | None = None,
) -> tuple[int, list[Path]]:
    """Write ``out/images-000000.tar`` and so on.

    Args:
        source: folder of images or shards, at any depth; with ``list_file`` the root of its paths.
        out: folder to make; must be empty.
        max_mb, max_images: a shard is closed when it holds more than the first (in MB, 10**6 bytes) or as many as the second.
        list_file: text file naming the images, one a line.

    Returns:
        Number of images, and the shards.

    Raises:
        ValueError: webdataset is not installed, or a limit is not positive.
        FileNotFoundError, FileExistsError, DataError: no source, ``out`` is in use, there are no images, or more than a tenth
            of them are no files that can be read.
        StoppedError: the shards could not be written.
    """
    if max_mb <= 0 or max_images < 1:
        raise InvalidValueError("count-not-positive", f"max_mb and max_images must be positive, got {max_mb} and {max_images}")
    try:
        from webdataset import ShardWriter
    except ImportError as error:
        raise InvalidValueError(
            "webdataset-missing", f"make_shards needs webdataset ({error}); pip install 'hgkd[shards]'"
        ) from error
    images = UnlabelledImages(source, list_file)
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ExistingFileError("shards-folder-in-use", f"{out} is in use; give a new folder")
    out.mkdir(parents=True, exist_ok=True)
    mark = out / _MARK
    mark.touch()
    shards: list[Path] = []

    def complete(name: str) -> None:
        shards.append(Path(name.removesuffix(UNFINISHED_EXTENSION) + ".tar"))
        os.replace(name, shards[-1])

    # absolute, or webdataset might take it for an address; with another ending, or it might compress
    pattern = str(out.absolute()).replace("%", "%%") + f"/images-%06d{UNFINISHED_EXTENSION}"
    writer = ShardWriter(pattern, max_images, max_mb * 1e6, post=complete, verbose=0, compress=False, encoder=False, mtime=0)
    skipped: list[str] = []
    index = 0
    try:
        for index in range(len(images)):
            sample = _sample(images, index, skipped)
            if sample is not None:
                writer.write(sample)
        writer.close()  # not in a `with`, which would complete a shard that an error has cut short
    except OSError as error:
        _abandon(writer, out)
        free = shutil.disk_usage(out).free / 1e6
        raise StoppedError(
            "packing-stopped",
            f"packing stopped at image {index + 1} of {len(images)} ({error}; {free:.0f} MB free in {out}); what lies there is "
            "a part, and is refused as data: make room, remove the folder and pack again",
        ) from error
    mark.unlink()
    if skipped:
        print(f"{len(skipped)} files cannot be read and are left out, e.g. {skipped[0]}", file=sys.stderr)
    return len(images) - len(skipped), shards


def _sample(images: UnlabelledImages, index: int, skipped: list[str]) -> dict[str, str | bytes] | None:
    """An image as webdataset writes it; None and one more in ``skipped`` when it cannot be read.

    Raises:
        DataError: too many of them.
    """
    path = Path(images.path(index))
    try:
        with images.open(index) as file:
            suffix = path.suffix if is_image_name(path.name) else _suffix(file)
            content = path.read_bytes() if path.is_file() else file.read()
    except Exception as error:  # no file, or one named otherwise that is no image
        skipped.append(f"{printable(str(path))} ({type(error).__name__}: {error})")
        if len(skipped) > images.max_bad_share * len(images):
            raise DataError(
                "images-unreadable-for-shards",
                f"{len(skipped)} of {len(images)} images cannot be read: {skipped[0]}; repair or remove these files",
            ) from error
        return None
    # a dot would end the key; the number keeps two files of one name apart
    key = f"{index:09d}_{re.sub(r'[^A-Za-z0-9_-]', '_', path.stem)[:60]}"
    return {"__key__": key, suffix[1:].lower(): content}


def _suffix(file: BinaryIO) -> str:
    """Extension of an image that is not named like one."""
    with Image.open(file, formats=FORMATS) as image:
        kind = str(image.format).lower()
    file.seek(0)
    return {"jpeg2000": ".jp2", "mpo": ".jpg"}.get(kind, f".{kind}")


def _abandon(writer: ShardWriter, out: Path) -> None:
    """Remove the shard that was begun, whose stream would otherwise write its rest when it is collected."""
    with suppress(AttributeError):
        writer.tarstream.tarstream.fileobj.closed = True
    for begun in out.glob(f"images-*{UNFINISHED_EXTENSION}"):
        begun.unlink()


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("source", help="folder of images, at any depth")
    parser.add_argument("out", help="folder to make")
    parser.add_argument("--max-mb", type=float, default=500, help="a shard's size, about (default 500)")
    parser.add_argument("--max-images", type=int, default=100_000, help="a shard's images at most")
    parser.add_argument("--list-file", help="text file naming the images, one a line, relative to the folder")
    return parser.parse_args(argv)


@command
def main(argv: Sequence[str]) -> int:
    args = vars(parse_args(argv))
    count, shards = make_shards(**args)
    size = sum(shard.stat().st_size for shard in shards)
    print(f"{count} images in {len(shards)} shards, {size / 1e6:.1f} MB: {shards[0].parent}")
    return 0
