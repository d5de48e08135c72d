"""One report of a machine: is the engine right there, and how fast; Markdown and JSON for docs/background/performance.md.

Parts, each within its share of a budget of seconds: correctness (values and gradients against fp64), kernels of ResNet-50's
convolutions, the encoder step, the whole distillation step, and reading. The engine's parts need torch and timm alone.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import hgkd
from hgkd.api.benchmark import DTYPES, benchmark_data, benchmark_distill, benchmark_sparse
from hgkd.cells import highest
from hgkd.differences import largest_difference
from hgkd.errors import InvalidValueError
from hgkd.sparse import CellLayout, sparsify
from hgkd.sparse.hardware import cpu_model
from hgkd.sparse.kernels import ConvGeometry, convolve
from hgkd.writing import write_text

FAMILIES = ("resnet18", "resnet50", "convnext_atto", "mobilenetv3_small_050", "regnetx_002", "repvgg_a0")
RECIPE = "hgkd/hgkd_vit-s14_resnet50_100e_image-folder"
# ResNet-50 at 224 px: channels in and out, side of the kernel, stride, side of a cell's input in positions
LAYERS = (
    *((3, 64, 7, 2, 32), (64, 64, 3, 1, 8), (128, 128, 3, 2, 8), (128, 128, 3, 1, 4)),
    *((256, 256, 3, 2, 4), (256, 256, 3, 1, 2), (512, 512, 3, 2, 2), (512, 512, 3, 1, 1)),
)
_MOST_ROUNDS = 9
_STEPS = 14  # dense steps' time that a table with one repeat takes, its look at the memory included
_EXACT = 1e-9  # of fp64 against fp64
_FACTOR = 10.0  # an error may be so many times that of torch's own dense kernels in the same precision
_FLOOR = 1e-6  # and what lies below this is rounding


@dataclass(frozen=True)
class Machine:
    """What is measured, and how large.

    Attributes:
        dtypes: precisions beside fp64, as the steps are taken in.
        batch: images of a step.
        families: students whose correctness is shown.
    """

    device: str
    dtypes: tuple[str, ...]
    batch: int
    families: tuple[str, ...] = FAMILIES
    student: str = "resnet50"
    image_size: int = 224
    recipe: str = RECIPE

    @classmethod
    def of(cls, device: str) -> Machine:
        """Sizes that fill the device and fit the budget."""
        if torch.device(device).type != "cuda":
            return cls(device, ("fp32",), 4)
        half = "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
        room = torch.cuda.get_device_properties(device).total_memory / 2**30
        return cls(device, ("fp32", half), 256 if room > 60 else 64)


def benchmark_report(
    out: str | os.PathLike[str], device: str = "cpu", budget: float = 420.0, machine: Machine | None = None
) -> dict[str, Any]:
    """Measure a machine, and write ``report.md`` and ``report.json`` into ``out``.

    Args:
        budget: seconds for all of it; a part for which none are left is left out, and said to be.
        machine: sizes other than :meth:`Machine.of` chooses.

    Returns:
        What the JSON holds: ``{"machine", "ok", "parts": {name: {"seconds", "rows" or "skipped"}}}``; ``ok``: every
        comparison held.

    Raises:
        ValueError: a budget that is not positive.
    """
    if not budget > 0:
        raise InvalidValueError("budget-not-positive", f"budget is a number of seconds above 0, got {budget}; leave it out")
    machine = machine or Machine.of(device)
    parts: dict[str, tuple[float, Callable[[Machine, float], list[dict[str, Any]]]]] = {
        "correctness": (0.25, correctness),
        "kernels": (0.2, kernels),
        "encoder step": (0.25, encoder_step_rows),
        "whole step": (0.2, whole_step),
        "loader": (0.1, loader),
    }
    end = time.perf_counter() + budget
    done: dict[str, Any] = {}
    for name, (share, part) in parts.items():
        start = time.perf_counter()
        seconds = min(share * budget, end - start)
        done[name] = {"skipped": "the budget was spent"} if seconds < 0.02 * budget else _tried(part, machine, seconds)
        done[name]["seconds"] = time.perf_counter() - start
    ok = all(row.get("ok", True) for part in done.values() for row in part.get("rows", ()))
    result = {"machine": facts(machine), "ok": ok, "parts": done}
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "report.json", json.dumps(result, indent=1) + "\n")
    write_text(folder / "report.md", page(result))
    return result


def _tried(part: Callable[[Machine, float], list[dict[str, Any]]], machine: Machine, seconds: float) -> dict[str, Any]:
    """The rows of a part, or why there are none; one that fails is no reason to lose the others."""
    try:
        return {"rows": part(machine, seconds)}
    except ModuleNotFoundError as error:
        return {"skipped": f"needs {error.name or error}, which is not installed"}
    except (RuntimeError, OSError, ValueError) as error:  # out of memory, a kernel that does not compile
        return {"rows": [{"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "ok": False}]}


def facts(machine: Machine) -> dict[str, Any]:
    """Versions, device, date and commit."""
    cuda = torch.device(machine.device).type == "cuda"
    found = {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(machine.device) if cuda else cpu_model(),
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "hgkd": hgkd.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }
    if cuda:
        found |= {
            "capability": ".".join(map(str, torch.cuda.get_device_capability(machine.device))),
            "cuda": torch.version.cuda,
        }
    return found


def _commit() -> str:
    """Commit of the checkout that is run; 'unknown' of an installed package."""
    root = Path(hgkd.__file__).parents[1]
    if not (root / ".git").exists():
        return "unknown"
    with contextlib.suppress(OSError):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    return "unknown"


# --- correctness -----------------------------------------------------------------------------------------------------------


def correctness(machine: Machine, seconds: float) -> list[dict[str, Any]]:
    """Largest differences of outputs and gradients against dense compute in fp64 with the hidden positions zeroed.

    In fp64 they must vanish; in other precisions they must not exceed ``_FACTOR`` times those of the dense kernels.
    """
    end = time.perf_counter() + seconds
    rows: list[dict[str, Any]] = []
    for name in machine.families:
        if time.perf_counter() > end:
            rows.append({"student": name, "left out": "out of time"})
            continue
        torch.manual_seed(0)
        network: Any = timm.create_model(name, num_classes=0, global_pool="").train()
        images, visible = torch.rand(4, 3, 64, 96), _uneven()
        expected = _step(network, images, visible, "masked", machine.device, torch.float64)
        for dtype in (torch.float64, *(DTYPES[text] for text in machine.dtypes)):
            found, dense = (_step(network, images, visible, kind, machine.device, dtype) for kind in ("gather", "masked"))
            errors, usual = (_errors(tensors, expected) for tensors in (found, dense))
            exact = dtype == torch.float64
            allowed = [_EXACT if exact else max(_FACTOR * error, _FLOOR) for error in usual]
            again = _step(network, images, visible, "gather", machine.device, dtype)
            rows.append(
                {
                    "student": name,
                    "precision": str(dtype).removeprefix("torch."),
                    "outputs": errors[0],
                    "gradients": errors[1],
                    "dense outputs": usual[0],
                    "dense gradients": usual[1],
                    "repeatable": all(torch.equal(found[key], again[key]) for key in found),
                    "ok": all(error <= most for error, most in zip(errors, allowed, strict=True)),
                }
            )
    return rows


def _uneven() -> Tensor:
    """Visible cells of four images of 2 x 3: one, two, four and all of them."""
    visible = torch.zeros(4, 2, 3, dtype=torch.bool)
    visible[0, 1, 2] = visible[1, 0, 0] = visible[1, 0, 1] = True
    visible[2, 0, 0] = visible[2, 1, 0] = visible[2, 0, 2] = visible[2, 1, 1] = True
    visible[3] = True
    return visible


def _step(
    network: nn.Module, images: Tensor, visible: Tensor, backend: str, device: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Outputs, and gradients of all parameters, of one step in training mode; half precisions by autocast."""
    plain = dtype in (torch.float64, torch.float32)
    sparse: Any = sparsify(network, 32, backend).to(device, dtype if plain else torch.float32)
    inputs = images.to(device, dtype if plain else torch.float32)
    with contextlib.nullcontext() if plain else torch.autocast(torch.device(device).type, dtype):
        out = sparse.forward_features(sparse.pack(inputs, visible.to(device))).to_dense().double()
    probe = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=device).sin().view_as(out)
    (out * probe).sum().backward()
    gradients = {name: p.grad for name, p in sparse.named_parameters() if p.grad is not None}
    return {"outputs": out.detach(), **{name: gradient.double() for name, gradient in gradients.items()}}


