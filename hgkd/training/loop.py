"""Training epoch by epoch, such that a run that was stopped anywhere goes on as if it had not been.

Whatever is random about a step is a function of (seed, process, step), and about reading an image of (seed, epoch, image),
see :mod:`hgkd.data.sampler`; nothing depends on what was drawn before. A resumed run passes over the images that it has seen
without reading them, and validates first when it was killed before or while it did. SIGTERM and SIGINT end a run after its next
step.
"""

from __future__ import annotations

import atexit
import copy
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, cast

import numpy as np
import torch
from mmengine.dist import all_reduce, get_rank, get_world_size
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hgkd.data.sampler import EpochSampler, mixed_seed
from hgkd.errors import DivergedError, InvalidValueError
from hgkd.networks.untouched import unchanged
from hgkd.training.in_force import in_force, lines_of
from hgkd.training.last_batch import check_last_batch, told_single_values
from hgkd.training.resuming import images_that_differ
from hgkd.training.wrapping import plain_model

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def seed_step(seed: int, rank: int, step: int) -> None:
    """Seed Python, NumPy and torch (all devices) for a step, counted from 0 over the whole training."""
    mixed = mixed_seed(seed, rank, step)
    random.seed(mixed)
    np.random.seed(mixed % 2**32)
    torch.manual_seed(mixed)


def ignore_first_signal(worker: int) -> None:
    """Keep a data-loader worker alive when the whole job is asked to stop, until the training process has saved.

    SIGINT is ignored, and SIGTERM once: the second one, e.g. of the training process that clears up, ends it.
    """

    def first(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, first)


def end_workers_at_exit() -> None:
    """Register one ``atexit`` handler that terminates data-loader workers, which ignore the first SIGTERM.

    Workers that persist are alive at exit; without the handler multiprocessing would send one SIGTERM and wait for ever.
    Calling this again changes nothing.
    """
    atexit.unregister(_end_workers)
    atexit.register(_end_workers)


def _drop_child_handler() -> None:
    """Take away the handler that torch has set for the end of a reading process; Windows knows no such signal."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _end_workers() -> None:
    children = [child for child in multiprocessing.active_children() if child.daemon]
    if children:
        _drop_child_handler()  # it takes their end for an accident
    for child in children:
        child.terminate()
    if children:
        time.sleep(0.2)  # two at once would count as one
    for child in children:
        child.terminate()
        child.join(5)
        if child.is_alive():
            child.kill()


# in the log of a training that one ended, with exit code 0: whoever starts trainings looks for it
STOPPED = "stopped by a signal"


class StopSignals:
    """Context that notes SIGTERM and SIGINT instead of dying of them; a second one terminates the process (default handling).

    Outside the main thread, where Python allows no handlers, it notes nothing.

    Attributes:
        received: name of the signal, None so far.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def said(self) -> str:
        """The beginning of the line with which a log says that a training was stopped."""
        return f"{STOPPED} ({self.received or 'to another process'})"

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class _EndedBySignal(BaseException):
    """A signal that nobody notes, while nothing is to be saved."""


_NOTHING_SAVED = (
    "outside of the training steps, where nothing is saved; complete checkpoints are untouched, and --resume continues from "
    "the last of them"
)


