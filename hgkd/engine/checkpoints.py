"""Checkpoints that survive: sealed with their own hash, several kept, written by epochs, steps, minutes or on request.

A checkpoint is written beside, sealed, flushed to disk and renamed. ``work_dir/checkpoints.txt`` names those that are there,
newest first; a new one is entered before it gets its name, so whenever a run is killed the list holds every complete
checkpoint, and at worst one that does not exist yet. ``last_checkpoint`` is mmengine's own note, for tools that read it.

The seal is a SHA-256 in the comment field at the end of the zip file that ``torch.save`` writes (.ZIP application note 4.3.16);
torch reads such a file as ever.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process, master_only
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.runner import Runner

from hgkd.digests import stream_digest
from hgkd.engine.weights import read_checkpoint
from hgkd.errors import StoppedError, WeightsError
from hgkd.registry import HOOKS

LIST_NAME = "checkpoints.txt"
_SEAL = b"hgkd-sha256:"
_SEAL_SIZE = len(_SEAL) + 64
_END_OF_ZIP = b"PK\x05\x06"
_END_SIZE = 22


def seal(path: str | os.PathLike[str]) -> None:
    """Write a file's SHA-256 into its end, and flush the file to disk.

    Raises:
        ValueError: no zip file as ``torch.save`` writes it, or one with a comment already.
    """
    with open(path, "r+b") as file:
        file.seek(0, os.SEEK_END)
        end = file.tell() - _END_SIZE
        file.seek(max(end, 0))
        record = file.read()
        if not record.startswith(_END_OF_ZIP) or record[-2:] != b"\0\0":
            raise ValueError(f"{path} is no file of torch.save, so it cannot be sealed")
        file.seek(-2, os.SEEK_END)
        file.write(_SEAL_SIZE.to_bytes(2, "little"))
        file.flush()
        file.seek(0)
        digest = stream_digest(file, end + _END_SIZE)
        file.write(_SEAL + digest.encode())
        file.flush()
        os.fsync(file.fileno())


def is_damaged(path: str | os.PathLike[str]) -> bool:
    """Whether a sealed file is not what was sealed; a file without a seal is not judged."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _SEAL_SIZE, 0))
        found = file.read()
        if not found.startswith(_SEAL):
            return False
        file.seek(0)
        return _SEAL + stream_digest(file, size - _SEAL_SIZE).encode() != found


