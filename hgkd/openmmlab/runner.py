"""The runner of detectors and segmentors: mmengine's loops, with hgkd's checks, weight loading and checkpoints.

From :class:`hgkd.engine.runner.DistillRunner` come safe reading, sealed checkpoints written beside and renamed, gloo and
synchronised norms without CUDA. Loops, samplers and schedules are mmengine's own, as mmdet's and mmseg's configs expect.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.runner import Runner
from torch import nn

from hgkd.engine.checkpoints import find_last_checkpoint, is_damaged
from hgkd.engine.hooks import plain_model
from hgkd.engine.runner import DistillRunner
from hgkd.engine.weights import load_strict, read_checkpoint
from hgkd.errors import WeightsError
from hgkd.openmmlab.checks import check_data
from hgkd.openmmlab.config import drop_downloads, model_config, read_with_care
from hgkd.openmmlab.ops.finder import ops_notice, register_ops
from hgkd.openmmlab.weights import check_start, load_backbone_file, student_weights
from hgkd.registry import RUNNERS

STUDENT_FILE = "student.pth"


@RUNNERS.register_module()
class DownstreamRunner(DistillRunner):
    """See the module's header. Reads the config's key ``backbone``: the file of the backbone's weights, or None."""

    build_dataloader = staticmethod(Runner.build_dataloader)  # mmengine's seeds: the transforms draw from numpy

    @classmethod
    def from_cfg(cls, cfg: Any) -> DownstreamRunner:
        """Build a runner; mmcv's operators are there afterwards, and nothing of mmdet or mmseg before.

        Raises:
            FileNotFoundError, ValueError: what :func:`hgkd.openmmlab.checks.check_data` refuses in the training data.
        """
        cfg = cfg.copy()
        register_ops()
        for part in ("student", "teacher"):
            if part in cfg.model:
                cfg.model[part] = model_config(cfg.model[part])
        remarks = drop_downloads(cfg.model)
        loaders = ("train_dataloader", "val_dataloader") if cfg.get("train_dataloader") else ("test_dataloader",)
        remarks += check_data(cfg, loaders)
        read_with_care(cfg, cfg.work_dir)
        if cfg.get("visualizer"):  # under a fixed name mmengine gives a second run of this process the first one's folder
            cfg.visualizer = {key: value for key, value in cfg.visualizer.items() if key != "name"}
        runner: DownstreamRunner = super().from_cfg(cfg)
        for remark in remarks:  # not before: the work folder's log begins with the runner
            runner.logger.warning(remark)
        runner.logger.info(ops_notice())
        return runner

    def build_train_loop(self, loop: Any) -> Any:
        # past DistillRunner's, which needs epochs and hgkd's own data sets
        return Runner.build_train_loop(self, loop)

    def _init_model_weights(self) -> None:
        super()._init_model_weights()
        file = self.cfg.get("backbone")
        model: Any = plain_model(self)
        model = getattr(model, "student", model)
        if file is not None:
            load_backbone_file(model.backbone, file)
        elif self._load_from is None and not (self._resume and find_last_checkpoint(self.work_dir)):
            check_start(getattr(model, "backbone", model))

    def train(self) -> nn.Module:
        """As mmengine's; a distilled student is written to ``work_dir/student.pth``, as a checkpoint of its own config."""
        model = super().train()
        student = getattr(plain_model(self), "student", None)
        if student is not None and is_main_process():
            meta = {"dataset_meta": getattr(self.train_dataloader.dataset, "metainfo", None)}
            torch.save({"meta": meta, "state_dict": student.state_dict()}, Path(self.work_dir) / STUDENT_FILE)
            self.logger.info(f"the student alone is in {Path(self.work_dir) / STUDENT_FILE}")
        return model

    def load_checkpoint(
        self, filename: str, map_location: Any = "cpu", strict: bool = True, revise_keys: Any = None
    ) -> dict[str, Any]:
        """Read a checkpoint of a detector or segmentor, ours or OpenMMLab's, and load its weights; both safe and strict.

        Raises:
            FileNotFoundError: no such file.
            WeightsError: damaged, or of another model; nothing has been changed then.
        """
        if Path(filename).is_file() and is_damaged(filename):
            raise WeightsError(f"{filename} is damaged: its content does not agree with the hash that was written with it")
        checkpoint = read_checkpoint(filename)
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), Mapping):
            raise WeightsError(f"{filename} is no checkpoint of a detector or segmentor: it has no 'state_dict'")
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        try:
            model = plain_model(self)
            state = checkpoint["state_dict"]
            load_strict(model, state if hasattr(model, "student") else student_weights(state), source=str(filename))
        except WeightsError as error:
            raise WeightsError(
                f"{filename} is not of this config's model; use the config that wrote it (backbone=FILE loads a backbone "
                f"alone). {error}"
            ) from error
        self._has_loaded = True
        return checkpoint


def rehearse(cfg: Config) -> str:
    """Build what a downstream config describes, load its weights and do one step; nothing is left in the work folder.

    Returns:
        A report of some lines.

    Raises:
        Whatever a training would raise before and in its first step.
    """
    cfg = cfg.copy()
    cfg.visualizer = {**cfg.visualizer, "vis_backends": None}
    with tempfile.TemporaryDirectory(prefix="hgkd-dry-run-") as folder:
        cfg.work_dir = folder
        runner: Any = DownstreamRunner.from_cfg(cfg)
        runner._train_loop = loop = runner.build_train_loop(runner._train_loop)
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        runner._init_model_weights()
        runner.model.train()
        losses = runner.model.train_step(next(iter(loop.dataloader)), optim_wrapper=runner.optim_wrapper)
    parameters = [p for p in runner.model.parameters() if p.requires_grad]
    report = {
        "plan": f"{loop.max_iters} steps of {loop.dataloader.batch_size} images out of {len(loop.dataloader.dataset)}",
        "backbone": cfg.get("backbone") or "random weights",
        "trained": f"{sum(p.numel() for p in parameters) / 1e6:.2f} M parameters",
        "losses": ", ".join(f"{name} {float(value.detach()):.4g}" for name, value in losses.items() if "loss" in name),
    }
    return "\n".join(f"{name:<9} {value}" for name, value in report.items())
