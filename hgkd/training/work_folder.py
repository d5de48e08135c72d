"""The work folder of a training: one process writes into it at a time, and no new training overwrites what lies there.

``run.lock`` is locked with the system's own file locks (``fcntl.lockf``), which end with the process however it ends, so that a
lock that was left behind is known without any clock. The file says who holds it, for people. Reading processes do not inherit
such a lock.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from hgkd.errors import InvalidValueError, Refusal
from hgkd.weights.run_folder import known_checkpoints

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_NAME = "run.lock"
_RESULTS = ("epoch_*.pth", "iter_*.pth", "best_*.pth", "student.pth")
_KEEP_OUT = "keep other trainings out of it yourself"
_held: dict[str, IO[str]] = {}  # a second handle of the same file would, when closed by this process, end the lock of the first


class FolderInUseError(Refusal, ValueError):
    """Another training writes into the work folder."""


def results_in(work_dir: str | os.PathLike[str]) -> list[str]:
    """Names of the checkpoints and results of a training that lie in a work folder."""
    folder = Path(work_dir)
    found = {name for name in known_checkpoints(folder) if (folder / name).is_file()}
    return sorted(found.union(path.name for pattern in _RESULTS for path in folder.glob(pattern)))


def check_unused(work_dir: str | os.PathLike[str], resume: bool, load_from: str | None) -> None:
    """Refuse to begin a training where another one has left its results.

    Args:
        resume: the training goes on from a checkpoint, ``load_from`` or the folder's last.

    Raises:
        ValueError: names what lies there and the two ways out.
    """
    own = resume and (load_from is None or Path(load_from).parent.resolve() == Path(work_dir).resolve())
    found = [] if own else results_in(work_dir)
    if found:
        names = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
        begin = f"resumed from {load_from}, a training" if resume else "a new training"
        raise InvalidValueError(
            "work-folder-in-use",
            f"{work_dir} holds the results of a training ({names}), which {begin} would overwrite. Continue it with "
            "--resume, or give another folder with --work-dir (or delete this one)",
        )


def lock_folder(work_dir: str | os.PathLike[str]) -> str | None:
    """Hold a work folder until :func:`release_folder`, or until this process ends.

    Returns:
        A remark for the log, if there is one: a lock that was left behind, or that this file system knows no locks.

    Raises:
        FolderInUseError: a training holds it; process, machine and start are named.
    """
    path = os.path.realpath(os.path.join(work_dir, LOCK_NAME))
    if path in _held:
        return None
    if fcntl is None:
        return f"this system has no file locks that hgkd knows, so nothing guards {work_dir}: {_KEEP_OUT}"
    while True:
        handle = open(path, "a+", encoding="utf-8")  # noqa: SIM115  it stays open as long as the lock
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _read(handle)
            handle.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise FolderInUseError(
                    "work-folder-locked",
                    f"{work_dir} is in use by a training: {holder}. Wait for its end, or give another folder with --work-dir",
                ) from error
            return f"{work_dir} lies on a file system without locks ({error.strerror}): {_KEEP_OUT}"
        if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(handle.fileno())):
            break
        handle.close()  # its holder ended, and removed it, between the two calls
    _held[path] = handle
    try:
        left = _read(handle)
        handle.seek(0)
        handle.truncate()
        who = {"process": os.getpid(), "machine": socket.gethostname(), "start": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        handle.write(json.dumps(who) + "\n")
        handle.flush()
    except BaseException:  # a full disk
        release_folder(work_dir)
        raise
    return f"the lock of a training that ended without clearing up is taken over: {left}" if left else None


def release_folder(work_dir: str | os.PathLike[str]) -> None:
    """Let others use the folder; nothing happens when this process does not hold it."""
    path = os.path.realpath(os.path.join(work_dir, LOCK_NAME))
    handle = _held.pop(path, None)
    if handle is not None:
        Path(path).unlink(missing_ok=True)
        with suppress(OSError):  # what a full disk did not take was told then
            handle.close()


@contextmanager
def held_until_the_end(work_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Context at whose end, however it comes, a work folder that this process holds is released."""
    try:
        yield
    finally:
        release_folder(work_dir)


@contextmanager
def trial_folder() -> Iterator[str]:
    """Context with a work folder for a dry run, which vanishes with its lock."""
    with tempfile.TemporaryDirectory(prefix="hgkd-dry-run-") as folder, held_until_the_end(folder):
        yield folder


def _read(handle: IO[str]) -> str:
    """Who wrote a lock, in words; empty when nobody did."""
    handle.seek(0)
    text = handle.read().strip()
    try:
        found = json.loads(text)
        return f"process {found['process']} on {found['machine']}, started {found['start']}"
    except (ValueError, KeyError, TypeError):
        return text
