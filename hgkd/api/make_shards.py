"""Packing of images into tar shards by the webdataset library (1.0), as they are or shrunk."""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from PIL import Image

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
    size: int | None = None,
    quality: int = 90,
    value_range: Sequence[float] | None = None,
    in_chans: int | None = None,
) -> tuple[int, list[Path]]:
    """Write ``out/images-000000.tar`` and so on.

    Args:
        source: whatever a ``data_root`` may be; with ``list_file`` the root of its paths.
        out: folder to make; must be empty.
        max_mb, max_images: a shard is closed when it holds more than the first (in MB, 10**6 bytes) or as many as the second.
        list_file: text file naming the images, one a line.
        size: pixels; images whose shorter side is longer are shrunk to it (bicubic), and stored upright as RGB JPEGs without
            what else their files hold. None: all bytes are copied.
        quality: of these JPEGs, in 1..100, as Pillow counts.
        value_range: with ``size``, see :class:`hgkd.data.UnlabelledImages`.
        in_chans: channels of the images; None: RGB. Without ``size``.

    Returns:
        Number of images, and the shards.

    Raises:
        ValueError: webdataset is not installed, a limit is not positive, or options exclude each other.
        FileNotFoundError, FileExistsError, DataError: no source, ``out`` is in use, there are no images, or more than a tenth
            of them are no files that can be read.
        StoppedError: the shards could not be written.
    """
    if max_mb <= 0 or max_images < 1:
        raise InvalidValueError("count-not-positive", f"max_mb and max_images must be positive, got {max_mb} and {max_images}")
    _check_size(size, quality, value_range, in_chans)
    _shard_writer()
    images = UnlabelledImages(source, list_file, transform={"kind": "eval"}, value_range=value_range, in_chans=in_chans)
    return pack_images(images, out, max_mb, max_images, size, quality)


def pack_images(
    images: UnlabelledImages,
    out: str | os.PathLike[str],
    max_mb: float = 500,
    max_images: int = 100_000,
    size: int | None = None,
    quality: int = 90,
) -> tuple[int, list[Path]]:
    """Write the images of a data set; arguments, result and errors as for :func:`make_shards`."""
    shard_writer = _shard_writer()
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
    writer = shard_writer(pattern, max_images, max_mb * 1e6, post=complete, verbose=0, compress=False, encoder=False, mtime=0)
    skipped: list[str] = []
    index = 0
    try:
        for index in range(len(images)):
            sample = _sample(images, index, skipped, size, quality)
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


def _shard_writer() -> type[ShardWriter]:
    try:
        from webdataset import ShardWriter
    except ImportError as error:
        raise InvalidValueError(
            "webdataset-missing", f"make_shards needs webdataset ({error}); pip install 'hgkd[shards]'"
        ) from error
    return ShardWriter


def _check_size(size: int | None, quality: int, value_range: Sequence[float] | None, in_chans: int | None) -> None:
    if not 1 <= quality <= 100 or (size is not None and size < 1):
        raise InvalidValueError(
            "size-or-quality-out-of-range", f"size is pixels from 1 on and quality lies in 1..100, got {size} and {quality}"
        )
    if (size is None and value_range is not None) or (size is not None and in_chans is not None):
        raise InvalidValueError(
            "packing-options-exclude",
            f"size={size} stores 8-bit RGB: value_range says how, and in_chans is for bytes that are copied; got "
            f"value_range={value_range}, in_chans={in_chans}",
        )


def _sample(
    images: UnlabelledImages, index: int, skipped: list[str], size: int | None, quality: int
) -> dict[str, str | bytes] | None:
    """An image as webdataset writes it; None and one more in ``skipped`` when it cannot be read.

    Raises:
        DataError: too many of them.
    """
    path = Path(images.path(index))
    try:
        with images.open(index) as file:
            suffix = path.suffix if is_image_name(path.name) else _suffix(file)
            content = path.read_bytes() if path.is_file() else file.read()
        shrunk = None if size is None else _shrunk(images.image(index), size, quality)
        suffix, content = (suffix, content) if shrunk is None else (".jpg", shrunk)
    except StoppedError:
        raise
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


def _shrunk(image: Any, size: int, quality: int) -> bytes | None:
    """An upright RGB image as a JPEG of that shorter side; None: it is no larger."""
    width, height = image.size
    if min(width, height) <= size:
        return None
    scale = size / min(width, height)
    file = io.BytesIO()
    smaller = image.resize((max(size, round(width * scale)), max(size, round(height * scale))), Image.Resampling.BICUBIC)
    smaller.save(file, "JPEG", quality=quality)
    return file.getvalue()


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
