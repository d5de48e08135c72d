"""The runner of detectors and segmentors: mmengine's loops, with hgkd's checks, weights and checkpoints.

From :class:`hgkd.training.runner.DistillRunner` come safe reading, sealed checkpoints that appear complete or not at all, gloo
and synchronised norms without CUDA. Samplers and schedules are mmengine's own, as mmdet's and mmseg's configs expect, and its
loops with what :mod:`hgkd.openmmlab.loops` adds.
"""

from __future__ import annotations

import copy
import io
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.model import BaseModel
from mmengine.runner import BaseLoop, IterBasedTrainLoop, Runner
from torch import nn
from torch.utils.data import DataLoader

from hgkd.errors import DivergedError, InvalidValueError, WeightsError
from hgkd.mmcv_ops.finder import ops_notice, register_ops
from hgkd.openmmlab.config import datasets_of, drop_downloads, model_config, skip_unreadable_images, whole_number, without_scope
from hgkd.openmmlab.data_checks.checks import check_data
from hgkd.openmmlab.loops import DownstreamFiniteLossHook, StoppableEpochLoop, StoppableIterLoop, guarded_step
from hgkd.openmmlab.weights import check_pixels, check_start, load_backbone_file, prepared_pixels, student_weights
from hgkd.registry import RUNNERS
from hgkd.training.hooks.alarms import LossAlarmHook
from hgkd.training.hooks.progress import UNREADABLE
from hgkd.training.in_force import duration_text, in_force, lines_of
from hgkd.training.last_batch import check_last_batch
from hgkd.training.loop import GuardedOptimWrapper, end_workers_at_exit, ignore_first_signal
from hgkd.training.resuming import ReadCheckpoint
from hgkd.training.runner import DistillRunner
from hgkd.training.trackers import check_tracker
from hgkd.training.work_folder import trial_folder
from hgkd.training.wrapping import plain_model
from hgkd.weights.files import read_checkpoint
from hgkd.weights.loading import load_strict
from hgkd.weights.run_folder import find_last_checkpoint, is_damaged
from hgkd.writing import write_bytes

STUDENT_FILE = "student.pth"
_LOOPS = {"EpochBasedTrainLoop": StoppableEpochLoop, "IterBasedTrainLoop": StoppableIterLoop}
# their first loss is near 0, as hardly a prediction is matched to a box then, and rises tenfold before it falls
_RISING = ("RTMDet",)
_NOT_OPTIONS = {"type", "by_epoch", "_scope_"}
_LENGTHS = {"max_epochs", "max_iters", "val_interval", "val_begin"}


