"""Fill the tables of docs/reference/students.md: every family of timm, and members of other libraries, how exact and how fast.

    python tools/students_table.py [--only resnet18 ...] [--repeats 3]

Parity is that of the shortened member that the tests use, in float64. The speed-up is that of the whole member's step
(forward and backward, fp32) over the ordinary dense network, on this machine.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from hgkd.api.benchmark import in_own_process, sparse_speedup
from hgkd.networks.members import LIBRARY_FAMILIES, LIBRARY_REFUSED, Member
from hgkd.sparse import measure_parity
from hgkd.sparse.families import FAMILIES, REFUSED, Family
from hgkd.writing import filled

ROOT = Path(__file__).resolve().parents[1]

BEGIN, END = "<!-- tools/students_table.py -->\n", "<!-- end -->\n"
SIZE, CELL, BATCH, MASK_RATIO = 128, 32, 4, 0.75


def parity_error(family: Family | Member) -> float:
    """Largest relative error of the shortened member."""
    torch.manual_seed(0)
    return measure_parity(family.build(short=True)).worst


def speedup(family: Family | Member, repeats: int) -> float:
    """Step of the dense network over that of the sparse one."""
    torch.manual_seed(0)
    model = family.build(short=False)
    return sparse_speedup(model, SIZE, CELL, batch_size=BATCH, mask_ratio=MASK_RATIO, repeats=repeats, clock="cpu")


def families_table(families: Sequence[Family | Member], repeats: int) -> str:
    """The table of supported families, markdown."""
    lines = ["| family | member | parity error | step over dense |", "|---|---|---|---|"]
    for family in families:
        ratio = in_own_process(speedup, family, repeats)
        ratio = "dense crashes" if ratio is None else f"{ratio:.2f}x"
        lines.append(f"| {family.name} | `{family.member}` | {in_own_process(parity_error, family):.0e} | {ratio} |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def refused_table() -> str:
    """The table of refused members, markdown."""
    lines = ["| member | layer that is named | why |", "|---|---|---|"]
    lines += [f"| `{member}` | {layer} | {why} |" for member, (layer, why) in REFUSED.items()]
    lines += [f"| `{member}` | {layer} | {why} |" for member, (_, layer, why) in LIBRARY_REFUSED.items()]
    return "\n".join(lines) + "\n"


def machine() -> str:
    """One line on where the numbers come from."""
    visible = round(16 * (1 - MASK_RATIO))
    return (
        f"{torch.get_num_threads()} thread(s) of a machine with {os.cpu_count()} cores ({platform.machine()}), fp32, torch "
        f"{torch.__version__}, {SIZE} px, {visible} of 16 cells visible (FLOP limit {16 / visible:.0f}x), batch {BATCH}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="MEMBER", help="print the rows of these members, change no file")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    chosen = [family for family in (*FAMILIES, *LIBRARY_FAMILIES) if args.only is None or family.member in args.only]
    if args.only is not None:
        families_table(chosen, args.repeats)
        return 0
    page = ROOT / "docs/reference/students.md"
    table = f"Measured on {machine()}.\n\n{families_table(chosen, args.repeats)}\nRefused:\n\n{refused_table()}"
    page.write_text(filled(page.read_text(), BEGIN, END, table, str(page)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