@contextmanager
def told_signals(what: str = "") -> Iterator[None]:
    """Context of a whole program, in which SIGTERM and SIGINT outside of the training loop end it with one sentence.

    While it builds there is nothing to save; in the loop :class:`StopSignals` takes their place, and a second one comes here.
    Reading processes that inherit it end in silence: a SIGINT, which a terminal sends to all, is left to this process.

    Args:
        what: becomes of the work that is stopped; a training's by default.

    Raises:
        SystemExit: 128 + the number of the signal, as shells have it.
    """

    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:
            raise _EndedBySignal(number)
        if number == signal.SIGTERM:
            os._exit(128 + number)

    own = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, end) for number in _SIGNALS} if own else {}
    try:
        yield
    except _EndedBySignal as error:
        number = signal.Signals(error.args[0])
        sys.stderr.write(f"stopped by {number.name}{f': {what}' if what else f' {_NOTHING_SAVED}'}\n")
        raise SystemExit(128 + number) from error
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class GuardedOptimWrapper:
    """Stands between a model's ``train_step`` and the optimiser wrapper, and leaves out updates that would do damage.

    When loss or gradient is not finite, in any process, parameters, optimiser and running statistics stay what they were before
    the step. With dynamic loss scaling only the loss is judged: overflowing gradients are how the scaler finds its scale.

    ``train_step`` goes as far as the gradients; :meth:`settle` then decides, and reads all that is to be known of the step from
    the device at once: the host waits for a GPU once a step.

    Args:
        begun: the training goes on from a checkpoint, so that earlier updates have been made.

    Attributes:
        updated: the last step changed the parameters.
        skipped: the last step was left out. Both are False while gradients are being accumulated.
        stop: a process wants to end the run.
        save: a process wants a checkpoint.
        made: number of updates that were made.
        left_out: number of those that were not.
    """

    def __init__(self, wrapper: OptimWrapper, model: nn.Module, begun: bool = False) -> None:
        self.wrapper = wrapper
        self.updated = True
        self.skipped = False
        self.stop = False
        self.save = False
        self.made = self.left_out = 0
        self._begun = begun
        self._buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self._kept = [buffer.clone() for buffer in self._buffers]
        self._bad: Tensor | None = None  # on the device: whether anything since the last update was not finite
        self._norm: Tensor | None = None  # on the device: of all gradients, where they are clipped here
        self._unsettled = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapper, name)

    @property
    def untrained(self) -> bool:
        """Updates were left out, and none was ever made."""
        return not self._begun and not self.made and self.left_out > 0

    def require_trained(self) -> None:
        """At the end of a training: refuse to call it one when every update was left out.

        Raises:
            DivergedError: no update was made.
        """
        if self.untrained:
            raise DivergedError(
                "nothing-trained",
                f"every update of this training was left out ({self.left_out} of {self.left_out}), because loss or gradient "
                "was not finite: nothing has been trained, and no checkpoint was written. The warnings above say what to do",
            )

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """The wrapper's own, from which on running statistics may change."""
        if self.updated or self.skipped:  # otherwise the statistics of before the accumulation are kept already
            _copy_all(self._kept, self._buffers)
            self._bad = None
        with self.wrapper.optim_context(model):
            yield

    def update_params(self, loss: Tensor) -> None:
        """The first half of ``OptimWrapper.update_params``: gradients, and on the device whether all is finite."""
        if self._unsettled:
            raise RuntimeError(
                "a train_step that updates parameters twice cannot be guarded: GuardedOptimWrapper.settle must be in between"
            )
        wrapper = self.wrapper
        bad = ~torch.isfinite(loss.detach()).all()
        wrapper.backward(wrapper.scale_loss(loss))
        if wrapper.should_update() and not hasattr(wrapper, "loss_scaler"):
            norms = self._gradient_norms()
            if norms is not None:
                bad = bad | ~torch.isfinite(norms).all()
                self._norm = torch.linalg.vector_norm(norms) if self._clips_here() else None
        self._bad = bad if self._bad is None else self._bad | bad
        self._unsettled = True

    def settle(self, outputs: Mapping[str, Tensor], stop: bool = False, save: bool = False) -> dict[str, float]:
        """The second half: update, or undo, and say what the step's values are.

        Args:
            outputs: what ``train_step`` returned: name -> scalar on the device of the loss.
            stop: this process wants to end the run; all processes learn of it in :attr:`stop`.
            save: it wants a checkpoint; all learn of it in :attr:`save`.
        """
        if self._bad is None or not self._unsettled:
            raise RuntimeError("GuardedOptimWrapper.settle comes after a train_step that has called update_params")
        wrapper = self.wrapper
        wishes = [torch.full_like(self._bad, wish, dtype=torch.float32) for wish in (stop, save)]
        flags = torch.stack([self._bad.float(), *wishes])
        if get_world_size() > 1:
            all_reduce(flags, "max")
        norm, self._norm = self._norm, None
        values = [torch.as_tensor(value, device=flags.device).detach().reshape(1) for value in outputs.values()]
        asked = torch.cat([flags, *values, *([] if norm is None else [norm.reshape(1)])])
        bad, to_stop, to_save, *numbers = asked.tolist()  # the one place where the host waits
        self.stop, self.save = bool(to_stop), bool(to_save)
        self.updated = self.skipped = self._unsettled = False
        if wrapper.should_update():
            self.updated, self.skipped = not bad, bool(bad)
            self.made += self.updated
            self.left_out += self.skipped
            if self.updated and norm is not None:
                self._clip(norm, numbers.pop())
                with _unclipped(wrapper):  # through the wrapper, which is what the schedulers count
                    wrapper.step()
            elif self.updated:
                wrapper.step()
            else:
                _copy_all(self._buffers, self._kept)
            wrapper.zero_grad()
        return dict(zip(outputs, numbers, strict=False))  # a norm of gradients that are left out is the last of the numbers

    def _gradients(self) -> list[Tensor]:
        groups = self.wrapper.optimizer.param_groups
        return [p.grad for group in groups for p in group["params"] if p.grad is not None]

    def _gradient_norms(self) -> Tensor | None:
        """The norm of each gradient, fp32; None where there is none."""
        # of sharded parameters (FSDP2) each process judges its own part; the flags of all are reduced in settle
        gradients = [g.to_local() if hasattr(g, "to_local") else g for g in self._gradients()]
        return torch.stack([norm.float() for norm in torch._foreach_norm(gradients)]) if gradients else None

    def _clips_here(self) -> bool:
        """Whether the wrapper would only clip by the norm that is at hand, and wait for the device to log it."""
        wrapper, options = self.wrapper, self.wrapper.clip_grad_kwargs
        plain = type(wrapper).step is OptimWrapper.step and type(wrapper)._clip_grad is OptimWrapper._clip_grad
        by_norm = plain and wrapper.clip_func is nn.utils.clip_grad_norm_ if options else False
        ordinary = set(options or ()) <= {"max_norm", "norm_type"} and float((options or {}).get("norm_type", 2.0)) == 2.0
        return by_norm and ordinary and all(g.dtype == torch.float32 and not hasattr(g, "to_local") for g in self._gradients())

    def _clip(self, norm: Tensor, value: float) -> None:
        """As ``OptimWrapper._clip_grad``, by a norm that has been read already."""
        parameters = [p for group in self.wrapper.optimizer.param_groups for p in group["params"] if p.grad is not None]
        nn.utils.clip_grads_with_norm_(parameters, self.wrapper.clip_grad_kwargs["max_norm"], norm)
        self.wrapper.message_hub.update_scalar(f"train/{self.wrapper.grad_name}", value)


