"""Pack images into tar shards, for disks and networks that are slow with many small files, and for loaders that starve.

    hgkd make-shards photos shards --max-mb 500
    hgkd make-shards photos shards256 --size 256
    hgkd train CONFIG --cfg-options data_root=shards

Without --size the files' bytes are copied as they are, so the images are the same. With it images are stored upright as JPEG,
the shorter side shrunk to that many pixels (smaller ones are copied), and decode faster (docs/howto/scaling.md). The webdataset
library writes shards in its layout, and reads them. They appear complete, one after the other; a folder whose packing did not
come to its end is refused as data. A source is whatever a data_root may be: folders, shards, tables, addresses.
pip install 'hgkd[shards]'.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hgkd.api.make_shards import make_shards
from hgkd.cli.common import command, command_parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("source", help="folder of images, at any depth, or what else a data_root may be")
    parser.add_argument("out", help="folder to make")
    parser.add_argument("--max-mb", type=float, default=500, help="a shard's size, about (default 500)")
    parser.add_argument("--max-images", type=int, default=100_000, help="a shard's images at most")
    parser.add_argument("--list-file", help="text file naming the images, one a line, relative to the folder")
    parser.add_argument("--size", type=int, help="shorter side in pixels; larger images are shrunk to it and stored as JPEG")
    parser.add_argument("--quality", type=int, default=90, help="of these JPEGs, 1 to 100 (default 90)")
    parser.add_argument(
        "--value-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="with --size: black and white in images of more bits",
    )
    parser.add_argument(
        "--in-chans", type=int, help="channels of the images, where they are not RGB; NumPy arrays are packed, too"
    )
    return parser.parse_args(argv)


@command
def main(argv: Sequence[str]) -> int:
    count, shards = make_shards(**vars(parse_args(argv)))
    size = sum(shard.stat().st_size for shard in shards)
    print(f"{count} images in {len(shards)} shards, {size / 1e6:.1f} MB: {shards[0].parent}")
    return 0
