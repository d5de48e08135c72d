"""Step time and memory of the sparse engine, and the rate of reading images, as ratios measured in one process.

    hgkd benchmark sparse --student resnet50 --image-size 224 --mask-ratio 0.755 --batch-size 8 \
        --backends gather masked dense [--device cuda --dtype bf16] [--json OUT]
    hgkd benchmark distill configs/hgkd/FILE.py --batch-size 8 --backends gather masked dense \
        [--cfg-options teacher_checkpoint=FILE]
    hgkd benchmark distill configs/hgkd/FILE.py --variant two masks_per_image=2 --variant end unmasked_share=0.2
    hgkd benchmark data --data-root photos --image-size 224 --workers 2
    hgkd benchmark report --device cuda --out DIR [--budget SECONDS]

``sparse``: a step is forward and backward of the encoder. ``distill``: forward and backward of the whole model of a config,
teacher, decoder and losses included; its row 'dense' is the ordinary dense step of the encoder alone, the yardstick that two
machines can be compared by. ``--variant`` adds a row with other options, which says what they cost; its images a second
count images, however many views are made of each. The backends take turns, so that a busy machine slows all of them alike;
the median over the repeats is printed. Where others compute as well, ``--clock cpu`` with one thread is steadier than the
wall clock. Peak memory is that of live tensors during one step beyond what was there before it. On a GPU the share of index
building is the time to launch it.

``data``: images a second of one process by bare decoding, by the data set (decoding, crop, resize, flip), both also with scaled
decoding, by the same images from shards of 256 px and from Parquet (where webdataset and pyarrow are installed), and by a
loader with reading processes, as a training has it. The files are read once before, so the disk does not count.

``report``: all of it on this machine in under 8 minutes: values and gradients against fp64, the kernels, the encoder step, the
whole step, reading. ``DIR/report.md`` can be pasted into docs/background/performance.md, ``report.json`` holds the same
numbers. Exit code 1 where a comparison with fp64 does not hold. ``sparse`` and the engine's parts of ``report`` run without
mmengine.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from hgkd.api.benchmark import (
    CLOCKS,
    DTYPES,
    benchmark_data,
    benchmark_distill,
    benchmark_sparse,
)
from hgkd.api.report import benchmark_report, page
from hgkd.cli.common import add_config_options, command, command_parser, device_name, print_table
from hgkd.errors import InvalidValueError, MissingPackageError
from hgkd.sparse import BACKENDS


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments; those of ``distill`` and ``data`` need mmengine, and nothing else does.

    Raises:
        MissingPackageError: it is not installed.
    """
    full = _has_mmengine()
    if not full and argv and argv[0] in ("distill", "data"):
        raise MissingPackageError(
            "mmengine-missing",
            f"hgkd benchmark {argv[0]} needs mmengine, which is not installed: pip install hgkd; sparse and report run without",
        )
    parser = command_parser(__doc__)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--batch-size", type=int, default=8, help="images a step")
    shared.add_argument(
        "--backends",
        nargs="+",
        default=["gather", "masked", "dense"],
        choices=[*BACKENDS, "dense"],
        help="what is timed: backends of the sparse engine, and the dense network",
    )
    shared.add_argument("--device", type=device_name, default="cpu", help="cpu, cuda, cuda:1, ...")
    shared.add_argument("--dtype", default="fp32", choices=list(DTYPES), help="precision of the forward")
    shared.add_argument("--repeats", type=int, default=7, help="timed steps, whose median counts")
    shared.add_argument(
        "--clock", default="wall", choices=list(CLOCKS), help="cpu: processor time, on a busy machine, with OMP_NUM_THREADS=1"
    )
    shared.add_argument("--json", type=Path, help="write the result here")
    commands = parser.add_subparsers(dest="command", required=True)
    sparse = commands.add_parser("sparse", parents=[shared], help="encoder step of the backends and of the dense network")
    sparse.add_argument("--student", default="resnet50", help="timm name")
    sparse.add_argument("--image-size", type=int, default=224, help="side of the images in pixels")
    sparse.add_argument("--mask-ratio", type=float, default=0.755, help="share of hidden cells (0.755: 12 of 49 visible)")
    sparse.add_argument(
        "--mask",
        default="random",
        choices=["random", "rectangle"],
        help="which cells are visible: any, or one rectangle",
    )
    sparse.add_argument("--cell", type=int, default=32, help="side of a mask cell, pixels")
    distill = commands.add_parser("distill", parents=[shared], help="whole step of a config, teacher included")
    distill.add_argument("config", help="config file")
    if full:
        add_config_options(distill, "override keys")
    distill.add_argument(
        "--variant",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "KEY=VALUE"),
        help="one more row: the recipe with these keys changed, e.g. --variant two-masks masks_per_image=2; may be repeated",
    )
    data = commands.add_parser("data", help="images a second: decoding alone, the data set, a loader")
    data.add_argument("--data-root", required=True, help="folder of images or of tar shards")
    data.add_argument("--image-size", type=int, default=224, help="side of the crops in pixels")
    data.add_argument("--images", type=int, default=256, help="maximum number of images")
    data.add_argument("--workers", type=int, default=2, help="reading processes of the loader")
    data.add_argument("--batch-size", type=int, default=32, help="images a batch")
    data.add_argument("--repeats", type=int, default=5, help="timed passes")
    data.add_argument("--json", type=Path, help="write the result here")
    report = commands.add_parser("report", help="correctness, kernels, steps and reading on this machine, as Markdown and JSON")
    report.add_argument("--device", type=device_name, default="cpu", help="cpu or cuda")
    report.add_argument("--out", type=Path, required=True, help="folder for report.md and report.json")
    report.add_argument("--budget", type=float, default=420.0, help="seconds for all of it (default 420)")
    return parser.parse_args(argv)


