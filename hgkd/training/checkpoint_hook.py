"""Checkpoints that survive: several kept, written by epochs, steps, minutes or on request."""

from __future__ import annotations

import math
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process, master_only
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from hgkd.errors import InvalidValueError, StoppedError
from hgkd.registry import HOOKS
from hgkd.weights.run_folder import LIST_NAME, known_checkpoints
from hgkd.writing import PARTIAL, write_text


class CheckpointWriteError(StoppedError):
    """A checkpoint could not be written; the ones before are untouched."""


@HOOKS.register_module()
class RunCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook`` that also saves in the middle of an epoch, and before the run is stopped by a signal.

    Files: ``epoch_<n>.pth`` after n epochs, ``epoch_<n>_step_<m>.pth`` after n epochs and m steps. The best one is saved as
    mmengine does. In the middle of an epoch it saves only where no gradients are being accumulated, since these are not part of
    a checkpoint.

    Args:
        interval: epochs between two checkpoints.
        every_steps: also after this number of steps; None: not by steps.
        every_minutes: also after this number of minutes without one; None: not by time.
        max_keep_ckpts: number kept, at least 2, so that a damaged one has one before it; the best one comes on top.
        save_best, rule: metric whose best checkpoint is kept, and 'greater' or 'less'.

    Raises:
        ValueError: fewer than 2 kept, or an interval that is not positive.
    """

    def __init__(
        self,
        interval: int = 1,
        every_steps: int | None = None,
        every_minutes: float | None = None,
        max_keep_ckpts: int = 2,
        save_best: str | None = None,
        rule: str | None = None,
    ) -> None:
        super().__init__(interval, max_keep_ckpts=max_keep_ckpts, save_best=save_best, rule=rule)
        if max_keep_ckpts < 2:
            raise InvalidValueError(
                "too-few-kept-checkpoints",
                f"max_keep_ckpts must be 2 or more, got {max_keep_ckpts}: when the last checkpoint is damaged, the run goes on "
                "from the one before",
            )
        for name, value in (("every_steps", every_steps), ("every_minutes", every_minutes)):
            if value is not None and value <= 0:
                raise InvalidValueError("interval-not-positive", f"{name} must be positive or None, got {value}")
        self.every_steps = every_steps
        self.every_minutes = every_minutes
        self._due = False
        self._saved_at = 0.0

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        self._saved_at = time.monotonic()
        if is_main_process():
            for partial in Path(self.out_dir).glob(f"*.pth{PARTIAL}"):
                partial.unlink()  # of a run that was killed while it wrote
            if runner.iter == 0:
                write_text(Path(self.out_dir) / LIST_NAME, "")  # a new run in a used folder: what lies there is not its own

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: object = None) -> None:
        # each process has its own clock, and where parameters are sharded all of them must gather together
        minutes = (time.monotonic() - self._saved_at) / 60
        runner.train_loop.save_wanted = self.every_minutes is not None and minutes >= self.every_minutes

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None, outputs: dict[str, Any] | None = None
    ) -> None:
        loop = runner.train_loop
        done = runner.iter + 1
        self._due |= self.every_steps is not None and done % self.every_steps == 0
        self._due |= loop.guard.save
        wanted = self._due or loop.interrupted
        if not wanted or not loop.between_updates or batch_idx + 1 == len(loop.dataloader):
            return  # the last step of an epoch is followed by the checkpoint of the epoch
        name = f"epoch_{runner.epoch}_step_{batch_idx + 1}.pth"
        self._write(runner, name, dict(epoch=runner.epoch, iter=done))

    def after_train_epoch(self, runner: Runner) -> None:
        loop = runner.train_loop
        if self._due or loop.interrupted:
            self._save_checkpoint(runner)
        else:
            super().after_train_epoch(runner)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict[str, float]) -> None:
        # mmengine's removes the best one before the better one is written, and takes infinity for a score
        finite = {
            name: value if isinstance(value, (int, float)) and math.isfinite(value) else None for name, value in metrics.items()
        }
        before: str | None = getattr(self, "best_ckpt_path", None)
        self.best_ckpt_path: str | None = None
        try:
            super()._save_best_checkpoint(runner, finite)
        finally:
            better, self.best_ckpt_path = self.best_ckpt_path, self.best_ckpt_path or before
        if before and better and before != better and is_main_process():
            Path(before).unlink(missing_ok=True)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        # mmengine's removes the oldest checkpoint before the new one is written
        self._write(runner, self.filename_tmpl.format(step), meta)

    def _write(self, runner: Runner, name: str, meta: dict[str, Any]) -> None:
        self.last_ckpt = os.path.join(self.out_dir, name)
        self._due = False
        self._saved_at = time.monotonic()
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        with getattr(runner, "whole_state", nullcontext)():  # of sharded parameters all processes gather, and one writes
            self._write_and_remove(runner, name, meta)

    @master_only
    def _write_and_remove(self, runner: Runner, name: str, meta: dict[str, Any]) -> None:
        folder = Path(self.out_dir)
        known = [name, *[other for other in known_checkpoints(folder) if other != name]]
        write_text(folder / LIST_NAME, "\n".join(known) + "\n")
        runner.save_checkpoint(
            self.out_dir,
            name,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
        )
        write_text(Path(runner.work_dir) / "last_checkpoint", str(self.last_ckpt))
        for old in known[self.max_keep_ckpts :]:
            (folder / old).unlink(missing_ok=True)
        write_text(folder / LIST_NAME, "\n".join(known[: self.max_keep_ckpts]) + "\n")
