"""Measure a trained classifier, detector or segmentor: top-1, box and mask AP, mIoU, whatever its config's evaluator says.

    python tools/test.py downstream/detection/faster-rcnn_r18_12e_bccd.py work_dirs/bccd/epoch_12.pth --json bccd.json \\
        --cfg-options data_root=~/bccd

The options of the training that change the data or the model are given again; a teacher is not needed. The checkpoint must
fit the model entirely. A config without test images of its own is tested on those of its validation.

``--json`` of a classifier is what tools/evaluate.py writes, the outcome of every image included, so that 'tools/evaluate.py
compare' takes it; of a detector or segmentor, the metrics.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from hgkd.api.test import run_test
from hgkd.api.train import leave_group
from hgkd.engine.options import OptionsAction
from hgkd.errors import USER_ERRORS

EXAMPLES = """\
  python tools/test.py downstream/classification/resnet18_10e_cifar128.py work_dirs/a --json a.json \\
      --cfg-options val_root=data/test
  python tools/test.py downstream/detection/faster-rcnn_r18_12e_bccd.py work_dirs/bccd/epoch_12.pth --json bccd.json \\
      --cfg-options data_root=~/bccd"""
CODES = {
    0: "measured",
    1: "a fault of the program, with a traceback",
    2: "a mistake in config, options or files, or nothing could be measured: the message says what to do",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Measure a trained classifier, detector or segmentor by the evaluator of its config.",
        epilog=help_text(EXAMPLES, CODES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="the config that trained it, or the one that lies in its work folder")
    parser.add_argument("checkpoint", help="its checkpoint, or its work folder: the last one there")
    parser.add_argument("--work-dir", help="folder for log and reports (a temporary one)")
    parser.add_argument("--json", metavar="FILE", help="write the result to this file")
    parser.add_argument("--csv", metavar="FILE", help="append a classifier's line to this file, as tools/evaluate.py does")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=OptionsAction,
        default={},
        metavar="KEY=VALUE",
        help="options of the training that change data or model, given again: short options, or dotted paths",
    )
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm"), default="none", help="how processes were started")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    try:
        metrics = run_test(args.config, args.checkpoint, args.work_dir, args.cfg_options, args.launcher, args.json, args.csv)
        leave_group()
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, value in metrics.items():
        print(f"{name:<24} {value:.4g}")
    return 0