@RUNNERS.register_module()
class DownstreamRunner(DistillRunner):
    """Runner of detectors and segmentors, see the module's header.

    Reads the config's key ``backbone``: the file of the backbone's weights, or None.
    """

    @staticmethod
    def build_dataloader(
        dataloader: DataLoader[Any] | dict[str, Any], seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader[Any]:
        # past DistillRunner's, to mmengine's seeds: the transforms draw from numpy
        loader: DataLoader[Any] = Runner.build_dataloader(dataloader, seed, diff_rank_seed)
        loader.worker_init_fn = partial(_start_worker, loader.worker_init_fn)
        end_workers_at_exit()
        return loader

    @classmethod
    def from_cfg(cls, cfg: Config) -> DownstreamRunner:
        """Build a runner; mmcv's operators are there afterwards, and nothing of mmdet or mmseg before.

        Raises:
            FileNotFoundError, ValueError: what :func:`hgkd.openmmlab.data_checks.checks.check_data` refuses in the training
                data.
        """
        cfg = cfg.copy()
        register_ops()
        for part in ("student", "teacher"):
            if part in cfg.model:
                cfg.model[part] = model_config(cfg.model[part])
        for key in list(cfg):
            cfg[key] = without_scope(cfg[key], cfg.get("default_scope"))
        remarks = drop_downloads(cfg.model)
        loaders = ("train_dataloader", "val_dataloader") if cfg.get("train_dataloader") else ("test_dataloader",)
        remarks += check_data(cfg, loaders)
        skip_unreadable_images(cfg, cfg.work_dir)
        if cfg.get("visualizer"):  # under a fixed name mmengine gives a second run of this process the first one's folder
            cfg.visualizer = {key: value for key, value in cfg.visualizer.items() if key != "name"}
        runner: DownstreamRunner = super().from_cfg(cfg)  # type: ignore[assignment]
        if cfg.get("train_dataloader") and not (cfg.get("resume") and find_last_checkpoint(cfg.work_dir)):
            # the work folder is this run's now, and no process reads ahead yet: an earlier run's list is not this one's
            (Path(cfg.work_dir) / UNREADABLE).unlink(missing_ok=True)
        for remark in remarks:  # not before: the work folder's log begins with the runner
            runner.logger.warning(remark)
        runner.logger.info(ops_notice())
        return runner

    def build_train_loop(self, loop: BaseLoop | dict[str, Any]) -> BaseLoop:
        """mmengine's two loops with hgkd's stopping and guarding; any other as it is.

        Raises:
            ValueError: a length that is no whole number, or no batch to train on.
        """
        # past DistillRunner's, which needs epochs and hgkd's own data sets
        if not isinstance(loop, Mapping):
            return Runner.build_train_loop(self, loop)
        for key in _LENGTHS & loop.keys():
            whole_number(f"train_cfg.{key}", loop[key], least=0 if key == "val_begin" else 1)
        kind = loop.get("type") or ("EpochBasedTrainLoop" if loop.get("by_epoch") else "IterBasedTrainLoop")
        name = kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__
        if name in _LOOPS:
            options = {key: value for key, value in loop.items() if key not in _NOT_OPTIONS}
            built = _LOOPS[name](self, self._train_dataloader, **options)
            self.register_hook(DownstreamFiniteLossHook())
            if not any(isinstance(hook, LossAlarmHook) for hook in self.hooks):  # a config may bring its own, otherwise set
                described = self.cfg.model.get("student", self.cfg.model)
                rising = str(described.get("type")).rpartition(".")[2] in _RISING
                self.register_hook(LossAlarmHook(spike=50.0) if rising else LossAlarmHook())
        else:
            built = Runner.build_train_loop(self, loop)
            self.logger.warning(
                f"train_cfg.type={name} is not one of mmengine's loops ({', '.join(_LOOPS)}): a signal ends it without a "
                "checkpoint, and a loss that is not finite is not noticed"
            )
        _check_steps(built, self.world_size)
        return built

    def resume(
        self,
        filename: str,
        resume_optimizer: bool = True,
        resume_param_scheduler: bool = True,
        map_location: object = "default",
    ) -> None:
        super().resume(filename, resume_optimizer, resume_param_scheduler, map_location)
        # a batch sampler, as of COCO's recipes, hides the sampler whose seed is to be the checkpoint's
        sampler: Any = getattr(self.train_dataloader.batch_sampler, "sampler", None)
        if not self._randomness_cfg.get("diff_rank_seed", False) and hasattr(sampler, "seed"):
            sampler.seed = self.seed

    def _init_model_weights(self) -> None:
        super()._init_model_weights()
        file = self.cfg.get("backbone")
        model: BaseModel = plain_model(self)
        model = getattr(model, "student", model)
        if file is not None:
            load_backbone_file(model.backbone, file)
            self._check_pixels(model.backbone, file)
        elif self._load_from is None and not (self._resume and find_last_checkpoint(self.work_dir)):
            check_start(getattr(model, "backbone", model))

    def _check_pixels(self, backbone: nn.Module, file: str) -> None:
        """Compare the images of this config with those of the backbone's weights; a training that goes on is not refused."""
        if self._train_loop is None:
            return
        where = "model.student" if "student" in self.cfg.model else "model"
        described = self.cfg.model.get("student", self.cfg.model)
        preprocessor = described.get("data_preprocessor") or self.cfg.get("data_preprocessor") or {}
        reading = next(iter(datasets_of(self.cfg, ["train_dataloader"])), {})
        given = prepared_pixels(preprocessor, reading.get("pipeline") or ())
        goes_on = bool(self._resume and find_last_checkpoint(self.work_dir))
        check_pixels(backbone, file, given, where, refuse=not goes_on)

    def _after_training(self) -> None:
        """A distilled student is written to ``work_dir/student.pth``, as a checkpoint of its own config; as the run's
        checkpoints, it has the moving average of the weights where there is one.
        """
        student = getattr(next(self.averages(), plain_model(self)), "student", None)
        if student is not None:
            meta = {"dataset_meta": getattr(self.train_dataloader.dataset, "metainfo", None)}
            content = io.BytesIO()  # torch.save itself tells of a full disk without saying so
            torch.save({"meta": meta, "state_dict": student.state_dict()}, content)
            write_bytes(Path(self.work_dir) / STUDENT_FILE, content.getvalue())
            self.logger.info(f"the student alone is in {Path(self.work_dir) / STUDENT_FILE}")

    def load_checkpoint(
        self, filename: str, map_location: object = "cpu", strict: bool = True, revise_keys: object = None
    ) -> dict[str, Any]:
        """Read a checkpoint of a detector or segmentor, ours or OpenMMLab's, and load its weights; both safe and strict.

        Raises:
            FileNotFoundError: no such file.
            WeightsError: damaged, or of another model; nothing has been changed then.
        """
        if Path(filename).is_file() and is_damaged(filename):
            raise WeightsError(
                "file-hash-differs", f"{filename} is damaged: its content does not agree with the hash that was written with it"
            )
        checkpoint = read_checkpoint(filename)
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), Mapping):
            raise WeightsError(
                "checkpoint-not-downstream", f"{filename} is no checkpoint of a detector or segmentor: it has no 'state_dict'"
            )
        self._read = ReadCheckpoint.of(checkpoint)
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        try:
            model = plain_model(self)
            state = checkpoint["state_dict"]
            load_strict(model, state if hasattr(model, "student") else student_weights(state), source=str(filename))
        except WeightsError as error:
            raise WeightsError(
                "checkpoint-of-another-model",
                f"{filename} is not of this config's model; use the config that wrote it (backbone=FILE loads a backbone "
                f"alone). {error}",
            ) from error
        self._has_loaded = True
        return checkpoint