def _has_mmengine() -> bool:
    try:
        importlib.import_module("mmengine")
    except ImportError:
        return False
    return True


def data_table(result: dict[str, Any]) -> Table:
    """The result of :func:`benchmark_data` as a table."""
    settings = result["settings"]
    table = Table(
        title=f"{settings['images']} images of {settings['mean_kb']:.0f} kB to {settings['image_size']} px, "
        f"{settings['cpus']} CPUs"
    )
    for column in ("", "images/s", "of decoding"):
        table.add_column(column, justify="right")
    for row in result["results"]:
        table.add_row(row["what"], f"{row['images_per_s']:.0f}", f"{row['of_decoding']:.2f}")
    return table


def steps_table(result: dict[str, Any], compared: Sequence[str]) -> Table:
    """The result as a table.

    Args:
        compared: rows that all others are compared with, a column each.
    """
    settings = result["settings"]
    keep, total = settings["visible_cells"]
    shape = " in one rectangle" if settings.get("mask") == "rectangle" else ""
    table = Table(
        title=f"{settings['student']} {settings['image_size']} px, {keep}/{total} visible{shape} "
        f"(FLOP limit {result['limit']:.2f}x), "
        f"batch {settings['batch_size']}, {settings['dtype']}, {settings['device']}"
    )
    others = [row["backend"] for row in result["results"] if row["backend"] in compared]
    for column in ["backend", "step ms", "images/s", "peak MB", "index %", *[f"over {b}" for b in others]]:
        table.add_column(column, justify="right")
    for row in result["results"]:
        ratios = [f"{row['speedup_over'][b]:.2f}x" if b in row["speedup_over"] else "" for b in others]
        numbers = [f"{row['step_ms']:.0f}", f"{row['images_per_s']:.1f}", f"{row['peak_mb']:.0f}"]
        table.add_row(row["backend"], *numbers, f"{100 * row['index_share']:.1f}", *ratios)
    return table


def variants_of(given: Sequence[Sequence[str]]) -> dict[str, dict[str, Any]]:
    """Name of a row -> overrides, of ``--variant NAME KEY=VALUE ...``.

    Raises:
        ValueError: a variant without a key, or two of one name.
    """
    from hgkd.config.options import option_value

    found: dict[str, dict[str, Any]] = {}
    for name, *pairs in given:
        if "=" in name or not pairs or not all("=" in pair for pair in pairs):
            raise InvalidValueError(
                "variant-without-key",
                f"--variant takes a name and KEY=VALUE, got {' '.join([name, *pairs])!r}; e.g. two masks_per_image=2",
            )
        if name in found:
            raise InvalidValueError("variant-twice", f"two variants are named {name!r}; give each a name of its own")
        found[name] = {key: option_value(key, text) for key, _, text in (pair.partition("=") for pair in pairs)}
    return found


@command
def main(argv: Sequence[str]) -> int:
    args = vars(parse_args(argv))
    name = args.pop("command")
    if name == "report":
        report = benchmark_report(**args)
        print(f"{page(report)}\nwritten to {args['out']}")
        return 0 if report["ok"] else 1
    out = args.pop("json")
    if name == "distill":
        args["options"] = args.pop("cfg_options")
        args["variants"] = variants_of(args.pop("variant"))
    measures: dict[str, Callable[..., dict[str, Any]]] = {
        "sparse": benchmark_sparse,
        "distill": benchmark_distill,
        "data": benchmark_data,
    }
    result = measures[name](**args)
    print_table(data_table(result) if name == "data" else steps_table(result, args["backends"]))
    if out is not None:
        out.write_text(json.dumps(result, indent=1))
        print(f"written to {out}")
    return 0
