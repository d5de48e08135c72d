"""Write a data set of generated shapes: class folders, COCO instances or ADE20K segmentation.

Example:
    hgkd make-shapes data/shapes --layout imagefolder --train 4000 --test 800 --image-size 96
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hgkd.cli.common import command, command_parser
from hgkd.data.shapes import CLASSES, write_ade20k, write_coco, write_imagefolder
from hgkd.errors import ExistingFileError, InvalidValueError, unknown_name_message
from hgkd.writing import writing

WRITERS = {"imagefolder": write_imagefolder, "coco": write_coco, "ade20k": write_ade20k}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser(f"{__doc__}\nThe {len(CLASSES)} classes: {', '.join(CLASSES)}.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    parser.add_argument("--layout", choices=sorted(WRITERS), default="imagefolder", help="default: %(default)s")
    parser.add_argument("--train", type=int, default=800, help="number of training images (default: %(default)s)")
    parser.add_argument("--test", type=int, default=200, help="number of test images (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=96, help="side in pixels (default: %(default)s)")
    parser.add_argument(
        "--plain",
        action="store_false",
        dest="clutter",
        help="one bright, smooth object on a dark ground: what minutes of training suffice for",
    )
    parser.add_argument("--seed", type=int, default=0, help="another seed, another data set (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="write into a folder that is not empty; nothing in it is deleted")
    return parser.parse_args(argv)


def make_shapes(
    out: Path,
    layout: str = "imagefolder",
    train: int = 800,
    test: int = 200,
    image_size: int = 96,
    clutter: bool = True,
    seed: int = 0,
    force: bool = False,
) -> int:
    """Write the data set.

    Returns:
        Number of images written.

    Raises:
        FileExistsError: ``out`` is a file, or a folder with something in it and ``force`` is not set.
        ValueError: unknown layout, or a number out of range.
    """
    if layout not in WRITERS:
        raise InvalidValueError("layout-unknown", unknown_name_message("layout", layout, WRITERS))
    if seed < 0:
        raise InvalidValueError("seed-negative", f"seed must be 0 or more, got {seed}")
    if out.exists() and not out.is_dir():
        raise ExistingFileError("output-is-a-file", f"{out} is a file; give a folder")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise ExistingFileError("folder-not-empty", f"{out} is not empty; give a new folder, or --force to write into this one")
    return WRITERS[layout](out, train=train, test=test, image_size=image_size, seed=seed, clutter=clutter)


@command
def main(argv: Sequence[str]) -> int:
    args = parse_args(argv)
    with writing(args.out, f"{args.out} is not complete: make room, remove it and write it again"):
        written = make_shapes(**vars(args))
    print(f"{written} images in {args.out} ({args.layout})")
    return 0
