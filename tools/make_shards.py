"""Pack a folder or list of images into tar shards, for disks and networks that are slow with many small files.

    python tools/make_shards.py photos shards --max-mb 500
    python tools/train.py CONFIG --cfg-options data_root=shards

The files' bytes are copied as they are, so the images are the same; the webdataset library writes them in its layout, and reads
them. Shards appear complete, one after the other. pip install 'hgkd[shards]'.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from hgkd.data import UnlabelledImages
from hgkd.errors import USER_ERRORS

_PARTIAL = ".partial"


def make_shards(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    max_mb: float = 500,
    max_images: int = 100_000,
    list_file: str | os.PathLike[str] | None = None,
) -> tuple[int, list[Path]]:
    """Write ``out/images-000000.tar`` and so on.

    Args:
        source: folder of images, at any depth; with ``list_file`` the root of its paths.
        out: folder to make; must be empty.
        max_mb, max_images: a shard is closed when it holds more than the first (in MB, 10**6 bytes) or as many as the second.
        list_file: text file naming the images, one a line.

    Returns:
        Number of images, and the shards.

    Raises:
        ValueError: webdataset is not installed, or a limit is not positive.
        FileNotFoundError, FileExistsError, DataError: no source, ``out`` is in use, or there are no images.
    """
    if max_mb <= 0 or max_images < 1:
        raise ValueError(f"max_mb and max_images must be positive, got {max_mb} and {max_images}")
    try:
        from webdataset import ShardWriter
    except ImportError as error:
        raise ValueError(f"make_shards needs webdataset ({error}); pip install 'hgkd[shards]'") from error
    images = UnlabelledImages(source, list_file)
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is in use; give a new folder")
    out.mkdir(parents=True, exist_ok=True)
    shards: list[Path] = []

    def complete(name: str) -> None:
        shards.append(Path(name.removesuffix(_PARTIAL)))
        os.replace(name, shards[-1])

    # absolute, or webdataset might take it for an address; with another ending, or it might compress
    pattern = str(out.absolute()).replace("%", "%%") + f"/images-%06d.tar{_PARTIAL}"
    writer = ShardWriter(pattern, max_images, max_mb * 1e6, post=complete, verbose=0, compress=False, encoder=False, mtime=0)
    for index in range(len(images)):
        path = Path(images.path(index))
        # a dot would end the key; the number keeps two files of one name apart
        key = f"{index:09d}_{re.sub(r'[^A-Za-z0-9_-]', '_', path.stem)[:60]}"
        writer.write({"__key__": key, path.suffix[1:].lower(): path.read_bytes()})
    writer.close()  # not in a `with`, which would complete a shard that an error has cut short
    return len(images), shards


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="folder of images, at any depth")
    parser.add_argument("out", help="folder to make")
    parser.add_argument("--max-mb", type=float, default=500, help="a shard's size, about (default 500)")
    parser.add_argument("--max-images", type=int, default=100_000, help="a shard's images at most")
    parser.add_argument("--list-file", help="text file naming the images, one a line, relative to the folder")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        count, shards = make_shards(**vars(parse_args(argv)))
    except (*USER_ERRORS, OSError) as error:
        print(f"make_shards: {error}", file=sys.stderr)
        return 2
    size = sum(shard.stat().st_size for shard in shards)
    print(f"{count} images in {len(shards)} shards, {size / 1e6:.1f} MB: {shards[0].parent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
