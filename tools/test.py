"""Evaluate a trained model on the test images of its config.

    python tools/test.py downstream/classification/resnet18_20e_cifar128.py WORK_DIR/best_accuracy_top1_epoch_20.pth \\
        --cfg-options val_root=data/cifar10/test --json result.json

Give the options that the training got (``num_classes``, ``image_size``, ...). Tables and pictures go into ``--work-dir``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.runner import Runner

from hgkd.engine import load_config
from hgkd.registry import RUNNERS


def run_test(
    config: str | os.PathLike[str] | Config,
    checkpoint: str | os.PathLike[str],
    work_dir: str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
    launcher: str = "none",
) -> dict[str, float]:
    """Metrics of a checkpoint: name -> value.

    Args:
        config: file, or a loaded config.
        checkpoint: of the model that the config describes.
        work_dir: folder for logs and reports; None: ``work_dirs/<name of the config>``.
        options: overrides, short options or dotted paths -> values.
        launcher: 'none', 'pytorch' (torchrun) or 'slurm'.

    Raises:
        ValueError, TypeError, FileNotFoundError: something in the config or the files it names is wrong.
    """
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f"checkpoint does not exist: {checkpoint}")
    cfg = load_config(config, work_dir, options=options, launcher=launcher, testing=True)
    cfg.load_from = str(checkpoint)
    runner: Runner = RUNNERS.build(cfg)
    return {name: float(value) for name, value in runner.test().items()}


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate a trained model on the test images of its config.")
    parser.add_argument("config", help="the config that it was trained with")
    parser.add_argument("checkpoint", help="checkpoint of tools/train.py")
    parser.add_argument("--work-dir", help="folder for logs and reports (work_dirs/<config name>)")
    parser.add_argument("--json", metavar="FILE", help="write the metrics into this file")
    parser.add_argument(
        "--cfg-options", nargs="+", action=DictAction, default={}, metavar="KEY=VALUE", help="override keys of the config"
    )
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm"), default="none", help="how processes were started")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_args(arguments)
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    try:
        metrics = run_test(args.config, args.checkpoint, args.work_dir, args.cfg_options, args.launcher)
    except (ValueError, TypeError, FileNotFoundError) as error:
        if args.debug:
            raise
        print(f"error: {error}\n(--debug shows where it comes from)", file=sys.stderr)
        return 2
    text = json.dumps(metrics, indent=2)
    print(text)
    if args.json:
        Path(args.json).write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
