"""Run an exported folder on images, a video or a camera, with its own runtime. The folder alone is read.

    hgkd predict exported/classifier photos --out predicted
    hgkd predict exported/detector street.mp4 --out predicted --threads 2 --score-threshold 0.5
    hgkd predict exported/backbone photos --gallery labelled --out predicted
    ffmpeg -i rtsp://camera -f mjpeg - | hgkd predict exported/detector - --out predicted

INPUT is an image, a folder, a .txt list, a video, a camera (its number, /dev/video0 or an address), or - for JPEGs on standard
input. DIR/predictions.jsonl gets a line a frame, DIR/pictures the frames with what was found, DIR/label_maps the maps of a
segmentor, DIR/features.npy the features of a backbone. Frames a second are medians, the first three left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hgkd.api.predict import RESULTS, predict
from hgkd.cli.common import command, command_parser
from hgkd.export.targets.graphs import PRECISIONS


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("folder", help="folder that hgkd export wrote")
    parser.add_argument("source", metavar="INPUT", help="image, folder, .txt list, video, camera, or -")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for results and pictures (default: print them only)")
    parser.add_argument("--runtime", help="target whose runtime is used (default: the folder's own; openvino also reads ONNX)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--precision", default=PRECISIONS[0], help=f"file to use, of {', '.join(PRECISIONS)}")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="labels a frame (default: %(default)s)")
    parser.add_argument(
        "--score-threshold", type=float, metavar="S", help="leave out lower scores (default: 0.3 for boxes, 0 for labels)"
    )
    parser.add_argument("--gallery", metavar="DIR", help="class folders whose nearest images name the class, for backbones")
    parser.add_argument("--neighbours", type=int, default=5, metavar="K", help="of its images that vote (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="stop after N frames")
    parser.add_argument("--no-pictures", dest="pictures", action="store_false", help="draw nothing")
    parser.add_argument(
        "--value-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="black and white of more than 8 bits (default: recorded)",
    )
    return parser.parse_args(argv)


def line_of(found: dict[str, Any]) -> str:
    """A frame's result in one line."""
    if "error" in found:
        return f"{found['image']}: not read ({found['error']})"
    if "objects" in found:
        told = ", ".join(f"{one['label']} {one['score']:.2f}" for one in found["objects"][:5]) or "nothing"
        told += f" and {len(found['objects']) - 5} more" if len(found["objects"]) > 5 else ""
    elif "classes" in found:
        told = ", ".join(f"{name} {100 * share:.0f} %" for name, share in list(found["classes"].items())[:5])
    elif "top" in found:
        told = ", ".join(f"{one['label']} {one['score']:.2f}" for one in found["top"]) or "nothing"
    else:
        told = f"features, row {found['row']}"
    return f"{found['image']}: {told}"


@command
def main(argv: Sequence[str]) -> int:
    """0; 1 where an image could not be read."""
    args = vars(parse_args(argv))
    report = predict(**args, told=lambda found: print(line_of(found), flush=True))
    print(report.about)
    print(
        f"{report.frames} frames: {report.frames_per_s:.1f} a second, {report.frame_ms:.1f} ms each, of which "
        f"{report.run_ms:.1f} ms in the runtime (medians, warm)"
    )
    if report.failed:
        print(f"{len(report.failed)} images could not be read")
    if args["out"] is not None:
        print(f"written to {args['out'] / RESULTS}")
    return int(bool(report.failed))
