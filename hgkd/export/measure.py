"""Latency and peak memory of exported files, each by its own runtime on this CPU: columns of the report's table.

Latency is the median of many runs of one image, all files in turn, so that a busy machine slows all of them alike. Memory is
measured in a process of its own that has loaded the runtime and then reads the file and runs one image five times: the highest
resident memory on the way, less what was resident before the file was read (Linux; left out elsewhere).
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor

from hgkd.errors import InvalidValueError
from hgkd.export.job import Target
from hgkd.weights.signature import ImageInput

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def check_latency(target: Target, able: Sequence[str], side: int) -> None:
    """Refuse a measurement before anything is written.

    Args:
        able: targets that can be timed, for the message.

    Raises:
        ValueError: the target has no runner, or no such image is.
    """
    if target.runner is None:
        raise InvalidValueError(
            "latency-needs-graphs", f"latency times graphs ({', '.join(able)}), and {target.name} is none; leave it out"
        )
    if side < 1:
        raise InvalidValueError("latency-size", f"latency takes the side of an image in pixels, e.g. 224, got {side}")


def measured(
    target: Target, folder: Path, table: Sequence[dict[str, Any]], taken: ImageInput, side: int, repeats: int = 20
) -> list[dict[str, Any]]:
    """The rows of a table with the median time of one image on one and two threads in ms, and the peak memory in MB.

    Args:
        folder: where the files of the rows are.
        taken: what they take.
        side: of the image in pixels. What sizes a graph takes is known when it is written: where this is none, the log says so
            and the rows stay as they are, so that the export is not lost.
    """
    assert target.runner is not None
    try:
        taken.check_size(side, side)
    except ValueError as error:
        print_log(f"not timed: {error}. The export is complete without times", "current", logging.WARNING)
        return list(table)
    images = taken.prepare(torch.rand(1, taken.channels, side, side))
    runs = [[target.runner(folder / row["file"], threads=threads) for threads in (1, 2)] for row in table]
    times: list[list[list[float]]] = [[[], []] for _ in runs]
    for repeat in range(repeats + 3):
        for of_file, both in zip(times, runs, strict=True):
            for spent, run in zip(of_file, both, strict=True):
                run(images)  # whatever the other runs have put out of the caches, or of ExecuTorch's one pool of threads
                start = time.perf_counter()
                run(images)
                if repeat >= 3:  # the first runs allocate
                    spent.append(1000 * (time.perf_counter() - start))
    found = []
    for row, of_file in zip(table, times, strict=True):
        one, two = (statistics.median(spent) for spent in of_file)
        peak = peak_memory(target.runner, target.runtime, folder / row["file"], images)
        found.append({**row, "ms": one, "ms, 2 threads": two, **({} if peak is None else {"peak MB": peak})})
    return found


def peak_memory(runner: Callable[..., object], runtime: str, file: Path, images: Tensor) -> float | None:
    """Memory in MB that a file needs besides its runtime, in a process of its own; None where the system does not tell."""
    if not (_STATUS.exists() and _RESET.exists()):
        return None
    told = {
        "runner": [runner.__module__, runner.__qualname__],
        "runtime": runtime,
        "file": str(file),
        "shape": list(images.shape),
        "dtype": str(images.dtype).removeprefix("torch."),
    }
    done = subprocess.run(
        [sys.executable, "-c", "from hgkd.export.measure import child; child()"],
        input=json.dumps(told),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    return None if done.returncode else float(done.stdout.split()[-1])


def child() -> None:
    """Run a file and print its peak memory in MB; the body of :func:`peak_memory`'s process."""
    told = json.loads(sys.stdin.read())
    module, name = told["runner"]
    runner = getattr(importlib.import_module(module), name)
    if told["runtime"]:
        importlib.import_module(told["runtime"])
    images = torch.zeros(told["shape"], dtype=getattr(torch, told["dtype"]))
    before = _resident("VmRSS")
    _RESET.write_text("5")  # the peak so far was the imports'
    run = runner(Path(told["file"]), threads=1)
    for _ in range(5):
        run(images)
    sys.stdout.write(f"\n{max(0.0, _resident('VmHWM') - before)}\n")


def _resident(name: str) -> float:
    """An entry of the process's status in MB."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1e3
