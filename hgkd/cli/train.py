"""Train what a config describes: teacher pretraining, distillation, their controls, detectors and segmentors.

    python tools/train.py configs/hgkd/hgkd_vit-s14_resnet18_10e_cifar128.py --cfg-options data_root=photos epochs=5

configs/README.md lists the short options, docs/downstream.md those of detectors and segmentors; any other key of a config can
be set by its dotted path. ``--dry-run`` says what a training needs before it is started. SIGTERM and SIGINT save and end a run
with exit code 0; ``--resume`` continues it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

from hgkd.api.train import leave_group, load_config, train
from hgkd.engine import SHORT_OPTIONS
from hgkd.engine.dry_run import dry_run
from hgkd.engine.loop import told_signals
from hgkd.engine.options import OptionsAction
from hgkd.errors import USER_ERRORS
from hgkd.openmmlab import is_downstream, rehearse
from hgkd.openmmlab.config import SHORT_OPTIONS as DOWNSTREAM_OPTIONS

TRAIN_EXAMPLES = """\
  python tools/train.py configs/spark/spark_resnet18_10e_cifar128.py --dry-run --cfg-options \\
      data_root=photos val_train_root=None val_test_root=None
  python tools/train.py configs/spark/spark_resnet18_10e_cifar128.py --work-dir work_dirs/a --cfg-options \\
      data_root=photos val_train_root=None val_test_root=None epochs=5 model.student.stem=cifar
  python tools/train.py configs/spark/spark_resnet18_10e_cifar128.py --work-dir work_dirs/a --resume --cfg-options \\
      data_root=photos val_train_root=None val_test_root=None epochs=5 model.student.stem=cifar
  torchrun --nproc_per_node 8 tools/train.py CONFIG --launcher pytorch --amp --cfg-options data_root=photos"""
TRAIN_CODES = {
    0: "trained to the end, or stopped by SIGTERM or SIGINT with a checkpoint",
    1: "a fault of the program, with a traceback",
    2: "a mistake in config, options or files, or a training that cannot go on: the message says what to do",
}


def help_text(examples: str, codes: Mapping[int, str]) -> str:
    """What --help says after the arguments: the short options, how options win, examples and exit codes."""
    lines = ["short options of pretraining and fine-tuning (for --cfg-options):"]
    lines += [f"  {name:<18} {option.help}" for name, option in SHORT_OPTIONS.items()]
    lines += ["", "short options of detectors and segmentors:"]
    lines += [f"  {name:<18} {text}" for name, text in DOWNSTREAM_OPTIONS.items()]
    lines += [
        "",
        "The command line wins over the config, and a config over those in its _base_. A short option and the dotted path that",
        "it stands for are one setting: two different values on the command line are refused. None: not given.",
        "",
        "examples:",
        examples,
        "",
        "exit codes:",
    ]
    return "\n".join([*lines, *(f"  {code}  {text}" for code, text in codes.items())])


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train what a config describes: a teacher, a masked student, a classifier, a detector or a segmentor.",
        epilog=help_text(TRAIN_EXAMPLES, TRAIN_CODES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "config",
        help="config file: Python, which runs as a program, or plain data in YAML or JSON; "
        "'mmdet::FOLDER/NAME.py' and 'mmseg::...' are those that OpenMMLab ships",
    )
    parser.add_argument("--work-dir", help="folder for logs, checkpoints and pictures (work_dirs/<config name>)")
    parser.add_argument(
        "--resume", nargs="?", const=True, default=False, metavar="PATH", help="continue from PATH, or from the last checkpoint"
    )
    parser.add_argument("--amp", action="store_true", help="mixed precision: bfloat16, on GPUs without it float16")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        action=OptionsAction,
        default={},
        metavar="KEY=VALUE",
        help="override keys of the config: the short options below, or any key by its dotted path",
    )
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm"), default="none", help="how processes were started")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="build all, do two steps, say what a training needs, and stop")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_args(arguments)
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    try:
        if args.dry_run:
            cfg = load_config(args.config, args.work_dir, False, args.amp, args.cfg_options, args.launcher)
            print(rehearse(cfg) if is_downstream(cfg) else dry_run(cfg))
            return 0
        with told_signals():
            train(args.config, args.work_dir, args.resume, args.amp, args.cfg_options, args.launcher)
            leave_group()
    except USER_ERRORS as error:
        if args.debug:
            raise
        print(f"error: {error}\n(--debug shows where it comes from)", file=sys.stderr)
        return 2
    return 0
