"""mmengine's training loops that outlive signals and bad losses: SIGTERM and SIGINT end a run with a checkpoint after its next
step, and an update whose loss or gradient is not finite is left out (:class:`hgkd.training.loop.GuardedOptimWrapper`).

The transforms of mmdet and mmseg draw their random numbers where they like, so going on is not exact as in
:class:`hgkd.training.loop.ExactEpochLoop`. The order of the images is the sampler's, a function of seed and epoch: batches that
were trained on are read and passed over, and what augmentations draw for the others is drawn anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from mmengine.dist import get_world_size
from mmengine.hooks import CheckpointHook
from mmengine.model import BaseModel
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch import nn
from torch.utils.data import DataLoader

from hgkd.errors import InvalidValueError
from hgkd.registry import HOOKS
from hgkd.training.hooks.alarms import FiniteLossHook
from hgkd.training.in_force import in_force, lines_of
from hgkd.training.last_batch import check_last_batch, told_single_values
from hgkd.training.loop import GuardedOptimWrapper, StopSignals, idle_in_any, idle_parameters
from hgkd.training.resuming import images_that_differ
from hgkd.training.wrapping import plain_model

_POSITION = "stopped_in_epoch"  # in the message hub, which checkpoints hold: [steps done, steps of an epoch]


def guarded_step(
    model: BaseModel, data_batch: object, guard: GuardedOptimWrapper, stop: bool = False, look: Callable[[], None] | None = None
) -> dict[str, Any]:
    """A training step whose update is left out when loss or gradient is not finite; what ``train_step`` returned.

    Args:
        stop: see :meth:`GuardedOptimWrapper.settle`.
        look: is called when there are gradients.

    Raises:
        ValueError: a batch normalisation got one value a channel.
    """
    with told_single_values():
        outputs: dict[str, Any] = model.train_step(data_batch, optim_wrapper=guard)
    if look is not None:
        look()
    guard.settle(outputs, stop=stop)
    return outputs  # tensors, as hooks of mmdet expect


class _Stoppable(BaseLoop):
    """What both loops share; arguments are those of mmengine's.

    Attributes:
        interrupted: a signal asks this run to end after the step that is being done.
        guard: what became of the last update.
    """

    _epoch: int
    _iter: int
    stop_training: bool

    def __init__(self, runner: Runner, dataloader: DataLoader[Any] | dict[str, Any], **options: object) -> None:
        super().__init__(runner, dataloader, **options)
        self.interrupted = False
        self.guard: GuardedOptimWrapper | None = None
        self._signals = StopSignals()
        self._first = True  # the next step is the first of this start

    def run(self) -> nn.Module:
        """Train to the end, or until a signal asks to stop."""
        runner = self.runner
        self.guard = GuardedOptimWrapper(runner.optim_wrapper, runner.model, begun=self._iter > 0)
        runner.logger.info(f"in force:\n{lines_of(in_force(runner, self, Path(runner.work_dir).absolute()))}")
        with StopSignals() as self._signals:
            model: nn.Module = super().run()
        if not self.interrupted:
            self.guard.require_trained()
        return model

    def _step(self, idx: int, data_batch: object) -> None:
        """mmengine's ``run_iter`` with the guard between model and optimiser."""
        guard = cast(GuardedOptimWrapper, self.guard)
        self.runner.call_hook("before_train_iter", batch_idx=idx, data_batch=data_batch)
        first, self._first = self._first, False
        if first:
            self._check_first(data_batch)
        look = self._say_idle if first and get_world_size() == 1 else None
        outputs = guarded_step(self.runner.model, data_batch, guard, self._signals.received is not None, look)
        self.runner.call_hook("after_train_iter", batch_idx=idx, data_batch=data_batch, outputs=outputs)
        self._iter += 1
        # while gradients are being accumulated, which no checkpoint holds, it goes on
        self.interrupted = guard.stop and (guard.updated or guard.skipped)

    def _check_first(self, data_batch: object) -> None:
        """What is to be known before the first step of this start."""
        runner = self.runner
        check_last_batch(plain_model(runner), self, data_batch)
        if get_world_size() > 1:
            guard = cast(GuardedOptimWrapper, self.guard)
            runner.say_idle_parameters(idle_in_any(runner.model, guard, data_batch, runner.seed or 0, self._iter))

    def _say_idle(self) -> None:
        runner = self.runner
        runner.say_idle_parameters(idle_parameters(runner.model))

    def _stop(self, steps: int, what_follows: str) -> None:
        """Save with the checkpoint hook, under its name, and let mmengine's loop end.

        Args:
            steps: done of the running epoch.
            what_follows: on --resume, for the log.
        """
        runner = self.runner
        self.stop_training = True
        where = f"{self._signals.said} after epoch {self._epoch}, step {steps}"
        hook = next((hook for hook in runner.hooks if isinstance(hook, CheckpointHook)), None)
        if hook is None:
            runner.logger.warning(f"{where}; no checkpoint hook, so nothing was saved")
            return
        name = self._iter if not hook.by_epoch else f"{self._epoch}_step_{steps}" if steps else self._epoch
        file = os.path.join(hook.out_dir, hook.filename_tmpl.format(name))
        if hook.last_ckpt != file:  # the hook's own interval may have ended here
            hook._save_checkpoint_with_step(runner, name, meta=dict(epoch=self._epoch, iter=self._iter))
        if cast(GuardedOptimWrapper, self.guard).untrained:
            runner.logger.warning(f"{where}; no update was made, so nothing was saved")
            return
        runner.logger.warning(f"{where}; saved {file}, continue with --resume: {what_follows}")


