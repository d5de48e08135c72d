"""``hgkd doctor students``: its options, and its answer as text."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.table import Table

from hgkd.api.choose_student import DEFAULT_NAMES, Choice, choose_students
from hgkd.api.student_table import StudentRow
from hgkd.cli.common import print_table
from hgkd.export import TARGETS


def add_students_options(parser: argparse.ArgumentParser) -> None:
    timed = ", ".join(name for name, target in TARGETS.items() if target.runner is not None)
    parser.add_argument("--budget-ms", type=float, required=True, metavar="MS", help="largest median time of one image")
    parser.add_argument("--runtime", default="openvino", help=f"of {timed} (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--size", type=int, default=224, help="side of the images in pixels (default: %(default)s)")
    parser.add_argument(
        "--names",
        nargs="+",
        default=DEFAULT_NAMES,
        metavar="GLOB",
        help=f"timm's names or patterns of them (default: {' '.join(DEFAULT_NAMES)})",
    )
    parser.add_argument("--limit", type=int, default=16, metavar="N", help="measure N networks at most (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=30, metavar="N", help="images of the median (default: %(default)s)")
    parser.add_argument(
        "--no-speedup",
        dest="speedup",
        action="store_false",
        help="do not measure the sparse training step; it is taken from --table where that has it",
    )
    parser.add_argument(
        "--table",
        dest="tables",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="tables of other machines, to be listed",
    )
    parser.add_argument(
        "--no-measure", dest="measure", action="store_false", help="measure nothing, list --table and --out alone"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=".json or .csv; a stopped run goes on from it, other machines read it"
    )
    parser.add_argument("--machine", metavar="NAME", help="this machine's name in the table (default: its processor's)")


def run_students(args: argparse.Namespace) -> int:
    """0: something fits; 1: nothing does."""
    options = {name: value for name, value in vars(args).items() if name not in ("command", "debug")}
    choice = choose_students(told=lambda line: print(line, flush=True), **options)
    for title, rows in ((f"within {args.budget_ms:g} ms", choice.fits), (f"over {args.budget_ms:g} ms", choice.slow)):
        if rows:
            print_table(students_table(f"{title}: {args.runtime}, {args.threads} thread(s), {args.size} px", rows))
    for line in _told(choice):
        print(line)
    return int(not choice.fits)


def students_table(title: str, rows: list[StudentRow]) -> Table:
    table = Table(title=title)
    table.add_column("student", no_wrap=True)
    for column in ("ms", "MB", "M parameters", "M MACs", "sparse step"):
        table.add_column(column, justify="right")
    table.add_column("machine")
    for row in rows:
        speedup = "" if row.speedup is None else f"{row.speedup:.2f}x" + "*" * (row.speedup_of != row.machine)
        numbers = [_number(row.latency_ms), _number(row.file_mb)]
        counts = ["" if count is None else f"{count / 1e6:.2f}" for count in (row.parameters, row.macs)]
        table.add_row(row.student, *numbers, *counts, speedup, row.machine)
    return table


def _told(choice: Choice) -> list[str]:
    lines = list(choice.notes)
    if any(row.speedup is not None and row.speedup_of != row.machine for row in (*choice.fits, *choice.slow)):
        lines.append("*: measured on another machine")
    lines += [f"cannot be a student here: {row.student}: {row.failed}" for row in choice.failed]
    lines += [f"not measured: {name}: {why}" for name, why in choice.passed_over.items()]
    return lines


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
