"""Write a student in the form that its users load, read it back, compare outputs.

hgkd export work_dirs/run/epoch_100.pth --to timm --out exported/resnet18
hgkd export work_dirs/run/epoch_100.pth --to onnx --precision fp16 int8 --images photos --out exported/edge
hgkd export spark_resnet50.pth --encoder resnet50 --to mmdet --out exported/spark

A weight file of another project (SparK, ConvNeXt, mmpretrain, torchvision, transformers, timm) is read with --encoder NAME.
docs/export.md describes the targets.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hgkd.cli.common import command, command_parser
from hgkd.config.reading import read_config
from hgkd.errors import InvalidValueError
from hgkd.export import PARTS, TARGETS, ExportReport, export
from hgkd.export.targets.graphs import OUTPUTS, PRECISIONS

_OPTIONS = ("cell", "output", "classifier", "opset", "precision")


def table_of(report: ExportReport) -> Table:
    table = Table(title=f"exported to {report.out}", show_header=False)
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


def graphs_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Sizes, agreement with fp32 and latency of graphs."""
    table = Table(title="graphs; agreement with fp32 is measured on real images that calibrated nothing")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column)
    for row in rows:
        values = [row.get(column, "") for column in columns]
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values))
    return table


def with_latency(report: ExportReport, side: int, repeats: int = 20) -> list[dict[str, Any]]:
    """The report's table with the median time of one image (1, C, side, side) on one and two CPU threads, in milliseconds."""
    images = torch.rand(1, report.channels, side, side)
    runner = TARGETS[report.target].runner
    assert runner is not None
    runs = [[runner(report.out / row["file"], threads=threads) for threads in (1, 2)] for row in report.table]
    times: list[list[list[float]]] = [[[], []] for _ in runs]
    for repeat in range(repeats + 3):
        for row, both in zip(times, runs, strict=True):  # in turn, so that a busy machine slows all of them alike
            for taken, run in zip(row, both, strict=True):
                run(images)  # whatever the other runs have put out of the caches, or of ExecuTorch's one pool of threads
                start = time.perf_counter()
                run(images)
                if repeat >= 3:  # the first runs allocate
                    taken.append(1000 * (time.perf_counter() - start))
    medians = [{"ms": statistics.median(one), "ms, 2 threads": statistics.median(two)} for one, two in times]
    return [{**row, **found} for row, found in zip(report.table, medians, strict=True)]


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
        "--value-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="black and white in images of more than 8 bits"
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
    options = parser.add_argument_group("options of single targets")
    options.add_argument("--cell", type=int, help="sparse: side of a mask cell in pixels")
    options.add_argument("--output", help=f"graphs: {', '.join(OUTPUTS)} (default pooled)")
    options.add_argument("--classifier", metavar="FILE", help="graphs: safetensors with weight and bias, for --output logits")
    options.add_argument("--opset", type=int, help="onnx: version of the operators (default 18)")
    options.add_argument("--precision", nargs="+", help=f"onnx and edge runtimes: further ones, of {', '.join(PRECISIONS[1:])}")
    options.add_argument(
        "--latency", type=int, metavar="SIDE", help="onnx and edge runtimes: time one image of this side on the CPU"
    )
    return parser.parse_args(argv)


@command
def main(argv: Sequence[str]) -> int:
    args = vars(parse_args(argv))
    side, licences = args.pop("latency"), args.pop("licence")
    options = {name: value for name in _OPTIONS if (value := args.pop(name)) is not None}
    own = args.pop("config")
    if own is not None:
        read_config(own)  # imports what it names
    target = TARGETS.get(args["to"])
    if side is not None and target is not None and target.runner is None:
        able = ", ".join(name for name, other in TARGETS.items() if other.runner is not None)
        raise InvalidValueError(
            "latency-needs-graphs", f"--latency times graphs ({able}), and {args['to']} is none; leave it out"
        )
    if side is not None and side < 1:
        raise InvalidValueError("latency-size", f"--latency takes the side of an image in pixels, e.g. 224, got {side}")
    report = export(**args, licences=dict(_pair(text) for text in licences), **options)
    console = Console()
    console.print(table_of(report))
    if report.table:
        console.print(graphs_table(report.table if side is None else with_latency(report, side)))
    return 0


def _pair(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise InvalidValueError("licence-not-a-pair", f"--licence takes FIELD=TEXT, e.g. weights=apache-2.0, got {text!r}")
    return name, value