def read_run_checkpoint(filename: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint that a runner wrote, complete with optimiser and log, on the CPU.

    Raises:
        FileNotFoundError: no such file.
        WeightsError: damaged, unsafe, or no checkpoint of a runner.
    """
    if Path(filename).is_file() and is_damaged(filename):
        raise WeightsError(f"{filename} is damaged: its content does not agree with the hash that was written with it")
    checkpoint = read_checkpoint(filename)
    if not isinstance(checkpoint, dict) or not {"meta", "state_dict", "message_hub"} <= set(checkpoint):
        raise WeightsError(f"{filename} is no checkpoint of a training run, which holds 'meta', 'state_dict' and 'message_hub'")
    return checkpoint


def known_checkpoints(work_dir: str | os.PathLike[str]) -> list[str]:
    """File names of the checkpoints that a run has written into ``work_dir``, newest first; some may be gone."""
    for note in (LIST_NAME, "last_checkpoint"):
        path = Path(work_dir) / note
        if path.is_file():
            return [Path(line.strip()).name for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return []


def find_last_checkpoint(work_dir: str | os.PathLike[str]) -> str | None:
    """The newest intact checkpoint of a run, also when its folder was moved; None when it has written none.

    One that is damaged or was never completed is passed over with a warning.

    Raises:
        WeightsError: there are checkpoints, but none of them is intact.
    """
    reasons: list[str] = []
    for name in known_checkpoints(work_dir):
        path = Path(work_dir) / name
        try:
            read_run_checkpoint(path)
        except (WeightsError, FileNotFoundError) as error:
            reason = f"{path} was not completed" if not path.exists() else str(error)
            print_log(f"{reason}; falling back to the checkpoint before", "current", level=30)
            reasons.append(reason)
        else:
            return str(path)
    if any("was not completed" not in reason for reason in reasons):
        raise WeightsError(
            f"no intact checkpoint in {work_dir}: {'; '.join(reasons)}. Restore one from a backup and give its path to "
            "--resume, or start anew in another folder"
        )
    return None


def checkpoint_file(path: str | os.PathLike[str]) -> Path:
    """What a user calls a checkpoint: a file, or a run's work folder, whose last checkpoint is meant; other paths as they are.

    Raises:
        WeightsError: a work folder without an intact checkpoint.
    """
    found = Path(path).expanduser()
    last = find_last_checkpoint(found) if found.is_dir() else None
    return found if last is None else Path(last)


class CheckpointWriteError(StoppedError):
    """A checkpoint could not be written; the ones before are untouched."""


@contextmanager
def tell_system_errors(work_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Context in which what the system does to a run becomes one sentence: a full disk, no right to write, a killed reader.

    Raises:
        StoppedError: names file, reason and free space; or the reading process.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        if not _reader_died(error):
            raise
        raise StoppedError(
            f"a process that reads images was killed ({' '.join(str(error).split()) or type(error).__name__}), most often by "
            "the system when memory ran out. Complete checkpoints are untouched: continue with --resume, with fewer workers (0 "
            "= none extra), or a smaller batch_size"
        ) from error
    except OSError as error:
        if error.errno is None or isinstance(error, (FileNotFoundError, FileExistsError, ConnectionError)):
            raise
        folder = next(p for p in (Path(work_dir).absolute(), *Path(work_dir).absolute().parents) if p.exists())
        free = shutil.disk_usage(folder).free / 2**20
        raise StoppedError(
            f"the system refuses {error.filename or f'to write in {work_dir}'}: {error.strerror or error}; {free:.0f} MB are "
            f"free on the disk of {folder}. Checkpoints that are complete are untouched: free some space, or allow writing "
            "there (or give another --work-dir), and continue with --resume"
        ) from error


def _reader_died(error: BaseException) -> bool:
    """Whether a reading process of a data loader ended by itself; how that shows depends on what it was doing."""
    if isinstance(error, RuntimeError):
        return re.search(r"DataLoader worker \(pid", str(error)) is not None
    place = error.__traceback__
    while place is not None:
        if place.tb_frame.f_globals.get("__name__") == "torch.utils.data.dataloader":
            return True
        place = place.tb_next
    return False


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a small file beside and rename it, so that it is never seen half-written."""
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file beside and rename it, so that it is never seen half-written, and nothing is left where that fails."""
    beside = Path(f"{path}.partial")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


@HOOKS.register_module()
class RunCheckpointHook(CheckpointHook):
    """mmengine's ``CheckpointHook`` that also saves in the middle of an epoch, and before the run is stopped by a signal.

    Files: ``epoch_<n>.pth`` after n epochs, ``epoch_<n>_step_<m>.pth`` after n epochs and m steps. The best one is saved as
    mmengine does. In the middle of an epoch it saves only where no gradients are being accumulated, since these are not part of
    a checkpoint.

    Args:
        interval: epochs between two checkpoints.
        every_steps: also after so many steps; None: not by steps.
        every_minutes: also after so many minutes without one; None: not by time.
        max_keep_ckpts: so many are kept, at least 2, so that a damaged one has one before it; the best one comes on top.
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
            raise ValueError(
                f"max_keep_ckpts must be 2 or more, got {max_keep_ckpts}: when the last checkpoint is damaged, the run goes on "
                "from the one before"
            )
        for name, value in (("every_steps", every_steps), ("every_minutes", every_minutes)):
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive or None, got {value}")
        self.every_steps = every_steps
        self.every_minutes = every_minutes
        self._due = False
        self._saved_at = 0.0

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        self._saved_at = time.monotonic()
        if is_main_process():
            for partial in Path(self.out_dir).glob("*.pth.partial"):
                partial.unlink()  # of a run that was killed while it wrote
            if runner.iter == 0:
                write_text(Path(self.out_dir) / LIST_NAME, "")  # a new run in a used folder: what lies there is not its own

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        loop: Any = runner.train_loop
        done = runner.iter + 1
        minutes = (time.monotonic() - self._saved_at) / 60
        self._due |= self.every_steps is not None and done % self.every_steps == 0
        self._due |= self.every_minutes is not None and minutes >= self.every_minutes
        wanted = self._due or loop.interrupted
        if not wanted or not loop.between_updates or batch_idx + 1 == len(loop.dataloader):
            return  # the last step of an epoch is followed by the checkpoint of the epoch
        name = f"epoch_{runner.epoch}_step_{batch_idx + 1}.pth"
        self._write(runner, name, dict(epoch=runner.epoch, iter=done))

    def after_train_epoch(self, runner: Runner) -> None:
        loop: Any = runner.train_loop
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
