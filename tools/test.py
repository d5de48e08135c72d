"""Measure a trained classifier, detector or segmentor: top-1, box and mask AP, mIoU, whatever its config's evaluator says.

    python tools/test.py downstream/detection/faster-rcnn_r18_12e_bccd.py work_dirs/bccd/epoch_12.pth --json bccd.json \\
        --cfg-options data_root=~/bccd

The options of the training that change the data or the model are given again. The checkpoint must fit the model entirely. A
config without test images of its own is tested on those of its validation.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import DictAction

sys.path.insert(0, str(Path(__file__).resolve().parent))

from train import USER_ERRORS, load_config

from hgkd.openmmlab import drop_teacher, is_downstream
from hgkd.registry import RUNNERS


def run_test(
    config: str | os.PathLike[str],
    checkpoint: str | os.PathLike[str],
    work_dir: str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
    launcher: str = "none",
) -> dict[str, float]:
    """Run the config's test loop on a checkpoint.

    Args:
        config, options, launcher: as for training.
        checkpoint: of that config's model. Of a distilled detector or segmentor the student is measured, without its teacher.
        work_dir: folder for the log; None: a temporary one.

    Returns:
        name of a metric -> value, as the config's evaluator gives them (e.g. 'coco/bbox_mAP', 'mIoU').

    Raises:
        FileNotFoundError: no such checkpoint, or files of the data are missing.
        ValueError: the checkpoint is of another model, or the config has nothing to test.
    """
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f"checkpoint does not exist: {checkpoint}")
    with tempfile.TemporaryDirectory(prefix="hgkd-test-") as folder:
        cfg = load_config(config, work_dir or folder, False, False, options, launcher)
        for part in ("dataloader", "cfg", "evaluator"):
            if cfg.get(f"test_{part}") is None:
                cfg[f"test_{part}"] = cfg.get(f"val_{part}")
        if cfg.test_evaluator is None:
            raise ValueError(
                f"{config} has no test_evaluator; a classifier's takes its images with val_root (--cfg-options val_root=DIR); "
                "tools/evaluate.py measures a backbone by its features"
            )
        if is_downstream(cfg):
            drop_teacher(cfg)
        # what only a training needs
        cfg.update(train_dataloader=None, train_cfg=None, optim_wrapper=None, param_scheduler=None)
        cfg.update(val_dataloader=None, val_cfg=None, val_evaluator=None)
        cfg.load_from = str(checkpoint)
        metrics: dict[str, float] = RUNNERS.build(cfg).test()
    return {name: float(value) for name, value in metrics.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure a trained classifier, detector or segmentor.")
    parser.add_argument("config", help="the config that trained it")
    parser.add_argument("checkpoint", help="its checkpoint")
    parser.add_argument("--work-dir", help="folder for log and reports (a temporary one)")
    parser.add_argument("--json", metavar="FILE", help="write the metrics to this file")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, default={}, metavar="KEY=VALUE")
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm"), default="none", help="how processes were started")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    try:
        metrics = run_test(args.config, args.checkpoint, args.work_dir, args.cfg_options, args.launcher)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        Path(args.json).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    for name, value in metrics.items():
        print(f"{name:<24} {value:.4g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
