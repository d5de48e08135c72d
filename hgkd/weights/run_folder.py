"""A run's checkpoints: sealed with their own hash, listed in its folder, the newest intact one found.

A checkpoint is written under a temporary name, sealed, flushed to disk and renamed. ``work_dir/checkpoints.txt`` names those
that are there, newest first; a new one is entered before it gets its name, so whenever a run is killed the list holds every
complete checkpoint, and at worst one that does not exist yet. ``last_checkpoint`` is mmengine's own note for other tools.

The seal is a SHA-256 in the comment field at the end of the zip file that ``torch.save`` writes (.ZIP application note 4.3.16);
torch reads such a file like any other.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log

from hgkd.digests import stream_digest
from hgkd.errors import InvalidValueError, StoppedError, WeightsError
from hgkd.weights.files import read_checkpoint

LIST_NAME = "checkpoints.txt"
_SEAL = b"hgkd-sha256:"
_SEAL_SIZE = len(_SEAL) + 64
_END_OF_ZIP = b"PK\x05\x06"
_END_SIZE = 22
_NO_CPU_MEMORY = "DefaultCPUAllocator"  # how torch tells it of a CPU, by a plain RuntimeError


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
            raise InvalidValueError("seal-of-other-file", f"{path} is no file of torch.save, so it cannot be sealed")
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
        raise WeightsError(
            "file-hash-differs", f"{filename} is damaged: its content does not agree with the hash that was written with it"
        )
    checkpoint = read_checkpoint(filename)
    if not isinstance(checkpoint, dict) or not {"meta", "state_dict", "message_hub"} <= set(checkpoint):
        raise WeightsError(
            "checkpoint-not-of-training",
            f"{filename} is no checkpoint of a training run, which holds 'meta', 'state_dict' and 'message_hub'",
        )
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
    last = last_intact(work_dir)
    return None if last is None else str(last[0])


def last_intact(work_dir: str | os.PathLike[str]) -> tuple[Path, dict[str, Any]] | None:
    """The file of :func:`find_last_checkpoint` and its content, which had to be read to know that it is intact."""
    reasons: list[str] = []
    for name in known_checkpoints(work_dir):
        path = Path(work_dir) / name
        try:
            return path, read_run_checkpoint(path)
        except (WeightsError, FileNotFoundError) as error:
            reason = f"{path} was not completed" if not path.exists() else str(error)
            print_log(f"{reason}; falling back to the checkpoint before", "current", level=30)
            reasons.append(reason)
    if any("was not completed" not in reason for reason in reasons):
        raise WeightsError(
            "no-intact-checkpoint",
            f"no intact checkpoint in {work_dir}: {'; '.join(reasons)}. Restore one from a backup and give its path to "
            "--resume, or start anew in another folder",
        )
    return None


def logged_lines(work_dir: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """What the runs in a work folder have logged, oldest first (mmengine's JSON lines); without ``lr``: of validations."""
    for file in sorted(Path(work_dir).glob("*/vis_data/scalars.json")):
        for line in file.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def checkpoint_file(path: str | os.PathLike[str]) -> Path:
    """Resolve a user's path: a work folder becomes its last checkpoint, other paths stay as they are.

    Raises:
        WeightsError: a work folder without an intact checkpoint.
    """
    found = Path(path).expanduser()
    last = find_last_checkpoint(found) if found.is_dir() else None
    return found if last is None else Path(last)


@contextmanager
def tell_system_errors(work_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Context in which what the system does to a run becomes one sentence: a full disk, no right to write, a killed reader.

    Raises:
        StoppedError: names file, reason and free space; or the reading process.
    """
    try:
        with tell_full_memory():
            yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        if not _worker_died(error):
            raise
        raise StoppedError(
            "reading-process-killed",
            f"a process that reads images was killed ({' '.join(str(error).split()) or type(error).__name__}), most often by "
            "the system when memory ran out. Complete checkpoints are untouched: continue with --resume, with fewer workers (0 "
            "= none extra), or a smaller batch_size",
        ) from error
    except OSError as error:
        if error.errno is None or isinstance(error, (FileNotFoundError, FileExistsError, ConnectionError)):
            raise
        folder = next(p for p in (Path(work_dir).absolute(), *Path(work_dir).absolute().parents) if p.exists())
        free = shutil.disk_usage(folder).free / 2**20
        raise StoppedError(
            "system-refuses",
            f"the system refuses {error.filename or f'to write in {work_dir}'}: {error.strerror or error}; {free:.0f} MB are "
            f"free on the disk of {folder}. Checkpoints that are complete are untouched: free some space, or allow writing "
            "there (or give another --work-dir), and continue with --resume",
        ) from error


@contextmanager
def tell_full_memory() -> Iterator[None]:
    """Context in which memory that does not suffice, of a GPU or of the machine, becomes one sentence with the ways out.

    Raises:
        StoppedError: says how much was asked for, as far as torch does.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and _NO_CPU_MEMORY not in str(error):
            raise
        said = " ".join(str(error).split()).partition(" If reserved but unallocated")[0]
        said = said.rpartition(f"{_NO_CPU_MEMORY}: ")[2][:400]
        raise StoppedError(
            "memory-full",
            f"memory does not suffice ({said or type(error).__name__}). Take a smaller batch_size "
            "(optim_wrapper.accumulative_counts=2 keeps the images of an update), activation_checkpointing=[...], --amp, or a "
            "smaller image_size; --dry-run says what a training needs. Complete checkpoints are untouched, --resume continues",
        ) from error


def _worker_died(error: BaseException) -> bool:
    """Whether a worker of a data loader died; how that shows depends on what it was doing."""
    if isinstance(error, RuntimeError):
        return re.search(r"DataLoader worker \(pid", str(error)) is not None
    place = error.__traceback__
    while place is not None:
        if place.tb_frame.f_globals.get("__name__") == "torch.utils.data.dataloader":
            return True
        place = place.tb_next
    return False
