"""Step time and memory of the sparse engine, and the rate of reading images, as ratios in one process.

The engine is measured without mmengine: what needs it is imported where it is used.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from hgkd.cells import grid_of, highest, visible_count
from hgkd.errors import InvalidValueError, unknown_name_message
from hgkd.sparse import CellLayout, sparsify
from hgkd.sparse.convert import SparseModule

if TYPE_CHECKING:
    from hgkd.data import UnlabelledImages
    from hgkd.distillers import MaskedDistiller

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Step = Callable[[], None]
_Result = TypeVar("_Result")


class _LiveMemory(TorchDispatchMode):
    """Peak bytes of storages made inside the context and still alive (works on the CPU, where torch counts nothing).

    Not counted: what existed before, views of it included (a weight's ``view`` is no new memory), and what a library
    allocates without torch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> object:
        with torch._C.DisableTorchFunctionSubclass():
            self._watch((args, kwargs or {}), new=False)
            out = func(*args, **(kwargs or {}))
            self._watch(out, new=True)
        return out

    def _watch(self, values: object, new: bool) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                self._watch_storage(tensor.untyped_storage(), new)

    def _watch_storage(self, storage: torch.UntypedStorage, new: bool) -> None:
        key, size = storage._cdata, storage.nbytes() if new else 0
        if key in self._seen:
            return
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def gone() -> None:
            self._seen.discard(key)
            self.live -= size

        weakref.finalize(storage, gone)


class _IndexClock:
    """Seconds that layouts spend in building indices inside the context: their construction, and what they keep."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self.seconds = 0.0
        self._depth = 0

    def _timed(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def outer(*args: object, **kwargs: object) -> object:
            self._depth += 1  # one index may be built from another
            start = self._now()
            try:
                return inner(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += self._now() - start

        return outer

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        methods = {name: getattr(CellLayout, name) for name in ("__init__", "keep")}
        try:
            for name, method in methods.items():
                setattr(CellLayout, name, self._timed(method))
            yield
        finally:
            for name, method in methods.items():
                setattr(CellLayout, name, method)


def measure(
    steps: Mapping[str, Step], batch_size: int, device: str = "cpu", repeats: int = 7, clock: str = "wall"
) -> list[dict[str, Any]]:
    """Run steps in turn; one row a step: name, step_ms, images_per_s, peak_mb, index_share, speedup_over the others."""
    times, building = measure_times(steps, device, repeats, clock)
    median = {name: statistics.median(times[name]) for name in steps}
    return [
        {
            "backend": name,
            "step_ms": 1e3 * median[name],
            "images_per_s": batch_size / median[name],
            "peak_mb": _peak_mb(step, torch.device(device).type == "cuda"),
            "index_share": statistics.median(building[name]) / median[name],
            "speedup_over": {other: median[other] / median[name] for other in steps if other != name},
        }
        for name, step in steps.items()
    ]


def measure_times(
    steps: Mapping[str, Step], device: str = "cpu", repeats: int = 7, clock: str = "wall"
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Run steps in turn, once to warm up and then ``repeats`` times: seconds of each step, and of its index building."""
    now = CLOCKS[clock]
    cuda = torch.device(device).type == "cuda"
    torch.backends.cudnn.benchmark = cuda  # as in a training: the dense network would be tuned less
    times: dict[str, list[float]] = {name: [] for name in steps}
    building: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            indices = _IndexClock(now)
            if cuda:
                torch.cuda.synchronize()
            start = now()
            with indices.running():
                step()
            if cuda:
                torch.cuda.synchronize()
            if repeat:  # the first round warms up
                times[name].append(now() - start)
                building[name].append(indices.seconds)
    return times, building


def _peak_mb(step: Step, cuda: bool) -> float:
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with _LiveMemory() as memory:
        step()
    return memory.peak / 2**20


def _train_step(network: nn.Module, loss: Callable[[], Tensor], device: str, dtype: str) -> Step:
    """Forward and backward; the gradients are dropped."""

    def step() -> None:
        kind = torch.device(device).type
        with torch.autocast(kind, DTYPES[dtype]) if dtype != "fp32" else contextlib.nullcontext():
            value = loss()
        value.backward()
        for parameter in network.parameters():
            parameter.grad = None

    return step


def encoder_step(
    network: nn.Module, images: Tensor, visible: Callable[[], Tensor | CellLayout] | None, device: str, dtype: str
) -> Step:
    """A training step of an encoder: forward, the mean square of its last level as the loss, backward.

    Args:
        images: (B, 3, H, W).
        visible: gives a step's mask, bool (B, h, w), or its layout; the network is sparse then. None: a dense network sees
            whole images.
        device: 'cpu' or 'cuda'.
        dtype: 'fp32' or 'bf16', the precision of the forward.
    """
    features = cast(Callable[[Tensor], Any], network.forward_features)

    def loss() -> Tensor:
        if visible is None:
            return features(images).float().square().mean()
        return features(cast(SparseModule, network).pack(images, visible())).plain.float().square().mean()

    return _train_step(network, loss, device, dtype)


def _encoder_steps(
    model: nn.Module,
    images: Tensor,
    keep: int,
    cell: int,
    backends: Sequence[str],
    device: str = "cpu",
    dtype: str = "fp32",
    mask: str = "random",
) -> dict[str, Step]:
    """Backend, 'dense' among them -> the step of an encoder that sees ``keep`` cells of each image, others in each step."""
    batch, grid = len(images), (images.shape[-2] // cell, images.shape[-1] // cell)
    sides = _rectangle(grid, keep) if mask == "rectangle" else None

    def draw() -> Tensor | CellLayout:
        if sides is None:
            return highest(torch.rand(batch, *grid, device=device), keep)
        visible = torch.zeros(batch, *grid, dtype=torch.bool, device=device)
        for image in visible:
            top, left = (int(torch.randint(whole - side + 1, ())) for whole, side in zip(grid, sides, strict=True))
            image[top : top + sides[0], left : left + sides[1]] = True
        return CellLayout(visible, cell, rectangle=sides)  # as in a training: a GPU does not look at the mask itself

    return {
        backend: encoder_step(model, images, None, device, dtype)
        if backend == "dense"
        else encoder_step(sparsify(model, cell, backend), images, draw, device, dtype)
        for backend in backends
    }


def _rectangle(grid: tuple[int, int], area: int) -> tuple[int, int]:
    """(rows, columns) of the most square rectangle of an area on a grid."""
    fits = [(rows, area // rows) for rows in range(1, grid[0] + 1) if area % rows == 0 and area // rows <= grid[1]]
    if not fits:
        raise InvalidValueError(
            "no-such-rectangle", f"no rectangle on a {grid[0]} x {grid[1]} grid shows {area} cells; use another --mask-ratio"
        )
    return min(fits, key=lambda sides: abs(sides[0] - sides[1]))


def sparse_speedup(
    model: nn.Module,
    image_size: int,
    cell: int = 32,
    *,
    batch_size: int = 4,
    mask_ratio: float = 0.75,
    repeats: int = 3,
    clock: str = "wall",
) -> float:
    """Step (forward and backward, fp32, CPU) of an encoder's ordinary dense network over that of its sparse form.

    Args:
        model: with ``forward_features``; it is put into training mode and channels_last.
        image_size: side in pixels, a multiple of ``cell``.

    Raises:
        ValueError: the cells do not divide the images.
        NoSparseRuleError: a layer cannot be masked.
    """
    grid = grid_of((image_size, image_size), cell)
    model.to(memory_format=torch.channels_last).train()
    images = torch.randn(batch_size, 3, image_size, image_size).contiguous(memory_format=torch.channels_last)
    steps = _encoder_steps(model, images, visible_count(*grid, mask_ratio), cell, ("gather", "dense"))
    times, _ = measure_times(steps, repeats=repeats, clock=clock)
    return statistics.median(times["dense"]) / statistics.median(times["gather"])


def in_own_process(function: Callable[..., _Result], *args: object, **kwargs: object) -> _Result | None:
    """``function(...)`` in a fresh process, which must be able to import it; None when that process crashed.

    Some ordinary dense networks kill torch on the CPU in channels_last: a strided 1x1 convolution of fewer than 16 channels
    writes past its workspace in the backward (uxlfoundation/oneDNN, issue 6035), and RepVGG's stem has one.
    """
    # not forked from this one, whose threads would be missing in the copy
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__, function.__module__])
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(function, *args, **kwargs).result()
        except BrokenProcessPool:
            return None


def benchmark_sparse(
    student: str = "resnet50",
    image_size: int = 224,
    mask_ratio: float = 0.755,
    cell: int = 32,
    batch_size: int = 8,
    backends: Sequence[str] = ("gather", "masked", "dense"),
    device: str = "cpu",
    dtype: str = "fp32",
    repeats: int = 7,
    clock: str = "wall",
    mask: str = "random",
) -> dict[str, Any]:
    """Measure an encoder; returns ``{"limit", "settings", "results": [{"backend", "step_ms", ...}]}``.

    Args:
        mask: 'random' cells, or one 'rectangle' an image of as many cells.

    Raises:
        ValueError: an unknown student, or no rectangle of so many cells.
    """
    if not timm.is_model(student):
        raise InvalidValueError("student-unknown", unknown_name_message("student", student, timm.list_models()))
    grid = grid_of((image_size, image_size), cell)
    torch.manual_seed(0)
    model: Any = timm.create_model(student, num_classes=0, global_pool="")
    model.to(device, memory_format=torch.channels_last).train()
    images = torch.randn(batch_size, 3, image_size, image_size, device=device).contiguous(memory_format=torch.channels_last)
    keep = visible_count(*grid, mask_ratio)
    steps = _encoder_steps(model, images, keep, cell, backends, device, dtype, mask)
    settings: dict[str, Any] = {"student": student, "image_size": image_size, "cell": cell, "mask": mask}
    settings["visible_cells"] = [keep, grid[0] * grid[1]]
    results = measure(steps, batch_size, device, repeats, clock)
    return {
        "limit": grid[0] * grid[1] / keep,
        "settings": settings | _run(batch_size, device, dtype, repeats, clock),
        "results": results,
    }


def benchmark_distill(
    config: str | Path,
    options: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    backends: Sequence[str] = ("gather", "masked", "dense"),
    device: str = "cpu",
    dtype: str = "fp32",
    repeats: int = 7,
    clock: str = "wall",
    variants: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Measure the whole model of a config on random images.

    Args:
        config: file of a ``MaskedDistiller`` recipe.
        options: overrides as in ``hgkd train``.
        variants: name of a row -> further overrides. Each is measured with the first backend, in the same process and in turn
            with the others, so the table says what an option costs.

    Returns:
        As :func:`benchmark_sparse`; the row 'dense' is the encoder alone, in channels_last. Teacher features are computed, not
        read from a cache; the optimiser's update is left out. Images a second count images, however many views each has.

    Raises:
        ValueError: the recipe is of another kind, or a variant has the name of a backend.
    """
    from hgkd.api.train import load_config
    from hgkd.registry import MODELS

    cfg = load_config(config, options=options)
    taken = set(variants or {}) & set(backends)
    if taken:
        raise InvalidValueError("variant-named-as-backend", f"variant {min(taken)!r} has the name of a backend; choose another")
    if cfg.model.get("type") != "MaskedDistiller":
        raise InvalidValueError(
            "recipe-not-measured",
            f"benchmark distill measures recipes of a MaskedDistiller, {config} builds a {cfg.model.get('type')!r}",
        )

    def built(recipe: Mapping[str, Any], **student: str) -> tuple[Any, Tensor]:
        """The model of a recipe, and a batch of its images."""
        torch.manual_seed(0)
        model = MODELS.build({"_scope_": "hgkd", **recipe, "student": {**recipe["student"], **student}}).to(device).train()
        shape = (batch_size, model.student.in_chans, *model.image_size)
        return model, torch.randint(0, 256, shape, dtype=torch.uint8, device=device)

    steps = {}
    for backend in backends:
        if backend == "dense":
            model, pixels = built(cfg.model)
            images = (pixels.float() / 255).contiguous(memory_format=torch.channels_last)
            encoder = model.student.encoder.to(memory_format=torch.channels_last)
            steps[backend] = encoder_step(encoder, images, None, device, dtype)
        else:
            model, pixels = built(cfg.model, backend=backend)
            steps[backend] = _train_step(model, _distill_loss(model, pixels), device, dtype)
    sparse = next((backend for backend in backends if backend != "dense"), "gather")
    for name, further in (variants or {}).items():
        variant, pixels = built(load_config(config, options={**(options or {}), **further}).model, backend=sparse)
        steps[name] = _train_step(variant, _distill_loss(variant, pixels), device, dtype)
    h, w = model.mask_grid
    keep = int(model.mask(1, (h, w), device=torch.device(device)).sum())
    settings = {
        "student": f"{cfg.model.student.get('encoder')} of {Path(config).stem}",
        "image_size": model.image_size[0],
        "cell": model.student.cell,
        "visible_cells": [keep, h * w],
    }
    results = measure(steps, batch_size, device, repeats, clock)
    return {"limit": h * w / keep, "settings": settings | _run(batch_size, device, dtype, repeats, clock), "results": results}


def benchmark_data(
    data_root: str | Path,
    image_size: int = 224,
    images: int = 256,
    workers: int = 2,
    batch_size: int = 32,
    repeats: int = 5,
) -> dict[str, Any]:
    """Measure reading; returns ``{"settings", "results": [{"what", "images_per_s", "of_decoding"}]}``.

    Each round does all of it one after the other, so that a busy machine slows all alike; rates are medians over the rounds.
    All but the loader is done by one process, so these are rates of a core. Shards and Parquet are written of the same images,
    where the library that writes them is installed.
    """
    if workers < 1 or images < 1 or batch_size < 1 or repeats < 1:
        raise InvalidValueError(
            "count-not-positive",
            f"workers, images, batch_size and repeats must be 1 or more, got {workers}, {images}, {batch_size}, {repeats}",
        )
    from hgkd.data import EpochSampler, SeededIndex, UnlabelledImages
    from hgkd.data.sampler import in_arrays

    dataset = UnlabelledImages(data_root, image_size=image_size, max_bad_share=0.0, limit=images)
    count = len(dataset)
    order = EpochSampler(dataset, seed=0)
    loader = in_arrays(DataLoader(dataset, batch_size, sampler=order, num_workers=workers, persistent_workers=True))

    def all_of(read: Callable[[int], Any]) -> Step:
        def step() -> None:
            for index in range(count):
                read(index)

        return step

    def load() -> None:
        for _ in loader:
            pass

    def shown_of(images: UnlabelledImages) -> Step:
        return all_of(lambda index: images[SeededIndex(index, 0)])

    scaled = UnlabelledImages(data_root, image_size=image_size, max_bad_share=0.0, limit=images, scaled_decoding=True)
    with tempfile.TemporaryDirectory(prefix="hgkd-benchmark-") as folder:
        packed = _packed_again(dataset, Path(folder), image_size)
        steps = {
            "decoding": all_of(dataset.image),
            "decoding, scaled": all_of(scaled.image),
            "data set": shown_of(dataset),
            "data set, scaled decoding": shown_of(scaled),
            **{f"data set, {what}": shown_of(part) for what, part in packed.items()},
            f"loader, {workers} processes": load,
        }
        times, _ = measure_times(steps, repeats=repeats)
    rates = {name: count / statistics.median(times[name]) for name in steps}
    return {
        "settings": {
            "data_root": str(data_root),
            "images": count,
            "mean_kb": sum(_bytes_of(dataset, index) for index in range(count)) / count / 1e3,
            "image_size": image_size,
            "batch_size": batch_size,
            "workers": workers,
            "cpus": os.cpu_count(),
            "repeats": repeats,
        },
        "results": [
            {"what": name, "images_per_s": rate, "of_decoding": rate / rates["decoding"]} for name, rate in rates.items()
        ],
    }


_STORED = 256
"""Shorter side of the images that the benchmark stores in shards, as ``make-shards --size``."""


def _bytes_of(dataset: UnlabelledImages, index: int) -> int:
    with dataset.open(index) as file:
        return len(file.read())


def _packed_again(dataset: UnlabelledImages, folder: Path, image_size: int) -> dict[str, UnlabelledImages]:
    """The images in other forms, as far as what writes them is installed."""
    from hgkd.api.make_shards import pack_images
    from hgkd.data import UnlabelledImages

    made = {}
    if importlib.util.find_spec("webdataset") is not None:
        pack_images(dataset, folder / "shards", size=_STORED)
        made[f"shards of {_STORED} px"] = folder / "shards"
    if importlib.util.find_spec("pyarrow") is not None:
        from pyarrow import parquet, table

        contents = [dataset.open(index).read() for index in range(len(dataset))]
        (folder / "parquet").mkdir()
        parquet.write_table(table({"image": contents}), folder / "parquet/images.parquet", row_group_size=100)
        made["Parquet"] = folder / "parquet"
    return {what: UnlabelledImages(place, image_size=image_size, max_bad_share=0.0) for what, place in made.items()}


def _distill_loss(model: MaskedDistiller, pixels: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.stack(list(model(pixels, mode="loss").values())).sum()


def _run(batch_size: int, device: str, dtype: str, repeats: int, clock: str) -> dict[str, Any]:
    return {
        "batch_size": batch_size,
        "device": device if torch.device(device).type == "cpu" else torch.cuda.get_device_name(device),
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "clock": clock,
        "torch": torch.__version__,
    }