class StoppableEpochLoop(_Stoppable, EpochBasedTrainLoop):
    """mmengine's ``EpochBasedTrainLoop``, see the module's header."""

    def check_position(self, source: str, meta: Mapping[str, Any]) -> str | None:
        """Compare positions as :meth:`hgkd.training.loop.ExactEpochLoop.check_position`, by mmengine's message hub."""
        done, steps = self.runner.message_hub.runtime_info.get(_POSITION, (0, 0))
        now, differ = len(self.dataloader), images_that_differ(meta, self.runner)
        if done and (differ or steps != now):
            raise InvalidValueError(
                "resume-other-batches",
                f"{source} is from step {done} of an epoch of {steps} steps, and an epoch has {now} now. Resume with the "
                f"images, batch_size and processes that it was written with{f' ({differ})' if differ else ''}, or from the end "
                "of an epoch (--resume epoch_N.pth)",
            )
        if not done and (differ or meta.get("steps_per_epoch", now) != now):
            self._iter = self._epoch * now
            return f"{source} is from the end of an epoch; those that follow differ from it: {differ or 'other steps'}"
        return None

    def run_epoch(self) -> None:
        """The steps of an epoch that have not been done yet."""
        runner = self.runner
        steps = len(self.dataloader)
        done: int = runner.message_hub.pop_info(_POSITION, (0, 0))[0]
        runner.call_hook("before_train_epoch")
        runner.model.train()
        if done:
            runner.logger.info(f"passing over the {done} of {steps} batches of epoch {self._epoch + 1} that are trained on")
        for idx, data_batch in enumerate(self.dataloader):
            if idx < done:
                continue
            self.run_iter(idx, data_batch)
            if self.interrupted and idx + 1 < steps:
                self.val_begin = self.max_epochs + 1  # mmengine's run would validate in the middle of an epoch
                runner.message_hub.update_info(_POSITION, [idx + 1, steps])
                self._stop(
                    idx + 1,
                    f"it reads {idx + 1} batches of the epoch again, and trains on the other {steps - idx - 1}",
                )
                return
        runner.call_hook("after_train_epoch")
        self._epoch += 1
        self.interrupted = self.interrupted and self._epoch < self.max_epochs
        if self.interrupted:
            self._stop(0, "nothing is repeated")

    def run_iter(self, idx: int, data_batch: object) -> None:
        """One step."""
        self._step(idx, data_batch)


class StoppableIterLoop(_Stoppable, IterBasedTrainLoop):
    """mmengine's ``IterBasedTrainLoop``, see the module's header."""

    def check_position(self, source: str, meta: Mapping[str, Any]) -> str | None:
        """Sentence about changes since the checkpoint with this ``meta``; None: nothing. The run goes on all the same."""
        differ = images_that_differ(meta, self.runner)
        if not differ:
            return None
        return (
            f"{source} was written with other images or batches ({differ}): {self._iter} batches of the present kind are "
            "passed over, so some images are shown again, or left out, in the first pass"
        )

    def run_iter(self, data_batch: object) -> None:
        """One step."""
        self._step(self._iter, data_batch)
        self.interrupted = self.interrupted and self._iter < self.max_iters
        if self.interrupted:
            self._stop(self._iter, f"it reads {self._iter} batches again, and trains on those after them")


@HOOKS.register_module()
class DownstreamFiniteLossHook(FiniteLossHook):
    """``FiniteLossHook`` that names the images by their files, and leaves no dump: steps of detectors cannot be replayed."""

    def _images(self, data_batch: object) -> list[Any]:
        samples = data_batch.get("data_samples") if isinstance(data_batch, Mapping) else None
        return [getattr(sample, "img_path", "?") for sample in samples] if isinstance(samples, (list, tuple)) else []

    def _end(self, runner: Runner) -> str:
        return "the weights are those of before, and the last checkpoint is not touched"
