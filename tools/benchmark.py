"""Step time and memory of the sparse engine, as ratios measured in one process.

    python tools/benchmark.py sparse --student resnet50 --image-size 224 --mask-ratio 0.755 --batch-size 8 \
        --backends gather masked dense [--device cuda --dtype bf16] [--json OUT]

A step is forward and backward of the encoder. The backends take turns, so that a busy machine slows all of them alike; the
median over the repeats is printed. Peak memory is that of live tensors during one step beyond what was there before it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hgkd.errors import unknown_name_message
from hgkd.masking import RandomMask, grid_of, visible_count
from hgkd.sparse import BACKENDS, CellLayout, sparsify

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    sparse = commands.add_parser("sparse", help="encoder step of the sparse backends and of the dense network")
    sparse.add_argument("--student", default="resnet50", help="timm name")
    sparse.add_argument("--image-size", type=int, default=224)
    sparse.add_argument("--mask-ratio", type=float, default=0.755, help="share of hidden cells (0.755: 12 of 49 visible)")
    sparse.add_argument("--cell", type=int, default=32, help="side of a mask cell, pixels")
    sparse.add_argument("--batch-size", type=int, default=8)
    sparse.add_argument("--backends", nargs="+", default=["gather", "masked", "dense"], choices=[*BACKENDS, "dense"])
    sparse.add_argument("--device", default="cpu")
    sparse.add_argument("--dtype", default="fp32", choices=list(DTYPES))
    sparse.add_argument("--repeats", type=int, default=7)
    sparse.add_argument("--json", type=Path, help="write the result here")
    return parser.parse_args(argv)


class _LiveMemory(TorchDispatchMode):
    """Peak bytes of storages made inside the context and still alive (works on the CPU, where torch counts nothing)."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                self._watch(tensor.untyped_storage())
        return out

    def _watch(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def gone() -> None:
            self._seen.discard(key)
            self.live -= size

        weakref.finalize(storage, gone)


def make_steps(
    student: str, image_size: int, cell: int, mask_ratio: float, batch_size: int, backends: list[str], device: str, dtype: str
) -> dict[str, Callable[[], float]]:
    """For each backend a function that does one step and returns the seconds spent in building indices."""
    if student not in timm.list_models():
        raise ValueError(unknown_name_message("student", student, timm.list_models()))
    grid = grid_of((image_size, image_size), cell)
    torch.manual_seed(0)
    model = timm.create_model(student, num_classes=0, global_pool="").to(device, memory_format=torch.channels_last).train()
    images = torch.randn(batch_size, 3, image_size, image_size, device=device).contiguous(memory_format=torch.channels_last)
    mask = RandomMask(mask_ratio)
    autocast = torch.autocast(torch.device(device).type, DTYPES[dtype]) if dtype != "fp32" else contextlib.nullcontext()

    def step(network: torch.nn.Module, sparse: bool) -> float:
        building = 0.0
        with autocast:
            if sparse:
                visible = mask(batch_size, grid, device=device)
                start = time.perf_counter()
                layout = CellLayout(visible, cell)
                building = time.perf_counter() - start
                inner = layout.neighbours

                def timed(*args: Any, **kwargs: Any) -> Tensor:
                    nonlocal building
                    begun = time.perf_counter()
                    found = inner(*args, **kwargs)
                    building += time.perf_counter() - begun
                    return found

                layout.neighbours = timed  # type: ignore[method-assign]
                out = network.forward_features(network.pack(images, layout)).plain  # type: ignore[operator, union-attr]
            else:
                out = network.forward_features(images)  # type: ignore[operator]
            loss = out.float().square().mean()
        loss.backward()
        for parameter in network.parameters():
            parameter.grad = None
        return building

    steps: dict[str, Callable[[], float]] = {}
    for backend in backends:
        network = model if backend == "dense" else sparsify(model, cell, backend)
        steps[backend] = lambda network=network, backend=backend: step(network, backend != "dense")  # type: ignore[misc]
    return steps


def _peak_mb(step: Callable[[], float], device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with _LiveMemory() as memory:
        step()
    return memory.peak / 2**20


def benchmark_sparse(
    student: str = "resnet50",
    image_size: int = 224,
    mask_ratio: float = 0.755,
    cell: int = 32,
    batch_size: int = 8,
    backends: tuple[str, ...] | list[str] = ("gather", "masked", "dense"),
    device: str = "cpu",
    dtype: str = "fp32",
    repeats: int = 7,
) -> dict[str, Any]:
    """Measure; returns ``{"limit", "settings", "results": [{"backend", "step_ms", ...}]}``."""
    backends = list(backends)
    steps = make_steps(student, image_size, cell, mask_ratio, batch_size, backends, device, dtype)
    synchronise = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    times: dict[str, list[float]] = {b: [] for b in backends}
    building: dict[str, list[float]] = {b: [] for b in backends}
    for repeat in range(repeats + 1):
        for backend in backends:
            synchronise()
            start = time.perf_counter()
            spent = steps[backend]()
            synchronise()
            if repeat:  # the first round warms up
                times[backend].append(time.perf_counter() - start)
                building[backend].append(spent)
    h, w = grid_of((image_size, image_size), cell)
    keep = visible_count(h, w, mask_ratio)
    median = {b: statistics.median(times[b]) for b in backends}
    results = []
    for backend in backends:
        results.append(
            {
                "backend": backend,
                "step_ms": 1e3 * median[backend],
                "images_per_s": batch_size / median[backend],
                "peak_mb": _peak_mb(steps[backend], device),
                "index_share": statistics.median(building[backend]) / median[backend],
                "speedup_over": {b: median[b] / median[backend] for b in backends if b != backend},
            }
        )
    settings = {
        "student": student,
        "image_size": image_size,
        "cell": cell,
        "visible_cells": [keep, h * w],
        "batch_size": batch_size,
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "torch": torch.__version__,
    }
    return {"limit": h * w / keep, "settings": settings, "results": results}


def print_table(result: dict[str, Any]) -> None:
    """The result as a table."""
    settings = result["settings"]
    keep, total = settings["visible_cells"]
    table = Table(
        title=f"{settings['student']} {settings['image_size']} px, {keep}/{total} visible (FLOP limit {result['limit']:.2f}x), "
        f"batch {settings['batch_size']}, {settings['dtype']}, {settings['device']}"
    )
    others = [r["backend"] for r in result["results"]]
    for column in ["backend", "step ms", "images/s", "peak MB", "index %", *[f"over {b}" for b in others]]:
        table.add_column(column, justify="right")
    for row in result["results"]:
        ratios = [f"{row['speedup_over'][b]:.2f}x" if b in row["speedup_over"] else "" for b in others]
        numbers = [f"{row['step_ms']:.0f}", f"{row['images_per_s']:.1f}", f"{row['peak_mb']:.0f}"]
        table.add_row(row["backend"], *numbers, f"{100 * row['index_share']:.1f}", *ratios)
    Console().print(table)


def main(argv: list[str] | None = None) -> int:
    args = vars(parse_args(argv))
    args.pop("command")
    out = args.pop("json")
    try:
        result = benchmark_sparse(**args)
    except (ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_table(result)
    if out is not None:
        out.write_text(json.dumps(result, indent=1))
        print(f"written to {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
