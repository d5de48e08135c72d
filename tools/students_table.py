"""Fill the tables of docs/students.md: every family of timm, and members of other libraries, how exact and how fast.

    python tools/students_table.py [--only resnet18 ...] [--repeats 3]

Parity is that of the shortened member that the tests use, in float64. The speed-up is that of the whole member's step
(forward and backward, fp32) over the ordinary dense network, on this machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from hgkd.api.benchmark import encoder_step, measure_times
from hgkd.masking import RandomMask
from hgkd.networks.members import LIBRARY_FAMILIES, LIBRARY_REFUSED, Member
from hgkd.sparse import measure_parity, sparsify
from hgkd.sparse.families import FAMILIES, REFUSED, Family

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
    model = family.build(short=False).to(memory_format=torch.channels_last).train()
    images = torch.randn(BATCH, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    mask = RandomMask(MASK_RATIO)
    grid = (SIZE // CELL, SIZE // CELL)
    steps = {
        "gather": encoder_step(sparsify(model, CELL), images, lambda: mask(BATCH, grid, device="cpu"), "cpu", "fp32"),
        "dense": encoder_step(model, images, None, "cpu", "fp32"),
    }
    times, _ = measure_times(steps, repeats=repeats, clock="cpu")
    return statistics.median(times["dense"]) / statistics.median(times["gather"])


def _apart(function: Callable[..., float], *args: Any) -> float | None:
    """``function(*args)`` in a process of its own; None when that crashed.

    Some ordinary dense networks kill torch on the CPU in channels_last: a strided 1x1 convolution of fewer than 16 channels
    writes past its workspace in the backward (uxlfoundation/oneDNN, issue 6035), and RepVGG's stem has one.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool:
            return None


def families_table(families: Sequence[Family | Member], repeats: int) -> str:
    """The table of supported families, markdown."""
    lines = ["| family | member | parity error | step over dense |", "|---|---|---|---|"]
    for family in families:
        ratio = _apart(speedup, family, repeats)
        ratio = "dense crashes" if ratio is None else f"{ratio:.2f}x"
        lines.append(f"| {family.name} | `{family.member}` | {_apart(parity_error, family):.0e} | {ratio} |")
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


def fill(text: str, table: str) -> str:
    """``text`` with the part between the two markers replaced.

    Raises:
        ValueError: a marker is missing.
    """
    if BEGIN not in text or END not in text:
        raise ValueError(f"docs/students.md needs the lines {BEGIN.strip()!r} and {END.strip()!r} round its table")
    return text[: text.index(BEGIN) + len(BEGIN)] + table + text[text.index(END) :]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="MEMBER", help="print the rows of these members, change no file")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    chosen = [family for family in (*FAMILIES, *LIBRARY_FAMILIES) if args.only is None or family.member in args.only]
    if args.only is not None:
        families_table(chosen, args.repeats)
        return 0
    page = ROOT / "docs/students.md"
    table = f"Measured on {machine()}.\n\n{families_table(chosen, args.repeats)}\nRefused:\n\n{refused_table()}"
    page.write_text(fill(page.read_text(), table))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
