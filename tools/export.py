"""Write the encoder of a checkpoint as ordinary dense weights, read it back and compare outputs.

python tools/export.py work_dirs/run/epoch_100.pth --to timm --out exported/resnet18
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hgkd.export import TARGETS, ExportError, ExportReport, export_backbone


def table_of(report: ExportReport) -> Table:
    table = Table(title=f"exported to {report.out}", show_header=False)
    rows = {
        "encoder": f"{report.encoder['name']}, stem {report.encoder['stem']}",
        "weights": f"{report.tensors} tensors, {report.parameters:,} parameters",
        "proof": f"read back, forward_features differs by {report.max_difference:.1e}",
        "read with": report.loaded_with,
        "source sha256": report.source_sha256,
        **{f"note {i}": note for i, note in enumerate(report.notes, start=1)},
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    return table


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help=".pth file that tools/train.py wrote")
    parser.add_argument("--to", default="timm", help=f"target: {', '.join(TARGETS)}")
    parser.add_argument("--out", required=True, help="folder to make")
    parser.add_argument("--force", action="store_true", help="replace an earlier export")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        report = export_backbone(**vars(parse_args(argv)))
    except (ValueError, FileNotFoundError, FileExistsError, ExportError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 2
    Console().print(table_of(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
