"""The main job on generated images, from nothing to a report.

    hgkd demo --out demo_out [--quick] [--seed 0]

Images are drawn; a small MAE is pretrained on them and becomes the teacher; a sparse ResNet-18 learns from it with H-GKD;
the pixel control (SparK's objective) gets the same images, steps and decoder; random / pixels / H-GKD / teacher are compared
by k-NN and linear probe; the student is exported; everything is put on one page.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hgkd.api.demo import (
    demo,
)
from hgkd.cli.common import command, command_parser
from hgkd.training.loop import told_signals


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--out", default="demo_out", help="folder for the results, new or empty")
    parser.add_argument("--quick", action="store_true", help="a short run: that everything works, not how well")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    return parser.parse_args(argv)


@command
def main(argv: Sequence[str]) -> int:
    args = parse_args(argv)
    with told_signals("no report is written"):
        demo(args.out, args.quick, args.seed)
    return 0