def _start_worker(first: Callable[[int], None] | None, worker: int) -> None:
    """What a reading process does first: mmengine's seeds, then hgkd's signals."""
    if first is not None:
        first(worker)
    ignore_first_signal(worker)


def _check_steps(loop: BaseLoop, processes: int) -> None:
    """Refuse a training without a step.

    Raises:
        ValueError: not one batch can be filled.
    """
    loader = loop.dataloader
    images = len(loader.dataset)
    sampler = getattr(loader.batch_sampler, "sampler", loader.sampler)
    # an endless sampler, as of trainings that count steps, fills any batch from any number of images but none
    endless = isinstance(loop, IterBasedTrainLoop) and not isinstance(sampler, DefaultSampler)
    if images and (len(loader) or endless):
        return
    size = getattr(loader.batch_sampler, "batch_size", loader.batch_size)
    raise InvalidValueError(
        "no-training-step",
        f"no training step: train_dataloader has {images} images, which do not fill one batch of {size} on each of {processes} "
        "processes, and incomplete batches are dropped (drop_last=True). Set a smaller batch_size, or use more images (a data "
        "set's filter_cfg and indices leave images out)",
    )


def dry_run_downstream(cfg: Config) -> str:
    """Build what a downstream config describes, as a training does, load its weights and do two steps with one batch; the
    work folder stays as it is.

    Returns:
        A report of some lines.

    Raises:
        Exception: whatever a training would raise before and in its first step.
    """
    target = Path(cfg.work_dir).absolute()
    cfg = cfg.copy()
    cfg.visualizer = {**cfg.visualizer, "vis_backends": None}
    check_tracker(cfg.pop("tracker", None))
    with trial_folder() as folder:
        cfg.work_dir = folder
        runner = DownstreamRunner.from_cfg(cfg)
        runner._train_loop = loop = runner.build_train_loop(runner._train_loop)
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
        if runner.param_schedulers is not None:
            runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)
        _ = runner.val_loop  # built when it is asked for
        runner.call_hook("before_run")
        runner._init_model_weights()
        facts = in_force(runner, loop, target)
        level = runner.logger.level
        runner.logger.setLevel("WARNING")  # the checkpoint hook would say that it saves into the trial's folder
        try:
            # some models ask in their step what hooks have noted, e.g. YOLOX for the number of the step
            for moment in ("before_train", "before_train_epoch"):
                runner.call_hook(moment)
        finally:
            runner.logger.setLevel(level)
        runner.model.train()
        batch = next(iter(loop.dataloader))
        same = copy.deepcopy(batch)  # a step may change its batch: some detectors scale boxes in place
        runner.call_hook("before_train_iter", batch_idx=0, data_batch=batch)
        check_last_batch(plain_model(runner), loop, batch)
        guard = GuardedOptimWrapper(runner.optim_wrapper, runner.model)
        outputs = guarded_step(runner.model, batch, guard)
        seconds = math.nan if guard.skipped else _seconds_of_a_step(runner.model, same, guard)
    losses = {name: float(value.detach()) for name, value in outputs.items() if "loss" in name}
    if guard.skipped or not all(map(math.isfinite, losses.values())):
        raise DivergedError(
            "step-not-finite",
            f"loss or gradient of the first step is not finite: {', '.join(f'{k} {v:.4g}' for k, v in losses.items())}. Look "
            "at the weights that it starts from (backbone, teacher_checkpoint), the annotations, lr and --amp",
        )
    parameters = [p for p in runner.model.parameters() if p.requires_grad]
    size = cfg.train_dataloader.get("batch_size")  # of a loader with a batch sampler torch says None
    report = {
        "plan": f"{loop.max_iters} steps of {size} images out of {len(loop.dataloader.dataset)}",
        "backbone": cfg.get("backbone") or "random weights",
        "trained": f"{sum(p.numel() for p in parameters) / 1e6:.2f} M parameters",
        **facts,
        "losses": ", ".join(f"{name} {value:.4g}" for name, value in losses.items()),
        "a step": f"{seconds:.2f} s to compute",
        "whole run": f"about {duration_text(seconds * loop.max_iters)} for {loop.max_iters} steps, reading images and "
        "validations not counted",
    }
    return lines_of(report)


def _seconds_of_a_step(model: BaseModel, batch: object, guard: GuardedOptimWrapper) -> float:
    """Of a step that is not the first, in which much is built."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    guarded_step(model, batch, guard)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started
