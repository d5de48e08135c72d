"""Measures, at the first training step of a network on a device, what computes it fastest: each layer's kernel, then the whole.

Every candidate computes the same to rounding. The candidates of a layer run forward and backward on random values of the real
layout; then the step of the whole network runs sparse (with the layers' kernels), masked-dense and ordinary dense. Of the
training nothing changes: gradients, running statistics and random numbers are what they were. In a distributed run one process
measures for all, since other kernels round otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from hgkd.sparse import choice, kernels
from hgkd.sparse.choice import Choice, fastest_backend, fastest_kernel
from hgkd.sparse.hardware import is_capturing
from hgkd.sparse.layout import CellLayout
from hgkd.sparse.masked import MaskedTensor
from hgkd.sparse.packed import PackedTensor
from hgkd.sparse.tensor import SparseTensor

BUDGET_S = 5.0  # for layers, and as much for whole steps; a run that has begun is ended
_RUNS = 3
_FAR = 3.0  # times the fastest
_IMAGES_ON_CPU = 4  # time is proportional to images there; a GPU may be idle with so few

now: Callable[[], float] = time.perf_counter
spent_by_processor: Callable[[], float] = time.process_time


def choice_for(network: nn.Module, images: Tensor, cells: CellLayout, gathers: bool = True) -> Choice:
    """How a network is to be computed: as measured before in this process, as kept on disk, or as measured now.

    Only a training step measures; everything else takes what one has found, or the rules.

    Args:
        network: with the backend 'gather'.
        gathers: this batch is computed by gathering. False: its mask needs none, so that there is nothing to measure; but other
            processes' masks may need it, and wait for this one.
    """
    known: dict[str, Choice] = network.__dict__.setdefault("sparse_choices", {})
    spread = torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    if spread and known:  # decided once, where all processes are: their first step
        return next(iter(known.values()))
    if not spread and not gathers:
        return Choice()
    key = _key_of(network, images, cells)
    if key not in known:
        if not _trains(network) or is_capturing(images.device):
            return Choice()
        if spread and any(hasattr(layer, "process_group") for layer in network.modules()):
            known[key] = Choice(why="by rule: one process cannot measure norms that need all")
            return known[key]
        known[key] = Choice()  # for the steps that are measured
        known[key] = _same_for_all(network, images, cells, key, gathers) if spread else _found(network, images, cells, key)
    return known[key]


def _trains(network: nn.Module) -> bool:
    parameters = [p for p in network.parameters() if p.requires_grad]
    sharded = any(hasattr(p, "to_local") for p in parameters)  # whose weights are not all here
    return network.training and torch.is_grad_enabled() and bool(parameters) and not sharded


def _key_of(network: nn.Module, images: Tensor, cells: CellLayout) -> str:
    """Names network and shapes such that equal keys mean equal work, near enough."""
    kind = type(network).__mro__[2].__name__
    weights = sum(p.numel() for p in network.parameters())
    share = round(16 * cells.num_cells / cells.visible.numel())
    batch = 1 << (cells.batch - 1).bit_length()
    dtype = torch.get_autocast_dtype(images.device.type) if torch.is_autocast_enabled(images.device.type) else images.dtype
    height, width = images.shape[-2:]
    shapes = f"{height}x{width}, cells {cells.cell}, {share}/16 visible, batch {batch}, {str(dtype)[6:]}"
    return f"{kind} of {weights} weights, {shapes}"


def _same_for_all(network: nn.Module, images: Tensor, cells: CellLayout, key: str, gathers: bool) -> Choice:
    """What the first process finds whose mask needs gathering; all processes come here, whatever their masks."""
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    first = torch.tensor(rank if gathers else processes, device=images.device)
    torch.distributed.all_reduce(first, torch.distributed.ReduceOp.MIN)
    source = int(first)
    if source == processes:
        return Choice(why="by rule: no mask of the first step needed gathering")
    found: list[Any] = [None]
    if rank == source:
        found = [(key, _found(network, images, cells, key))]
    device = images.device if torch.distributed.get_backend() == "nccl" else None
    torch.distributed.broadcast_object_list(found, src=source, device=device)
    of, made = found[0]
    if source and not rank:  # it is the first process that logs
        choice.tell(f"kernels of {choice.describe(of, made)}; measured by process {source}")
    chosen: Choice = made
    return chosen


def _found(network: nn.Module, images: Tensor, cells: CellLayout, key: str) -> Choice:
    before = choice.kept(images.device).get(key)
    if before is not None:
        return before
    try:
        found = measure(network, images, cells)
    except torch.AcceleratorError:
        raise
    except Exception as error:  # the step itself will say what is wrong with it
        choice.tell(f"kernels of {key}: by rule, measuring them failed ({error})")
        return Choice(why=f"by rule: measuring failed ({error})")
    choice.tell(f"kernels of {choice.describe(key, found)}")
    choice.keep(images.device, key, found)
    return found


def measure(network: nn.Module, images: Tensor, cells: CellLayout) -> Choice:
    """Measure a network's layers and backends on the first images of a batch."""
    count = _IMAGES_ON_CPU if images.device.type == "cpu" else cells.batch
    images, visible = images.detach()[:count], cells.visible[:count]

    def layout() -> CellLayout:
        return CellLayout(visible, cells.cell, cells.renormalize)

    with _undisturbed(network, images.device):
        layers = _layers_of(network, images, layout())
        end = now() + BUDGET_S
        layer_ms = {
            key: times for key, run in layers.items() if (times := _times(_candidates(*run), images.device, end, run[:1]))
        }
        chosen = {key: fastest_kernel(times, layers[key][0]) for key, times in layer_ms.items()}
        chosen = {key: kernel for key, kernel in chosen.items() if kernel != layers[key][0]}
        steps: dict[str, Callable[[], object]] = {
            "gather": lambda: _step(network, _packed(PackedTensor, images, layout(), chosen)),
            "masked": lambda: _step(network, _packed(MaskedTensor, images, layout(), {})),
            "dense": lambda: _step(network, images),
        }
        step_ms = _times(steps, images.device, now() + BUDGET_S, ("gather", "dense"))
    if not {"gather", "masked"} <= step_ms.keys():
        return Choice("gather", f"by rule: two steps take more than {BUDGET_S:g} s", step_ms, chosen, layer_ms)
    return Choice(*fastest_backend(step_ms), step_ms, chosen, layer_ms)


