"""mmengine's runner with strict, safe and exact resuming, and with checkpoints that say what they hold.

Against mmengine 0.10.7: checkpoints are read with ``weights_only=True`` on every torch; a checkpoint that does not fit the
model is refused before anything is changed (mmengine loads what fits and only logs the rest); a run goes on in the middle of
an epoch (:mod:`hgkd.training.loop`); data-parallel training and ``sync_bn`` work without CUDA (gloo); checkpoints are sealed
with their hash, written under a temporary name and renamed (:mod:`hgkd.weights.run_folder`).
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.device import utils as device_utils
from mmengine.dist import broadcast, broadcast_object_list, is_distributed, is_main_process
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.model import MMDistributedDataParallel, is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.optim.scheduler.param_scheduler import _ParamScheduler
from mmengine.runner import BaseLoop, Runner
from mmengine.visualization import Visualizer
from torch import nn
from torch.utils.data import DataLoader

from hgkd.config.schedule import without_empty_warmup
from hgkd.data.sampler import in_arrays
from hgkd.errors import InvalidValueError, Refusal, WeightsError, configured, first_line
from hgkd.networks.guest import teachers_of
from hgkd.registry import RUNNERS
from hgkd.sparse.choice import use_kernels
from hgkd.training.checkpoint_hook import CheckpointWriteError
from hgkd.training.hooks.alarms import DUMP
from hgkd.training.loop import ExactEpochLoop, end_workers_at_exit, ignore_first_signal
from hgkd.training.optim import check_optim_config
from hgkd.training.recompute import recompute_activations
from hgkd.training.resuming import ConfiguredSettings, ReadCheckpoint, config_changes, images_of
from hgkd.training.sharding import check_hooks, divided, divided_state, shard_model, whole
from hgkd.training.sync_norm import sync_batch_norms
from hgkd.training.trackers import TRACKERS, Tracker, check_tracker
from hgkd.training.work_folder import check_unused, held_until_the_end, lock_folder, release_folder
from hgkd.training.wrapping import check_channels, plain_model
from hgkd.weights.identify import describe_network, hgkd_of
from hgkd.weights.loading import check_finite, load_strict, match
from hgkd.weights.run_file import SCORED_STEP
from hgkd.weights.run_folder import find_last_checkpoint, read_run_checkpoint, seal, tell_system_errors
from hgkd.writing import replacing


def _stamp(seconds: float) -> str:
    """A time as the name of a run's folder of logs."""
    return f"{time.strftime('%Y%m%d_%H%M%S', time.localtime(seconds))}_{int(seconds % 1 * 1000):03d}"


def _later_than_any(work_dir: str, seconds: float) -> float:
    """``seconds``, or the moment after the newest folder of logs where the clock was set back since.

    Whoever reads the logs takes them in the order of their names.
    """
    names = [path.name for path in Path(work_dir).glob("*") if re.fullmatch(r"\d{8}_\d{6}_\d{3}", path.name)]
    newest = max(names, default="")
    if _stamp(seconds) > newest:
        return seconds
    try:
        return time.mktime(time.strptime(newest[:15], "%Y%m%d_%H%M%S")) + int(newest[16:]) / 1000 + 0.0015
    except ValueError:  # no time, only digits
        return seconds


def _raise_current(record: logging.LogRecord) -> None:
    error = sys.exc_info()[1]
    if error is not None:
        raise error


# lines of mmengine about which a user can do nothing: its own hooks use parts that it advises against; every parameter with its
# rate and decay, hundreds of lines, which the config says in one; layers that a detector's levels share, counted once
_OF_NO_USE = ("will be deprecated in future", "paramwise_options -- ", "is skipped since bypass_duplicate=")


