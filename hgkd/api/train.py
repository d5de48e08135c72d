"""Train what a config describes: from a config and options to a finished run."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.runner import Runner

from hgkd.config.checking import check_config
from hgkd.config.levels import import_custom_modules
from hgkd.config.reading import read_config
from hgkd.config.short_options import apply_short_options, use_mixed_precision
from hgkd.errors import MissingFileError
from hgkd.openmmlab.config import is_downstream, merge_options
from hgkd.registry import build_runner
from hgkd.weights.run_folder import checkpoint_file


def load_config(
    config: str | os.PathLike[str] | Config,
    work_dir: str | os.PathLike[str] | None = None,
    resume: bool | str | os.PathLike[str] = False,
    amp: bool = False,
    options: Mapping[str, Any] | None = None,
    launcher: str = "none",
) -> Config:
    """The checked config of a run; see :func:`train` for the arguments. A ``Config`` that is given is copied."""
    cfg = copy.deepcopy(config) if isinstance(config, Config) else read_config(config)
    options = _as_texts(options or {})
    downstream = is_downstream(cfg)
    if downstream:  # mmdet and mmseg: their own keys, their own short options
        cfg.runner_type = "hgkd.DownstreamRunner"
        merge_options(cfg, options)
    else:
        for remark in apply_short_options(cfg, options):
            print(f"note: {remark}", file=sys.stderr)
    if any(key.partition(".")[0] == "custom_imports" for key in options):  # a file's own are imported when it is read
        import_custom_modules(cfg, [Path.cwd()])
    if amp:
        use_mixed_precision(cfg)
    cfg.launcher = launcher
    if work_dir is not None:
        cfg.work_dir = work_dir
    elif cfg.get("work_dir") is None:
        cfg.work_dir = Path("work_dirs") / Path(cfg.filename or "run.py").stem
    cfg.work_dir = os.path.expanduser(os.fspath(cfg.work_dir))
    if resume is not False:
        cfg.resume = True
        if resume is not True:
            checkpoint = checkpoint_file(resume)
            if not checkpoint.is_file():
                raise MissingFileError("checkpoint-missing", f"checkpoint to resume from does not exist: {checkpoint}")
            cfg.load_from = str(checkpoint)
    if not downstream:
        check_config(cfg)
    return cfg


def _as_texts(value: Any) -> Any:
    """Options with texts for pathlib's paths, at any depth: mmengine writes configs as Python, in which these are no values."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: _as_texts(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        texts = [_as_texts(item) for item in value]
        return tuple(texts) if isinstance(value, tuple) else texts
    return value


def train(
    config: str | os.PathLike[str] | Config,
    work_dir: str | os.PathLike[str] | None = None,
    resume: bool | str | os.PathLike[str] = False,
    amp: bool = False,
    options: Mapping[str, Any] | None = None,
    launcher: str = "none",
) -> Runner:
    """Train, and return the runner that did.

    Args:
        config: file, name of a shipped recipe (see :func:`hgkd.recipes.find_recipe`), or a loaded config.
        work_dir: folder for logs, checkpoints and pictures; None: ``work_dirs/<name of the config>``; '~' is the user's.
        resume: True continues from the last checkpoint in ``work_dir`` (from the beginning when there is none), a path from
            that checkpoint.
        amp: mixed precision.
        options: overrides, short options or dotted paths -> values; paths may be pathlib's.
        launcher: 'none', 'pytorch' (torchrun) or 'slurm'.

    Raises:
        ValueError, TypeError, FileNotFoundError: something in the config or the files it names is wrong.
        ValueError: the work folder is in use, or holds the results of another training.
        DivergedError: loss or gradient stayed not finite, or the loss far above where it began.
        StoppedError: a checkpoint, or anything else, cannot be written; a process that reads images was killed.
    """
    cfg = load_config(config, work_dir, resume, amp, options, launcher)
    runner: Runner = build_runner(cfg)
    runner.train()
    return runner


def leave_group() -> None:
    """Part from the other processes of a job: one that ends with the group open is aborted now and then, by gloo's threads."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