def _errors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, float]:
    """Of the outputs, and the largest of a gradient, which counts as at least a ten-thousandth of the largest of all."""
    largest = max(float(value.abs().max()) for name, value in expected.items() if name != "outputs")
    gradients = [
        largest_difference(found[name], value, least=1e-4 * largest) for name, value in expected.items() if name != "outputs"
    ]
    return largest_difference(found["outputs"], expected["outputs"]), max(gradients)


# --- kernels ---------------------------------------------------------------------------------------------------------------


def kernels(machine: Machine, seconds: float) -> list[dict[str, Any]]:
    """Forward and backward of the kernels for each convolution, by turns with torch's on the whole map; milliseconds."""
    dtype = DTYPES[machine.dtypes[-1]]
    end = time.perf_counter() + seconds
    rows: list[dict[str, Any]] = []
    for number, (c_in, c_out, side, stride, s) in enumerate(LAYERS):
        share = (end - time.perf_counter()) / (len(LAYERS) - number)
        if share <= 0:
            rows.append({"layer": f"{c_in}-{c_out}", "left out": "out of time"})
            continue
        torch.manual_seed(number)
        layout = CellLayout(highest(torch.rand(machine.batch, 7, 7, device=machine.device), 12), 32)
        geometry = ConvGeometry(s, (side, side), (stride, stride), (side // 2, side // 2), (1, 1))
        weight = torch.randn(c_out, c_in, side, side) / (c_in * side * side) ** 0.5
        packed = torch.randn(layout.num_cells, c_in, s, s)
        whole = torch.randn(machine.batch, c_in, 7 * s, 7 * s)
        weight, packed, whole = (
            t.to(machine.device, dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
            for t in (weight, packed, whole)
        )

        def both(run: Callable[[], Tensor], of: Tensor, weight: Tensor = weight) -> Callable[[], None]:
            def step() -> None:
                out = run()
                torch.autograd.grad(out, (of, weight), torch.ones_like(out))

            return step

        def sparse(
            kernel: str, packed: Tensor = packed, weight: Tensor = weight, geometry: Any = geometry, layout: Any = layout
        ) -> Callable[[], Tensor]:
            return lambda: convolve(packed, weight, None, 1, geometry, layout, kernel)

        def dense(
            whole: Tensor = whole, weight: Tensor = weight, stride: int = stride, pad: int = side // 2
        ) -> Callable[[], Tensor]:
            return lambda: nn.functional.conv2d(whole, weight, None, stride, pad)

        names = ("im2col", "halo", "map") if c_in > 3 else ("halo", "map")
        steps = {"dense": both(dense(), whole)} | {name: both(sparse(name), packed) for name in names}
        times = _turns(steps, machine.device, share)
        row: dict[str, Any] = {"layer": f"{side}x{side}/{stride} {c_in}-{c_out}, {7 * s} px"}
        row |= {f"{name} ms": 1e3 * times[name] for name in steps}
        rows.append(row | {"fastest": min(times, key=lambda name: times[name])})
    return rows


def _turns(steps: Mapping[str, Callable[[], None]], device: str, seconds: float) -> dict[str, float]:
    """Median seconds of steps that take turns until the time is spent, once at least."""
    cuda = torch.device(device).type == "cuda"
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    for number in range(_MOST_ROUNDS + 1):
        for name, step in steps.items():
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            step()
            if cuda:
                torch.cuda.synchronize()
            if number:  # the first round warms up
                times[name].append(time.perf_counter() - start)
        if number and time.perf_counter() > end:
            break
    return {name: statistics.median(values) for name, values in times.items()}


# --- steps and reading -----------------------------------------------------------------------------------------------------


def fitting_batch(machine: Machine, seconds: float) -> int:
    """Images of a step, so that a table of steps fits its time, as one dense step of two images tells; two at least."""
    network: Any = timm.create_model(machine.student, num_classes=0, global_pool="").to(machine.device).train()
    images = torch.rand(2, 3, machine.image_size, machine.image_size, device=machine.device)

    def dense() -> None:
        network.forward_features(images).square().mean().backward()

    each = _turns({"dense": dense}, machine.device, 0)["dense"] / len(images)
    return max(2, min(machine.batch, int(seconds / (_STEPS * each))))


def _within(measure: Callable[[int], dict[str, Any]], seconds: float) -> dict[str, Any]:
    """A measurement with as many repeats as its time allows, by what one repeat has taken."""
    start = time.perf_counter()
    first = measure(1)
    spent = time.perf_counter() - start
    repeats = min(_MOST_ROUNDS, int((seconds - spent) / spent * 3) - 2)  # one repeat: warm-up, step and memory
    return measure(repeats) if repeats > 1 else first


def _step_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of a benchmark's table, with the times of the others over each."""
    rows = []
    for row in result["results"]:
        over = {f"over {name}": ratio for name, ratio in row["speedup_over"].items()}
        kept: dict[str, Any] = {"batch": result["settings"]["batch_size"]}
        kept |= {"step ms": row["step_ms"], "images/s": row["images_per_s"], "peak MB": row["peak_mb"]}
        rows.append({"step": row["backend"], "precision": result["settings"]["dtype"], **kept, **over})
    return rows


def encoder_step_rows(machine: Machine, seconds: float) -> list[dict[str, Any]]:
    """Forward and backward of the encoder, three quarters of its cells hidden: engine, masked-dense, dense."""
    rows = []
    seconds /= len(machine.dtypes)
    batch = fitting_batch(machine, seconds)
    for dtype in machine.dtypes:

        def measure(repeats: int, dtype: str = dtype) -> dict[str, Any]:
            return benchmark_sparse(
                machine.student,
                machine.image_size,
                batch_size=batch,
                device=machine.device,
                dtype=dtype,
                repeats=repeats,
            )

        rows += _step_rows(_within(measure, seconds))
    return rows


def whole_step(machine: Machine, seconds: float) -> list[dict[str, Any]]:
    """Forward and backward of a distillation with its teacher (random weights); 'dense' is the encoder alone."""
    importlib.import_module("mmengine")
    batch = fitting_batch(machine, seconds)
    options = {
        "student": machine.student,
        "image_size": machine.image_size,
        "mask_ratio": 0.755,
        "data_root": ".",
        "teacher_checkpoint": None,
        "model.teacher.allow_random": True,
    }

    def measure(repeats: int) -> dict[str, Any]:
        return benchmark_distill(
            machine.recipe,
            options,
            batch_size=batch,
            device=machine.device,
            dtype=machine.dtypes[-1],
            backends=("gather", "dense"),
            repeats=repeats,
        )

    return _step_rows(_within(measure, seconds))


def loader(machine: Machine, seconds: float) -> list[dict[str, Any]]:
    """Images a second from JPEG files of 500 x 375 px: decoding, the data set, and a loader with all cores."""
    importlib.import_module("mmengine")
    workers = min(os.cpu_count() or 1, 16)
    with tempfile.TemporaryDirectory(prefix="hgkd-report-") as folder:
        rng = np.random.default_rng(0)
        for number in range(16 * workers):
            rough = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).resize(
                (500, 375), Image.Resampling.BICUBIC
            )
            fine = np.asarray(rough).astype(float) + rng.normal(0, 12, (375, 500, 3))
            Image.fromarray(fine.clip(0, 255).astype(np.uint8)).save(f"{folder}/{number}.jpg", quality=87)

        def measure(repeats: int) -> dict[str, Any]:
            return benchmark_data(
                folder, machine.image_size, images=16 * workers, workers=workers, batch_size=16, repeats=repeats
            )

        result = _within(measure, seconds)
    size = f"{result['settings']['mean_kb']:.0f} kB a file"
    return [{"what": row["what"], "images/s": row["images_per_s"], "of decoding": row["of_decoding"], "files": size}
            for row in result["results"]]  # fmt: skip


# --- the page --------------------------------------------------------------------------------------------------------------


def page(result: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    machine = cast(Mapping[str, Any], result["machine"])
    lines = [f"## {machine['device']}, {machine['date']}", ""]
    lines += [", ".join(f"{key} {value}" for key, value in machine.items() if key not in ("device", "date")) + ".", ""]
    lines += [
        "Every comparison with fp64 held." if result["ok"] else "**A comparison did not hold: see the rows without ok.**",
        "",
    ]
    for name, part in result["parts"].items():
        lines += [f"### {name.capitalize()}", ""]
        if "skipped" in part:
            lines += [f"Left out: {part['skipped']}.", ""]
            continue
        lines += [*table(part["rows"]), "", f"({part['seconds']:.0f} s)", ""]
    return "\n".join(lines)


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows as a Markdown table, with the columns of all of them."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    texts = [[_text(row[key]) if key in row else "" for key in columns] for row in rows]
    return [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *texts)]


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "\\|")
