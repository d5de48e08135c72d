"""Train what a config describes: teacher pretraining, distillation, their controls, detectors and segmentors.

    hgkd train configs/hgkd/hgkd_vit-s14_resnet18_10e_cifar128.py --cfg-options data_root=photos epochs=5

configs/README.md lists the short options, docs/howto/downstream.md those of detectors and segmentors; any other key of a config
can be set by its dotted path. ``--dry-run`` says what a training needs before it is started. SIGTERM and SIGINT save and end a
run with exit code 0; ``--resume`` continues it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hgkd.api.train import leave_group, load_config, train
from hgkd.cli.common import add_config_options, add_launcher, command, command_parser
from hgkd.cli.option_help import help_text
from hgkd.diagnosis.dry_run import dry_run
from hgkd.openmmlab.config import is_downstream
from hgkd.openmmlab.runner import dry_run_downstream
from hgkd.training.loop import told_signals

TRAIN_EXAMPLES = """\
  hgkd train configs/spark/spark_resnet18_10e_cifar128.py --dry-run --cfg-options \\
      data_root=photos val_train_root=None val_test_root=None
  hgkd train configs/spark/spark_resnet18_10e_cifar128.py --work-dir work_dirs/a --cfg-options \\
      data_root=photos val_train_root=None val_test_root=None epochs=5 model.student.stem=cifar
  hgkd train configs/spark/spark_resnet18_10e_cifar128.py --work-dir work_dirs/a --resume --cfg-options \\
      data_root=photos val_train_root=None val_test_root=None epochs=5 model.student.stem=cifar
  torchrun --nproc_per_node 8 -m hgkd train CONFIG --launcher pytorch --amp --cfg-options data_root=photos"""
TRAIN_CODES = {
    0: "trained to the end, or stopped by SIGTERM or SIGINT with a checkpoint",
    1: "a fault of the program, with a traceback",
    2: "a mistake in config, options or files, or a training that cannot go on: the message says what to do",
}


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser(
        "Train what a config describes: a teacher, a masked student, a classifier, a detector or a segmentor."
    )
    parser.epilog = help_text(TRAIN_EXAMPLES, TRAIN_CODES)
    parser.add_argument(
        "config",
        help="name of a shipped recipe ('hgkd recipes'), or a config file: Python, which runs as a program, or plain data in "
        "YAML or JSON; 'mmdet::FOLDER/NAME.py' and 'mmseg::...' are those that OpenMMLab ships",
    )
    parser.add_argument("--work-dir", help="folder for logs, checkpoints and pictures (work_dirs/<config name>)")
    parser.add_argument(
        "--resume", nargs="?", const=True, default=False, metavar="PATH", help="continue from PATH, or from the last checkpoint"
    )
    parser.add_argument("--amp", action="store_true", help="mixed precision: bfloat16, on GPUs without it float16")
    add_config_options(parser, "override keys of the config: the short options below, or any key by its dotted path")
    add_launcher(parser)
    parser.add_argument("--dry-run", action="store_true", help="build all, do two steps, say what a training needs, and stop")
    return parser.parse_args(arguments)


@command
def main(argv: Sequence[str]) -> int:
    args = parse_args(argv)
    if args.dry_run:
        cfg = load_config(args.config, args.work_dir, False, args.amp, args.cfg_options, args.launcher)
        print(dry_run_downstream(cfg) if is_downstream(cfg) else dry_run(cfg))
        return 0
    with told_signals():
        train(args.config, args.work_dir, args.resume, args.amp, args.cfg_options, args.launcher)
        leave_group()
    return 0