@contextmanager
def _unclipped(wrapper: OptimWrapper) -> Iterator[None]:
    """Context in which a wrapper takes the gradients as they are."""
    options, wrapper.clip_grad_kwargs = wrapper.clip_grad_kwargs, None
    try:
        yield
    finally:
        wrapper.clip_grad_kwargs = options


@torch.no_grad()
def _copy_all(into: list[Tensor], values: list[Tensor]) -> None:
    """Copy each value, in one call: a GPU gets a few launches in place of one a buffer."""
    if into:
        torch._foreach_copy_(into, values)


def idle_parameters(model: nn.Module) -> list[str]:
    """After a backward pass: names of the trained parameters that have no gradient."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]


def idle_in_any(parallel: object, guard: GuardedOptimWrapper, data_batch: object, seed: int, step: int) -> list[str]:
    """Names of the trained parameters that no process's loss of its batch reaches; nothing is changed.

    Before the first step that is data-parallel, since ``DistributedDataParallel`` waits for the gradients of all of them.

    Args:
        parallel: the model in its wrapper.
        seed, step: the random numbers are those that the step will have.
    """
    model: BaseModel = getattr(parallel, "module", parallel)
    with unchanged(model):
        seed_step(seed, get_rank(), step)
        with guard.wrapper.optim_context(model):
            losses = model(**model.data_preprocessor(copy.deepcopy(data_batch), True), mode="loss")
        model.parse_losses(losses)[0].backward()
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    reached = torch.tensor([float(parameter.grad is not None) for _, parameter in trained], device=trained[0][1].device)
    all_reduce(reached, "max")
    model.zero_grad(set_to_none=True)
    return [name for (name, _), found in zip(trained, reached.tolist(), strict=True) if not found]


class ExactEpochLoop(EpochBasedTrainLoop):
    """Training loop by epochs with exact resuming, see the module's header; arguments as of mmengine's ``EpochBasedTrainLoop``.

    Attributes:
        interrupted: a signal asks this run to end after the step that is being done.
        guard: what became of the last update.
        save_wanted: this process wants a checkpoint after the step that is being done; ``guard.save`` says it of all.
        resumable: a signal's message advises ``--resume``; a program that trains as one step of many sets it to False.
    """

    _iter: int

    def __init__(self, runner: Runner, dataloader: DataLoader[Any] | dict[str, Any], **options: object) -> None:
        super().__init__(runner, dataloader, **options)
        self.interrupted = False
        self.guard: GuardedOptimWrapper | None = None
        self.save_wanted = False
        self.resumable = True
        self._signals = StopSignals()
        self._first = True  # the next step is the first of this start

    @property
    def between_updates(self) -> bool:
        """No gradients are being accumulated, so a checkpoint now would be complete."""
        return self.guard is None or self.guard.updated or self.guard.skipped

    def check_position(self, source: str, meta: Mapping[str, Any]) -> str | None:
        """Refuse to go on in the middle of an epoch of other images or batches; after an epoch, count in this run's steps.

        Args:
            source: name of the checkpoint, for messages.
            meta: the checkpoint's.

        Returns:
            What has changed between two epochs; None: nothing.

        Raises:
            ValueError: it is from the middle of an epoch, and images, batch size or number of processes are others now.
        """
        steps = len(self.dataloader)
        before, differ = int(meta.get("steps_per_epoch", steps)), images_that_differ(meta, self.runner)
        if not differ and before != steps:
            differ = f"steps an epoch {before} -> {steps}"
        done = self._iter - self._epoch * before
        if done == 0:
            self._iter = self._epoch * steps
            return f"{source} is from the end of an epoch; those that follow differ from it: {differ}" if differ else None
        if differ or not 0 < done < before:
            raise InvalidValueError(
                "resume-other-batches",
                f"{source} is from epoch {self._epoch + 1}, step {done} of {before}, and with other images or batches it is "
                f"not known which were seen: {differ or f'step {self._iter} of the training is not in that epoch'}. Resume "
                "with the images, batch_size and number of processes that it was written with, or from the end of an epoch "
                "(--resume epoch_N.pth)",
            )
        return None

    def run(self) -> nn.Module:
        """Train to the end, or until a signal asks to stop."""
        runner = self.runner
        self.guard = GuardedOptimWrapper(runner.optim_wrapper, runner.model, begun=self._iter > 0)
        runner.call_hook("before_train")
        runner.logger.info(self.plan())
        runner.logger.info(f"in force:\n{lines_of(in_force(runner, self, Path(runner.work_dir).absolute()))}")
        with StopSignals() as self._signals:
            self._validate()
            while self._epoch < self._max_epochs and not self.stop_training and not self.interrupted:
                self.run_epoch()
                if not self.interrupted:
                    self._decide_current_val_interval()
                    self._validate()
            # a signal that comes from here on has nothing to stop
            if self.interrupted:
                last = runner.message_hub.runtime_info.get("last_ckpt")
                if self.guard.untrained:
                    saved = "no update was made, so nothing was saved"
                elif last:
                    saved = f"saved {last}" + (", continue with --resume" if self.resumable else "")
                else:
                    saved = "no checkpoint hook, so nothing was saved"
                runner.logger.warning(f"{self._signals.said} after epoch {self._epoch}, step {self._iter}; {saved}")
            runner.call_hook("after_train")
        if not self.interrupted:
            self.guard.require_trained()
        model: nn.Module = runner.model
        return model

    def run_epoch(self) -> None:
        """The steps of an epoch that have not been done yet."""
        runner = self.runner
        runner.call_hook("before_train_epoch")
        runner.model.train()
        steps = len(self.dataloader)
        done = self._iter - self._epoch * steps
        if done:
            if not isinstance(self.dataloader.sampler, EpochSampler):
                kind = type(self.dataloader.sampler).__name__
                raise InvalidValueError(
                    "resume-mid-epoch-sampler",
                    f"a run cannot go on in the middle of an epoch with {kind}, which starts at its beginning; set "
                    "train_dataloader.sampler=dict(type='EpochSampler'), or resume from the end of an epoch",
                )
            self.dataloader.sampler.skip = done * self.dataloader.batch_size
        batches = iter(self.dataloader)
        if self.dataloader.num_workers and threading.current_thread() is threading.main_thread():
            # torch's handler raises in the middle of whatever is done when a reading process dies, where it can be swallowed
            # half-way through an update; without it the death is noticed when the next batch is asked for
            _drop_child_handler()
        for idx, data_batch in enumerate(batches, start=done):
            self.run_iter(idx, data_batch)
            if self.interrupted and self.between_updates and idx + 1 < steps:
                return
        runner.call_hook("after_train_epoch")
        self._epoch += 1

    def run_iter(self, idx: int, data_batch: object) -> None:
        """One step, which depends on (seed, process, step), the batch and the weights, and on nothing else.

        Hooks get the step's losses as numbers, already read from the device.
        """
        guard = cast(GuardedOptimWrapper, self.guard)
        runner = self.runner
        runner.call_hook("before_train_iter", batch_idx=idx, data_batch=data_batch)
        first, self._first = self._first, False
        if first:
            check_last_batch(plain_model(runner), self, data_batch)
        if first and get_world_size() > 1:
            runner.say_idle_parameters(idle_in_any(runner.model, guard, data_batch, runner.seed or 0, self._iter))
        seed_step(runner.seed or 0, get_rank(), self._iter)
        with told_single_values():
            outputs = runner.model.train_step(data_batch, optim_wrapper=guard)
        if first and get_world_size() == 1:
            runner.say_idle_parameters(idle_parameters(runner.model))
        losses = guard.settle(outputs, stop=self._signals.received is not None, save=self.save_wanted)
        self.interrupted = guard.stop
        runner.call_hook("after_train_iter", batch_idx=idx, data_batch=data_batch, outputs=losses)
        self._iter += 1

    def _validate(self) -> None:
        """Validate where an epoch has ended, unless this run did so before it was resumed."""
        runner = self.runner
        due = self._epoch >= self.val_begin and (self._epoch % self.val_interval == 0 or self._epoch == self._max_epochs)
        if runner.val_loop is None or not due or self._epoch == 0:
            return
        if runner.message_hub.runtime_info.get("last_validated_epoch") == self._epoch:
            return
        # before, so that the checkpoints that a validation writes say it
        runner.message_hub.update_info("last_validated_epoch", self._epoch)
        runner.val_loop.run()

    def plan(self) -> str:
        """Summary of what this run is about to do, in one line: images, batch, learning rate and its rule, steps."""
        runner = self.runner
        batch, processes = self.dataloader.batch_size, runner.world_size
        accumulated = runner.optim_wrapper._accumulative_counts
        group: Mapping[str, Any] = runner.optim_wrapper.optimizer.param_groups[0]
        lr = group.get("initial_lr", group["lr"])
        rule = runner.auto_scale_lr or {}
        now = f", {group['lr']:.4g} now" if self._iter else ""
        base = rule.get("base_batch_size", 1)
        scaled = (
            f"{lr * base / (batch * processes):.4g} x {batch * processes}/{base} by the batch"
            if rule.get("enable")
            else "as it is, whatever the batch"
        )
        if rule.get("enable") and accumulated > 1:
            scaled += ", which does not count accumulation"
        return (
            f"{len(self.dataloader.dataset)} images; {batch} a step and process x {processes} processes x {accumulated} "
            f"accumulated = {batch * processes * accumulated} an update; lr {lr:.4g}{now} ({scaled}); {len(self.dataloader)} "
            f"steps an epoch, {self._max_epochs} epochs; {self._iter} of {self._max_iters} steps are done"
        )