def _is_of_use(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(part in message for part in _OF_NO_USE)


def take_slurm_names(environment: MutableMapping[str, str]) -> None:
    """Give the variables of an ``srun`` the names that torch reads, as mmengine does for GPUs; those that are there stay.

    Raises:
        ValueError: the process was not started by ``srun``.
    """
    names = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}
    missing = [name for name in (*names.values(), "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise InvalidValueError(
            "slurm-variables-missing",
            f"--launcher slurm: {', '.join(missing)} not set. Start the command by srun, and export MASTER_ADDR (the first "
            "machine's name) and MASTER_PORT in the job's script; docs/howto/several_gpus.md has one that works",
        )
    for name, slurm in names.items():
        environment.setdefault(name, environment[slurm])


def leave_apple_gpu() -> str | None:
    """Keep trainings on the CPU where mmengine would take an Apple GPU (mps), on which nothing was tried yet.

    Returns:
        A remark for the log; None: there is no such GPU, or ``HGKD_DEVICE=mps`` asks for it.
    """
    if get_device() != "mps" or os.environ.get("HGKD_DEVICE") == "mps":
        return None
    device_utils.DEVICE = "cpu"  # what get_device reads
    return "this machine's Apple GPU is not used, as hgkd was not tried on one: the CPU trains. HGKD_DEVICE=mps takes the GPU"


def _end_gloo() -> None:
    """Close the group before the interpreter ends, as gloo's threads may abort a process that does not."""
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


def _data_parallel(model: nn.Module, find_unused: bool) -> MMDistributedDataParallel:
    devices = [int(os.environ["LOCAL_RANK"])] if torch.cuda.is_available() else None
    return MMDistributedDataParallel(
        module=model, device_ids=devices, broadcast_buffers=False, find_unused_parameters=find_unused
    )


@RUNNERS.register_module()
class DistillRunner(Runner):
    """Runner of all trainings of hgkd, see the module's header; arguments are those of ``mmengine.runner.Runner``."""

    _load_from: str | None
    model: nn.Module
    _read: ReadCheckpoint | None = None
    _sharded = False
    _whole: dict[str, Any] | None = None

    @classmethod
    def from_cfg(cls, cfg: Config) -> DistillRunner:
        """Build a runner; the work folder of a training is held from here to the end of :meth:`train`.

        Raises:
            ValueError: something in the config is wrong, the work folder is in use or holds the results of another training.
            StoppedError: the system refuses to write into the work folder.
        """
        try:
            with tell_system_errors(cfg.work_dir), configured():
                check_tracker(cfg.get("tracker"))
                runner: DistillRunner = super().from_cfg(cfg)
        except BaseException:
            release_folder(cfg.work_dir)  # nothing was begun
            raise
        return runner

    def setup_env(self, env_cfg: dict[str, Any]) -> None:
        self._device_remark = leave_apple_gpu()
        # mmengine's own initialisation sets a CUDA device unconditionally
        if self.distributed and not is_distributed() and not torch.cuda.is_available():
            if self._launcher == "slurm":
                take_slurm_names(os.environ)
            torch.distributed.init_process_group("gloo")
        super().setup_env(env_cfg)
        if self.distributed:
            atexit.register(_end_gloo)  # once or several times: the second finds nothing
        self._lock_remark = self._take_folder() if self._train_loop is not None and is_main_process() else None
        # names logger, message hub and visualiser, which mmengine shares between runs of the same second
        now = torch.tensor(_later_than_any(self.work_dir, time.time()), dtype=torch.float64)
        broadcast(now)
        self._timestamp = _stamp(now.item())

    def _take_folder(self) -> str | None:
        """Hold the work folder, or refuse it; a remark for the log."""
        remark = lock_folder(self.work_dir)
        try:
            check_unused(self.work_dir, bool(self.cfg.get("resume")), self.cfg.get("load_from"))
        except ValueError:
            release_folder(self.work_dir)
            raise
        return remark

    def build_logger(self, *args: object, **kwargs: object) -> MMLogger:
        logger: MMLogger = super().build_logger(*args, **kwargs)
        logger.addFilter(_is_of_use)
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handleError = _raise_current  # type: ignore[method-assign]  # Python would go on after a traceback
                cast(Any, handler.stream).reconfigure(errors="backslashreplace")  # names of files may be no UTF-8
        for remark in (self._lock_remark, self._device_remark):
            if remark:
                logger.warning(remark)
        return logger

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        if not self.distributed:
            self._fsdp()
        if not self.distributed or model_wrapper_cfg is not None or is_model_wrapper(model):
            wrapped: nn.Module = super().wrap_model(model_wrapper_cfg, model)
            return wrapped
        fsdp = self._fsdp()
        if not fsdp:
            model = model.to(get_device())
        if self.cfg.get("sync_bn"):
            self.logger.info(f"{sync_batch_norms(model)} batch normalisations take their statistics over all processes")
        if fsdp:
            for part in (model, *teachers_of(model).values()):
                for value in part.state_dict().values():
                    broadcast(value)
            self.logger.info(shard_model(model))
            self._sharded = True
            return model
        return _data_parallel(model, self.cfg.get("find_unused_parameters", False))

    def _fsdp(self) -> bool:
        """Whether the config divides the parameters of a training among several processes."""
        fsdp = self.cfg.get("fsdp")
        if fsdp not in (None, True, False):
            raise InvalidValueError("fsdp-not-bool", f"fsdp={fsdp!r}: expected True, or False")
        if fsdp and self._train_loop is not None and not self.distributed:
            raise InvalidValueError(
                "fsdp-needs-processes",
                "fsdp=True divides the parameters among several processes, and this is one alone: start with torchrun and "
                "--launcher pytorch, or leave fsdp out",
            )
        return bool(fsdp) and self._train_loop is not None

    def _init_model_weights(self) -> None:
        if not self._sharded:  # otherwise all processes had process 0's before they were divided
            super()._init_model_weights()

    @contextmanager
    def whole_state(self) -> Iterator[None]:
        """Context in which one process alone may write a checkpoint of sharded parameters; all processes enter it."""
        gathers = self._sharded and self._whole is None
        if gathers:
            keep = is_main_process()
            self._whole = {
                "state_dict": whole(plain_model(self).state_dict(), keep),
                "optimizer": whole(self.optim_wrapper.state_dict(), keep),
            }
        try:
            yield
        finally:
            if gathers:
                self._whole = None

    def say_idle_parameters(self, names: Sequence[str]) -> None:
        """Warn of parameters that no loss reaches, and let data-parallel training not wait for their gradients."""
        if not names:
            return
        shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        self.logger.warning(
            f"{len(names)} parameters got no gradient and are not trained, because no loss depends on them: {shown}. Leave out "
            "the part that they belong to, or add an objective that uses it"
        )
        if type(self.model) is MMDistributedDataParallel and not self.model.find_unused_parameters:
            self.model = _data_parallel(plain_model(self), True)  # otherwise torch ends the run in the second step

    def train(self) -> nn.Module:
        """Train as mmengine's runner, with activation checkpointing for sparse tensors (:mod:`hgkd.training.recompute`)."""
        chosen = use_kernels(self.cfg.get("kernels", "measure"), self.logger.info)
        with tell_system_errors(self.work_dir), held_until_the_end(self.work_dir), chosen:
            if self._sharded:
                check_hooks(self)
            recompute_activations(plain_model(self), self.cfg.get("activation_checkpointing") or [])
            self.cfg.activation_checkpointing = None  # mmengine would do it once more, its own way
            try:
                model: nn.Module = super().train()
                if is_main_process() and not getattr(self.train_loop, "interrupted", False):
                    self._after_training()
                    self._say_end()
            except BaseException:
                self._close_tracker()
                raise
        return model

    def _close_tracker(self) -> None:
        """Tell a tracker that the training has failed; mmengine closes it only where one ends well."""
        for backend in self.visualizer._vis_backends.values() if is_main_process() else ():
            if isinstance(backend, Tracker):
                backend.close(failed=True)

    def _say_end(self) -> None:
        """Where to find what a training has made, at the end of its log; a signal that stopped it has a line of its own."""
        last = self.message_hub.runtime_info.get("last_ckpt")
        made = f"the weights are in {Path(last).absolute()}" if last else "no checkpoint hook, so no weights were saved"
        pictures = Path(self.work_dir).absolute() / "pictures"
        self.logger.info(f"trained to the end; {made}{f', pictures in {pictures}' if pictures.is_dir() else ''}")

    def averages(self) -> Iterator[Any]:
        """The moving averages of the model that hooks keep, as EMAHook does; they are models of its class."""
        return (hook.ema_model.module for hook in self.hooks if hasattr(hook, "ema_model"))

    def _after_training(self) -> None:
        """What is left to do after the last step, while the work folder is still held, on the first process; nothing here.

        Not when a signal has stopped the training: then it goes on with --resume.
        """

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        if fn_name == "before_save_checkpoint" and self._whole is not None:
            kwargs["checkpoint"].update(self._whole)
        if fn_name == "after_val_epoch" and isinstance(self._train_loop, BaseLoop):
            self.message_hub.update_info(SCORED_STEP, self._train_loop.iter)
        if fn_name not in ("before_run", "before_train"):
            return super().call_hook(fn_name, **kwargs)
        with configured():  # hooks build parts of theirs here, as EMAHook its average
            return super().call_hook(fn_name, **kwargs)

    def register_hook(self, hook: Hook | Mapping[str, Any], priority: object = None) -> None:
        if isinstance(hook, Mapping) and hook.get("type") == "IterTimerHook":
            hook = {**hook, "type": "hgkd.SteadyTimerHook"}
        try:
            super().register_hook(hook, priority)
        except (TypeError, ValueError) as error:
            if isinstance(error, Refusal) or not isinstance(hook, Mapping):
                raise
            raise InvalidValueError(
                "hook-not-built", f"the hook {dict(hook)} of the config cannot be built: {first_line(error)}"
            ) from error

    def build_visualizer(self, visualizer: Visualizer | Mapping[str, Any] | None = None) -> Visualizer:
        built = super().build_visualizer(visualizer)
        tracker = self.cfg.get("tracker") if self._train_loop is not None else None
        if tracker is not None:
            resumed = bool(self.cfg.get("resume"))
            built._vis_backends[tracker] = TRACKERS[tracker](self.work_dir, resumed, lambda: self.iter)
        for backend in built._vis_backends.values() if is_main_process() else ():
            _ = backend.experiment  # imports the library that it writes with, which the log would ask for later
        return built

    def build_optim_wrapper(self, optim_wrapper: object) -> OptimWrapper:
        if isinstance(optim_wrapper, Mapping):
            check_optim_config(optim_wrapper)
        with configured():
            return super().build_optim_wrapper(optim_wrapper)

    def build_val_loop(self, loop: BaseLoop | Mapping[str, Any]) -> BaseLoop:
        with configured():
            built = super().build_val_loop(loop)
        check_channels(plain_model(self), getattr(built, "dataloader", None), "val_dataloader")
        return built

    @staticmethod
    def build_dataloader(
        dataloader: DataLoader[Any] | dict[str, Any], seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader[Any]:
        if not isinstance(dataloader, DataLoader):
            # without CUDA pinning only warns; reading processes that stay keep their caches, and start once
            kept = {"pin_memory": torch.cuda.is_available(), "persistent_workers": dataloader.get("num_workers", 0) > 0}
            dataloader = {**kept, **dataloader}
        loader: DataLoader[Any] = in_arrays(Runner.build_dataloader(dataloader, seed, diff_rank_seed))
        if not isinstance(dataloader, DataLoader) and "worker_init_fn" not in dataloader:
            # mmengine's gives a worker the same seed in every epoch; here images bring their own
            loader.worker_init_fn = ignore_first_signal
            end_workers_at_exit()
        return loader

    def build_train_loop(self, loop: BaseLoop | dict[str, Any]) -> BaseLoop:
        if isinstance(loop, dict):
            if not loop.get("by_epoch"):
                raise InvalidValueError(
                    "train-cfg-not-by-epochs",
                    f"train_cfg={dict(loop)} does not train by epochs, which exact resuming needs; set "
                    "train_cfg=dict(by_epoch=True, max_epochs=...)",
                )
            options = {key: value for key, value in loop.items() if key != "by_epoch"}
            loop = ExactEpochLoop(self, self._train_dataloader, **options)
        built = super().build_train_loop(loop)
        check_channels(plain_model(self), built.dataloader, "train_dataloader")
        if built.max_epochs < 1:
            raise InvalidValueError(
                "epochs-not-positive", f"epochs (train_cfg.max_epochs) is {built.max_epochs}; it must be 1 or more"
            )
        if built.val_interval < 1:
            raise InvalidValueError(
                "val-interval-not-positive",
                f"train_cfg.val_interval is {built.val_interval}, expected a number of epochs, 1 or more; validation is "
                "switched off by val_train_root=None val_test_root=None (val_root=None where classifiers are trained)",
            )
        if built.max_iters < 1:
            loader = built.dataloader
            raise InvalidValueError(
                "no-training-step",
                f"no training step: {len(loader.dataset)} images do not fill one batch of {loader.batch_size} "
                "(incomplete batches are dropped); use more images or a smaller batch_size",
            )
        return built

    def build_param_scheduler(self, scheduler: Sequence[Any]) -> list[_ParamScheduler]:
        """Build mmengine's schedulers, without a warm-up that is shorter than a step."""
        kept = without_empty_warmup(scheduler, len(self.train_dataloader))
        if len(kept) < len(scheduler):
            self.logger.warning("the warm-up is left out: it is shorter than one step")
        with configured():
            return super().build_param_scheduler(kept)

    def load_or_resume(self) -> None:
        if not self._has_loaded and self._resume and self._load_from is None:
            last = self._find_last_checkpoint()
            if last is None:
                self.logger.warning(
                    f"nothing to resume in {self.work_dir}: there is no checkpoint; starting from the beginning"
                )
                return
            self.logger.info(f"resuming from the last checkpoint {last}")
            self._load_from = last
        super().load_or_resume()

    def _find_last_checkpoint(self) -> str | None:
        """What the first process finds, for all: on another machine the folder may hold nothing, or something else."""
        found: list[Any] = [find_last_checkpoint(self.work_dir) if is_main_process() else None]
        broadcast_object_list(found)
        last: str | None = found[0]
        return last

    def resume(
        self,
        filename: str,
        resume_optimizer: bool = True,
        resume_param_scheduler: bool = True,
        map_location: object = "default",
    ) -> None:
        """Go on from a checkpoint: what was learnt is the checkpoint's, settings are the config's, see
        :mod:`hgkd.training.resuming`.

        Raises:
            ValueError: it cannot go on with this config's images, optimiser or length.
        """
        settings, wanted = ConfiguredSettings(self), self._randomness_cfg.get("seed")
        try:
            super().resume(filename, resume_optimizer, resume_param_scheduler, map_location)
        except ValueError as error:
            if "parameter group" not in str(error):
                raise
            raise InvalidValueError(
                "resume-other-parameter-groups",
                f"{filename} was written with other groups of parameters ({error}). Resume with the optim_wrapper and the "
                "frozen parts that it was written with, or start anew in another work folder",
            ) from error
        self._take_best_checkpoints()
        loop, read = self.train_loop, self._read
        assert read is not None
        check = getattr(loop, "check_position", None)
        remarks = [check(filename, read.meta)] if check is not None else []
        if loop.iter > loop.max_iters:
            raise InvalidValueError(
                "resume-past-the-end",
                f"{filename} is from step {loop.iter}, and this training ends at step {loop.max_iters}: set epochs to more "
                "than it has trained (train_cfg.max_epochs or max_iters), or start anew in another work folder",
            )
        if resume_optimizer:
            remarks.append(settings.put_in_force(filename, read))
        remarks.append(config_changes(filename, read.meta, self.cfg.pretty_text))
        if wanted not in (None, self.seed):
            remarks.append(
                f"seed={wanted} is not in force: the run goes on with its checkpoint's, {self.seed}, which order and crops of "
                "the images depend on. Another seed needs a training of its own, in another work folder"
            )
        for remark in filter(None, remarks):
            self.logger.warning(remark)
        # with seed=None the order of the data was drawn before the checkpoint's seed was known
        sampler = self.train_dataloader.sampler
        if not self._randomness_cfg.get("diff_rank_seed", False) and hasattr(sampler, "seed"):
            sampler.seed = self.seed

    def _take_best_checkpoints(self) -> None:
        """Look for the best checkpoints so far, which go when there are better ones, in this run's own folder.

        A run that goes on in another work folder, or in a copy of its own, knows the paths of the first one's.
        """
        for name, path in dict(self.message_hub.runtime_info).items():
            if name.startswith("best_ckpt") and path:
                self.message_hub.update_info(name, os.path.join(self.work_dir, os.path.basename(path)))

    def load_checkpoint(
        self, filename: str, map_location: object = "cpu", strict: bool = True, revise_keys: object = None
    ) -> dict[str, Any]:
        """Read a checkpoint of this runner and load its weights; both safe and strict.

        Args:
            filename: local file.
            map_location: not used; optimisers bring their state to the parameters' device themselves.
            strict: must be True.
            revise_keys: not used; the keys are this project's own.

        Raises:
            FileNotFoundError: no such file.
            WeightsError: no checkpoint of a runner, or one of another model; nothing has been changed then.
        """
        if not strict:
            raise InvalidValueError(
                "strict-loading-only",
                "DistillRunner loads checkpoints strictly; strict=False would leave weights random unseen",
            )
        checkpoint = read_run_checkpoint(filename)
        self._read = ReadCheckpoint.of(checkpoint)
        model = plain_model(self)
        # a test has no objectives, whose trained parts are in the checkpoint
        unused = ("objectives.",) if self._train_loop is None else ()
        try:
            match(model, checkpoint["state_dict"], source=str(filename), ignore_unexpected=unused)
        except WeightsError as error:
            own = describe_network(model.meta()) if hasattr(model, "meta") else f"a {type(model).__name__}"
            raise WeightsError(
                "checkpoint-of-another-model",
                f"{filename} is of another model: it holds {describe_network(hgkd_of(checkpoint))}, this run trains {own}. "
                f"Use the config that wrote it, or start anew without it; {error}",
            ) from error
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)  # may exchange the weights, as EMAHook does
        state = checkpoint["state_dict"]
        if self._sharded:
            check_finite(Path(filename), state)
            own = model.state_dict()
            state = {key: divided(value, own.get(key)) for key, value in state.items()}
            if "optimizer" in checkpoint and isinstance(self.optim_wrapper, OptimWrapper):
                checkpoint["optimizer"] = divided_state(checkpoint["optimizer"], self.optim_wrapper)
        load_strict(model, state, source=str(filename), ignore_unexpected=unused, finite=not self._sharded)
        if hasattr(model, "load_meta"):
            meta = hgkd_of(checkpoint)
            # also of an average, which EMAHook has copied before, and exchanges with the model with all of its buffers
            for copied in self.averages():
                copied.load_meta(meta)
            if changed := model.load_meta(meta):
                self.logger.warning(changed)
        self._has_loaded = True
        return checkpoint

    def save_checkpoint(
        self, out_dir: str, filename: str, *args: object, meta: dict[str, Any] | None = None, **kwargs: object
    ) -> None:
        """Save as mmengine's runner, with ``meta['hgkd']`` describing the network; sealed, and renamed when complete.

        Raises:
            CheckpointWriteError: it cannot be written, e.g. because the disk is full.
        """
        with self.whole_state():
            self._save(out_dir, filename, *args, meta=meta, **kwargs)

    def _save(self, out_dir: str, filename: str, *args: object, meta: dict[str, Any] | None, **kwargs: object) -> None:
        model = plain_model(self)
        meta = {**(meta or {}), "steps_per_epoch": len(self.train_dataloader), "images": images_of(self)}
        meta["optimizer"] = type(self.optim_wrapper.optimizer).__name__
        if hasattr(model, "meta"):
            meta["hgkd"] = model.meta()
        if not is_main_process():
            return
        guard = getattr(self._train_loop, "guard", None)
        if guard is not None and guard.untrained and not filename.startswith(DUMP):
            self.logger.warning(f"{filename} is not written: every update so far was left out, so nothing has been trained")
            return
        final = Path(out_dir) / filename
        try:
            with replacing(final) as partial:
                super().save_checkpoint(out_dir, partial.name, *args, meta=meta, **kwargs)
                seal(partial)
        except OSError as error:
            free = shutil.disk_usage(out_dir).free / 2**20
            raise CheckpointWriteError(
                "checkpoint-not-written",
                f"cannot write {final}: {error.strerror or error}, {free:.0f} MB are free on its disk. Earlier checkpoints are "
                "untouched: free some space, or move the work folder to a larger disk, and continue with --resume",
            ) from error
