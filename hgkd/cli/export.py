"""Write a student in the form that its users load, read it back, compare outputs.

hgkd export work_dirs/run/epoch_100.pth --to timm --out exported/resnet18
hgkd export work_dirs/run/epoch_100.pth --to onnx --precision fp16 int8 --images photos --out exported/edge
hgkd export work_dirs/bccd --part model --to onnx --images photos --out exported/bccd
hgkd export spark_resnet50.pth --encoder resnet50 --to mmdet --out exported/spark
hgkd export work_dirs/run/epoch_100.pth --to timm --out exported/resnet18 --push user/name --private

A weight file of another project (SparK, ConvNeXt, mmpretrain, torchvision, transformers, timm) is read with --encoder NAME.
docs/howto/export.md describes the targets.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hgkd.cli.common import command, command_parser, print_table
from hgkd.config.reading import read_config
from hgkd.errors import InvalidValueError
from hgkd.export import PARTS, TARGETS, ExportReport, export
from hgkd.export.hub import check_push, push_export
from hgkd.export.targets.graphs import OUTPUTS, PRECISIONS
from hgkd.training.loop import told_signals

_OPTIONS = ("cell", "output", "classifier", "opset", "ir_version", "precision", "fixed_size")


def table_of(report: ExportReport) -> Table:
    table = Table(title=f"exported to {report.out}", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # a checksum is longer than what a narrow terminal leaves
    compared = "random images" + (f" and {report.images} real ones" if report.images else "")
    outputs = "" if report.part == "model" else f"; outputs on {compared} differ by {report.max_difference:.1e}"
    rows = {
        "network": ", ".join(str(value) for value in report.network.values() if value),
        "weights": f"{report.tensors} tensors, {report.parameters:,} parameters",
        "proof": f"read back with {report.proven_with}{outputs}",
        "read with": report.loaded_with,
        "source sha256": report.source_sha256,
        "files": ", ".join(f"{name} ({size / 1e6:.1f} MB)" for name, size in report.files.items()),
        **{f"note {i}": note for i, note in enumerate(report.notes, start=1)},
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    return table


def graphs_table(rows: Sequence[dict[str, Any]], part: str) -> Table:
    """Sizes, agreement and latency of graphs."""
    with_what = "the library's own inference" if part == "model" else "fp32"
    table = Table(title=f"graphs; agreement with {with_what} is measured on real images that calibrated nothing")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column)
    for row in rows:
        values = [row.get(column, "") for column in columns]
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values))
    return table


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("checkpoint", help=".pth file that hgkd train wrote; with --encoder, a weight file of another project")
    parser.add_argument("--to", default="timm", help="; ".join(f"{name}: {t.summary}" for name, t in TARGETS.items()))
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--part", default="backbone", help=f"part of the checkpoint: {', '.join(PARTS)}")
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    parser.add_argument("--images", metavar="DIR", help="images for the proof, and for int8's calibration")
    parser.add_argument("--max-images", type=int, default=64, metavar="N", help="use N of them at most (default 64)")
    parser.add_argument("--labels", action="store_true", help="they lie in one folder a class: fp16 and int8 get an accuracy")
    parser.add_argument(
        "--image-size",
        type=int,
        nargs="+",
        metavar="SIDE",
        help="pixels that a backbone is used at, SIDE or H W: of the proof, of int8's calibration, of graphs of one size "
        "(default: the run's own; of a file that does not say it timm's for the network, 224 of most)",
    )
    parser.add_argument(
        "--value-range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="black and white in images of more than 8 bits (default: the run's)",
    )
    parser.add_argument(
        "--licence", nargs="+", default=[], metavar="FIELD=TEXT", help="for the cards: weights=, teacher=, data="
    )
    parser.add_argument("--encoder", help="timm's name of the network in a weight file of another project")
    parser.add_argument("--prefix", help="prefix of its names in the file, when it cannot be found")
    parser.add_argument(
        "--allow", nargs="+", default=[], metavar="NAME", help="beginnings of names that may be missing or left over"
    )
    parser.add_argument(
        "--config", metavar="FILE", help="config whose custom_imports bring a target, or a network, of your own"
    )
    parser.add_argument("--push", metavar="USER/NAME", help="timm, transformers: send it to the Hugging Face hub by your login")
    parser.add_argument("--private", action="store_true", help="with --push: for your eyes only")
    options = parser.add_argument_group("options of single targets")
    options.add_argument("--cell", type=int, help="sparse: side of a mask cell in pixels")
    options.add_argument("--output", help=f"graphs: {', '.join(OUTPUTS)} (default pooled)")
    options.add_argument("--classifier", metavar="FILE", help="graphs: safetensors with weight and bias, for --output logits")
    options.add_argument(
        "--opset", type=int, help="onnx: version of the operators (default: the lowest that the network allows)"
    )
    options.add_argument(
        "--ir-version", type=int, help="onnx: version of the format (default: the lowest that the opset allows)"
    )
    options.add_argument("--precision", nargs="+", help=f"onnx and edge runtimes: further ones, of {', '.join(PRECISIONS[1:])}")
    options.add_argument(
        "--fixed-size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="onnx, openvino, of --part model: the only size of pictures that the graph takes (default: any)",
    )
    options.add_argument(
        "--with-preprocessing",
        dest="preprocessing",
        nargs="?",
        const="nhwc",
        metavar="LAYOUT",
        help="graphs that take uint8 as image libraries give it, range, mean and std inside: nhwc-rgb (PIL, the default), "
        f"nhwc-bgr (OpenCV), nchw-rgb, nchw-bgr ({', '.join(name for name, t in TARGETS.items() if t.preprocessing)})",
    )
    options.add_argument(
        "--latency",
        type=int,
        metavar="SIDE",
        help="graphs: time one image of this side on one and two threads, and peak memory",
    )
    return parser.parse_args(argv)


@command
def main(argv: Sequence[str]) -> int:
    args = vars(parse_args(argv))
    licences = args.pop("licence")
    options = {name: value for name in _OPTIONS if (value := args.pop(name)) is not None}
    if args["image_size"] is not None and len(args["image_size"]) == 1:
        (args["image_size"],) = args["image_size"]
    own = args.pop("config")
    if own is not None:
        read_config(own)  # imports what it names
    repo, private = args.pop("push"), args.pop("private")
    if repo is not None:
        check_push(repo, args["to"])
    elif private:
        raise InvalidValueError("private-without-push", "--private is about --push USER/NAME; give both, or leave it out")
    with told_signals("no folder is written"):  # an exception, so that the hidden folder that is being filled goes
        report = export(**args, licences=dict(_pair(text) for text in licences), **options)
    console = Console()
    console.print(table_of(report))
    if report.table:
        print_table(graphs_table(report.table, report.part))
    if repo is not None:
        console.print(f"sent to {push_export(report.out, repo, private)}{' (private)' if private else ''}", soft_wrap=True)
    return 0


def _pair(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise InvalidValueError("licence-not-a-pair", f"--licence takes FIELD=TEXT, e.g. weights=apache-2.0, got {text!r}")
    return name, value
