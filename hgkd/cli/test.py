"""Measure a trained classifier, detector or segmentor: top-1, box and mask AP, mIoU, whatever its config's evaluator says.

    hgkd test downstream/detection/faster-rcnn_r18_12e_bccd.py work_dirs/bccd/epoch_12.pth --json bccd.json \\
        --cfg-options data_root=~/bccd

The options of the training that change the data or the model are given again; a teacher is not needed. The checkpoint must
fit the model entirely. A config without test images of its own is tested on those of its validation.

``--json`` of a classifier is what hgkd evaluate writes, the outcome of every image included, so that 'hgkd evaluate
compare' takes it; of a detector or segmentor, the metrics.
"""

from __future__ import annotations

from collections.abc import Sequence

from hgkd.api.test import run_test
from hgkd.api.train import leave_group
from hgkd.cli.common import add_config_options, add_launcher, command, command_parser
from hgkd.cli.option_help import help_text
from hgkd.training.loop import told_signals

EXAMPLES = """\
  hgkd test downstream/classification/resnet18_10e_cifar128.py work_dirs/a --json a.json \\
      --cfg-options val_root=data/test
  hgkd test downstream/detection/faster-rcnn_r18_12e_bccd.py work_dirs/bccd/epoch_12.pth --json bccd.json \\
      --cfg-options data_root=~/bccd"""
CODES = {
    0: "measured",
    1: "a fault of the program, with a traceback",
    2: "a mistake in config, options or files, or nothing could be measured: the message says what to do",
}


@command
def main(argv: Sequence[str]) -> int:
    parser = command_parser("Measure a trained classifier, detector or segmentor by the evaluator of its config.")
    parser.epilog = help_text(EXAMPLES, CODES)
    parser.add_argument("config", help="the config that trained it, or the one that lies in its work folder")
    parser.add_argument(
        "checkpoint",
        help="its checkpoint; its work folder: the last one there; or a folder of 'hgkd export --part model --to onnx'",
    )
    parser.add_argument("--work-dir", help="folder for log and reports (a temporary one)")
    parser.add_argument("--json", metavar="FILE", help="write the result to this file")
    parser.add_argument("--csv", metavar="FILE", help="append a classifier's line to this file, as 'hgkd evaluate' does")
    add_config_options(parser, "options of the training that change data or model, given again: short options, or dotted paths")
    add_launcher(parser)
    args = parser.parse_args(argv)
    with told_signals("no result is written"):
        metrics = run_test(args.config, args.checkpoint, args.work_dir, args.cfg_options, args.launcher, args.json, args.csv)
        leave_group()
    for name, value in metrics.items():
        print(f"{name:<24} {value:.4g}")
    return 0