def _packed(kind: type[SparseTensor], images: Tensor, cells: CellLayout, chosen: dict[str, str]) -> SparseTensor:
    cells.chosen = chosen
    return kind.pack(images, cells)


def _step(network: nn.Module, images: Tensor) -> None:
    """Forward and backward; gradients are dropped, and no hook of a parameter runs."""
    made = getattr(network, "forward_features", network)(images)
    while not isinstance(made, Tensor):
        made = made[-1]
    plain = made.plain if isinstance(made, SparseTensor) else made
    weights = [p for p in network.parameters() if p.requires_grad]
    torch.autograd.grad(plain.float().square().mean(), weights, allow_unused=True)


Run = tuple[str, Tensor, Tensor, int, kernels.ConvGeometry, CellLayout]


def _layers_of(network: nn.Module, images: Tensor, cells: CellLayout) -> dict[str, Run]:
    """One run of each layer shape of a network that has a choice: the rule's kernel, and what it is called with."""
    found: dict[str, Run] = {}

    def watch(
        rule: str, packed: Tensor, weight: Tensor, groups: int, geometry: kernels.ConvGeometry, cells: CellLayout
    ) -> None:
        if not geometry.is_pointwise and geometry.border == "constant":
            key = kernels.layer_key(weight, groups, geometry)
            found.setdefault(key, (rule, packed.detach(), weight.detach(), groups, geometry, cells))

    with kernels.watched(watch):
        _step(network, PackedTensor.pack(images, cells))  # warms up, too
    return found


def _candidates(
    rule: str, packed: Tensor, weight: Tensor, groups: int, geometry: kernels.ConvGeometry, cells: CellLayout
) -> dict[str, Callable[[], object]]:
    names = ["halo", "map"] if groups > 1 else ["im2col", "halo", "map"]
    if groups == 1 and kernels._fused(packed) is not None:
        names.insert(1, "columns")

    def run(kernel: str) -> object:
        leaves = [packed.requires_grad_(), weight.requires_grad_()]
        out = kernels.convolve(packed, weight, None, groups, geometry, cells, kernel)
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return {name: lambda name=name: run(name) for name in dict.fromkeys([rule, *names])}  # type: ignore[misc]


def _times(
    runs: dict[str, Callable[[], object]], device: torch.device, end: float, trusted: Collection[str]
) -> dict[str, float]:
    """Milliseconds of each, from some runs by turns after one to warm up; nothing where time is up by then.

    Of those that are trusted the fastest run counts, of others the slowest: on a busy machine nothing wins by chance. What
    lacks memory is left out. On the CPU, where warming up compiles nothing, it tells what is far too slow.
    """
    warm: dict[str, float] = {}
    for name, run in runs.items():
        spent = _time(run, device) if now() <= end else None
        warm |= {} if spent is None else {name: spent}
    if len(warm) < 2 or now() > end:
        return {}
    most = _FAR * min(warm.values()) if device.type == "cpu" else float("inf")
    times = {name: [spent] if spent > most else [] for name, spent in warm.items()}
    for turn in range(_RUNS):
        for name in [name for name, spent in warm.items() if spent <= most and (not turn or now() <= end)]:
            spent = _time(runs[name], device)
            times[name] += [] if spent is None else [spent]
    return {name: 1e3 * (min if name in trusted else max)(found) for name, found in times.items() if found}


def _time(run: Callable[[], object], device: torch.device) -> float | None:
    # other jobs on the machine take no processor time of this one; with several threads it would not tell how they share work
    clock = spent_by_processor if device.type == "cpu" and torch.get_num_threads() == 1 else now
    _wait(device)
    start = clock()
    try:
        run()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None
    _wait(device)
    return clock() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _undisturbed(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Context after which running statistics and random numbers are what they were."""
    kept = [buffer.clone() for buffer in network.buffers()]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in zip(network.buffers(), kept, strict=True):
                buffer.copy_(before)
