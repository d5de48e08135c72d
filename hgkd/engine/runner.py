"""mmengine's runner with strict, safe and exact resuming, and with checkpoints that say what they hold.

Against mmengine 0.10.7: checkpoints are read with ``weights_only=True`` on every torch; a checkpoint that does not fit the
model is refused before anything is changed (mmengine loads what fits and only logs the rest); a run goes on in the middle of
an epoch (:mod:`hgkd.engine.loop`); data-parallel training and ``sync_bn`` work without CUDA (gloo); checkpoints are sealed with
their hash, written beside and renamed (:mod:`hgkd.engine.checkpoints`).
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.dist import broadcast, is_distributed, is_main_process
from mmengine.logging import MMLogger
from mmengine.model import MMDistributedDataParallel, is_model_wrapper
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from hgkd.engine.checkpoints import CheckpointWriteError, find_last_checkpoint, read_run_checkpoint, seal
from hgkd.engine.hooks import plain_model
from hgkd.engine.loop import ExactEpochLoop, end_readers_at_exit, outlive_signals
from hgkd.engine.recompute import recompute_activations
from hgkd.engine.schedule import without_empty_warmup
from hgkd.engine.sync_norm import sync_batch_norms
from hgkd.engine.weights import load_strict, match
from hgkd.errors import WeightsError
from hgkd.registry import RUNNERS


def _what(meta: Any) -> str:
    """The network that ``meta['hgkd']`` of a checkpoint describes, in words."""
    meta = meta if isinstance(meta, Mapping) else {}
    if isinstance(meta.get("encoder"), Mapping):
        return f"a student {meta['encoder'].get('name')!r}"
    if isinstance(meta.get("classifier"), Mapping):
        spec = meta["classifier"]
        heads = "two heads" if spec.get("two_heads") else "one head"
        return f"a classifier {spec.get('name')!r} of {spec.get('num_classes')} classes with {heads}"
    return "a masked autoencoder" if "mae" in meta else "a model that it does not describe"


@RUNNERS.register_module()
class DistillRunner(Runner):
    """See the module's header; arguments are those of ``mmengine.runner.Runner``."""

    _load_from: str | None

    def setup_env(self, env_cfg: dict[str, Any]) -> None:
        # mmengine's own initialisation sets a CUDA device unconditionally
        if self.distributed and not is_distributed() and not torch.cuda.is_available():
            torch.distributed.init_process_group("gloo")
        super().setup_env(env_cfg)
        # names logger, message hub and visualiser, which mmengine shares between runs of the same second
        now = torch.tensor(time.time(), dtype=torch.float64)
        broadcast(now)
        seconds = now.item()
        self._timestamp = time.strftime("%Y%m%d_%H%M%S", time.localtime(seconds)) + f"_{int(seconds % 1 * 1000):03d}"

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        logger: MMLogger = super().build_logger(*args, **kwargs)
        # mmengine's advice to itself: its own hooks use these parts, a user can do nothing about it
        logger.addFilter(lambda record: "will be deprecated in future" not in record.getMessage())
        return logger

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        if not self.distributed or model_wrapper_cfg is not None or is_model_wrapper(model):
            wrapped: nn.Module = super().wrap_model(model_wrapper_cfg, model)
            return wrapped
        model = model.to(get_device())
        if self.cfg.get("sync_bn"):
            self.logger.info(f"{sync_batch_norms(model)} batch normalisations take their statistics over all processes")
        devices = [int(os.environ["LOCAL_RANK"])] if torch.cuda.is_available() else None
        unused = self.cfg.get("find_unused_parameters", False)
        return MMDistributedDataParallel(
            module=model, device_ids=devices, broadcast_buffers=False, find_unused_parameters=unused
        )

    def train(self) -> nn.Module:
        """As mmengine's, with activation checkpointing that suits sparse tensors (:mod:`hgkd.engine.recompute`)."""
        recompute_activations(plain_model(self), self.cfg.get("activation_checkpointing") or [])
        self.cfg.activation_checkpointing = None  # mmengine would do it once more, its own way
        model: nn.Module = super().train()
        return model

    @staticmethod
    def build_dataloader(
        dataloader: DataLoader[Any] | dict[str, Any], seed: int | None = None, diff_rank_seed: bool = False
    ) -> DataLoader[Any]:
        if not isinstance(dataloader, DataLoader):
            dataloader = {"pin_memory": torch.cuda.is_available(), **dataloader}  # without CUDA it only warns
        loader: DataLoader[Any] = Runner.build_dataloader(dataloader, seed, diff_rank_seed)
        if not isinstance(dataloader, DataLoader) and "worker_init_fn" not in dataloader:
            # mmengine's gives a worker the same seed in every epoch; here images bring their own
            loader.worker_init_fn = outlive_signals
            end_readers_at_exit()
        return loader

    def build_train_loop(self, loop: Any) -> Any:
        if isinstance(loop, dict):
            if not loop.get("by_epoch"):
                raise ValueError(
                    f"train_cfg={dict(loop)} does not train by epochs, which exact resuming needs; set "
                    "train_cfg=dict(by_epoch=True, max_epochs=...)"
                )
            options = {key: value for key, value in loop.items() if key != "by_epoch"}
            loop = ExactEpochLoop(self, self._train_dataloader, **options)
        built = super().build_train_loop(loop)
        if built.max_epochs < 1:
            raise ValueError(f"epochs (train_cfg.max_epochs) is {built.max_epochs}; it must be 1 or more")
        if built.max_iters < 1:
            loader = built.dataloader
            raise ValueError(
                f"no training step: {len(loader.dataset)} images do not fill one batch of {loader.batch_size} "
                "(incomplete batches are dropped); use more images or a smaller batch_size"
            )
        return built

    def build_param_scheduler(self, scheduler: Any) -> Any:
        """As mmengine's, without a warm-up that is shorter than a step."""
        kept = without_empty_warmup(scheduler, len(self.train_dataloader))
        if len(kept) < len(scheduler):
            self.logger.warning("the warm-up is left out: it is shorter than one step")
        return super().build_param_scheduler(kept)

    def load_or_resume(self) -> None:
        if not self._has_loaded and self._resume and self._load_from is None:
            last = find_last_checkpoint(self.work_dir)
            if last is None:
                self.logger.warning(
                    f"nothing to resume in {self.work_dir}: there is no checkpoint; starting from the beginning"
                )
                return
            self.logger.info(f"resuming from the last checkpoint {last}")
            self._load_from = last
        super().load_or_resume()

    def resume(
        self,
        filename: str,
        resume_optimizer: bool = True,
        resume_param_scheduler: bool = True,
        map_location: Any = "default",
    ) -> None:
        super().resume(filename, resume_optimizer, resume_param_scheduler, map_location)
        if isinstance(self.train_loop, ExactEpochLoop):
            self.train_loop.check_position(filename)
        # with seed=None the order of the data was drawn before the checkpoint's seed was known
        sampler: Any = self.train_dataloader.sampler
        if not self._randomness_cfg.get("diff_rank_seed", False) and hasattr(sampler, "seed"):
            sampler.seed = self.seed

    def load_checkpoint(
        self, filename: str, map_location: Any = "cpu", strict: bool = True, revise_keys: Any = None
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
            raise ValueError("DistillRunner loads checkpoints strictly; strict=False would leave weights random unseen")
        checkpoint = read_run_checkpoint(filename)
        model: Any = plain_model(self)
        # a test has no objectives, whose trained parts are in the checkpoint
        unused = ("objectives.",) if self._train_loop is None else ()
        try:
            match(model, checkpoint["state_dict"], source=str(filename), ignore_unexpected=unused)
        except WeightsError as error:
            own = _what(model.meta()) if hasattr(model, "meta") else f"a {type(model).__name__}"
            raise WeightsError(
                f"{filename} is of another model: it holds {_what(checkpoint['meta'].get('hgkd'))}, this run trains {own}. "
                f"Use the config that wrote it, or start anew without it; {error}"
            ) from error
        self.call_hook("after_load_checkpoint", checkpoint=checkpoint)  # may exchange the weights, as EMAHook does
        load_strict(model, checkpoint["state_dict"], source=str(filename), ignore_unexpected=unused)
        if hasattr(model, "take_meta"):
            model.take_meta(checkpoint["meta"].get("hgkd") or {})
        self._has_loaded = True
        return checkpoint

    def save_checkpoint(
        self, out_dir: str, filename: str, *args: Any, meta: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """As mmengine's, with ``meta['hgkd']`` describing the network; written beside, sealed, and renamed when complete.

        Raises:
            CheckpointWriteError: it cannot be written, e.g. because the disk is full.
        """
        model: Any = plain_model(self)
        meta = {**(meta or {}), "steps_per_epoch": len(self.train_dataloader)}
        if hasattr(model, "meta"):
            meta["hgkd"] = model.meta()
        if not is_main_process():
            return
        partial, final = os.path.join(out_dir, f"{filename}.partial"), os.path.join(out_dir, filename)
        try:
            super().save_checkpoint(out_dir, f"{filename}.partial", *args, meta=meta, **kwargs)
            seal(partial)
            os.replace(partial, final)
        except OSError as error:
            Path(partial).unlink(missing_ok=True)
            free = shutil.disk_usage(out_dir).free / 2**20
            raise CheckpointWriteError(
                f"cannot write {final}: {error.strerror or error}, {free:.0f} MB are free on its disk. Earlier checkpoints are "
                "untouched: free some space, or move the work folder to a larger disk, and continue with --resume"
            ) from error
