"""A training step's losses and their gradients as CUDA graphs: two launches in place of a thousand.

An eager step of a small student is bound by the host, which launches kernels more slowly than a GPU runs them. A CUDA graph
(pytorch.org/docs, "CUDA Graphs") records them once, with all addresses, and launches them together. So whatever changes from
step to step is copied into the memory that was recorded, and whatever fixes a shape makes another graph.

Recorded is what follows mask and teacher: student, decoder and objectives, forward and backward. The optimiser, DDP and loss
scaling see ordinary gradients. Before a graph is used, its losses and gradients are compared with those of the eager step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.dist import get_world_size
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hgkd.errors import InvalidValueError
from hgkd.networks.untouched import unchanged
from hgkd.structures import TeacherOutput

Work = Callable[[], None]
Recorder = Callable[[Work], Work]
Compute = Callable[..., Mapping[str, Tensor]]
CHOICES = (True, False, "auto")
_WARM_UPS = 2  # what is made once a process or compiled on first use exists before anything is recorded
_MOST_GRAPHS = 64
# of the same kernels on the same numbers; relative, gradients as one vector
LOSS_LIMIT, GRADIENT_LIMIT = 1e-3, 1e-2


def cuda_recorder() -> Recorder:
    """Records work as a CUDA graph and gives its replay; all graphs share one pool of memory, since none run together."""
    pool: Any = torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]

    def record(work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            work()
        replay: Work = graph.replay
        return replay

    return record


class GraphedLosses:
    """Losses of a function of tensors, and their gradients in parameters, by two recorded graphs.

    Args:
        compute: function of the inputs, name -> scalar; what it does must follow from their shapes alone.
        parameters: that the losses are differentiated in.
        inputs: of the shapes, types and devices that all later ones have.
        record: see :func:`cuda_recorder`.

    Attributes:
        names: of the losses.
    """

    def __init__(
        self, compute: Compute, parameters: Sequence[nn.Parameter], inputs: Sequence[Tensor], record: Recorder
    ) -> None:
        self._compute = compute
        self._parameters = list(parameters)
        self._inputs = [value.detach().clone() for value in inputs]
        self._record = record
        self.names: tuple[str, ...] = ()
        self._losses = self._slopes = torch.empty(0)
        self._gradients: tuple[Tensor | None, ...] = ()
        self._replay_forward = self._replay_backward = _nothing

    def compute_eagerly(self) -> tuple[Tensor, list[Tensor]]:
        """Losses and gradients of the example; comes before :meth:`record`."""
        with _side_stream(self._inputs[0].device):
            self._forward()
            self._slopes = torch.ones_like(self._losses)
            self._backward()
        return self._now()

    def record(self) -> None:
        """Record both directions."""
        self._replay_forward = self._record(self._forward)
        self._replay_backward = self._record(self._backward)

    def replayed(self) -> tuple[Tensor, list[Tensor]]:
        """Losses and gradients of the example, by the graphs."""
        self._replay_forward()
        self._slopes.fill_(1.0)
        self._replay_backward()
        return self._now()

    def _now(self) -> tuple[Tensor, list[Tensor]]:
        return self._losses.detach().clone(), [g.clone() for g in self._gradients if g is not None]

    def _forward(self) -> None:
        with torch.enable_grad(), _without_autocast_cache():
            found = self._compute(*self._inputs)
            self.names = tuple(found)
            self._losses = torch.stack([value.reshape(()) for value in found.values()])

    def _backward(self) -> None:
        self._gradients = torch.autograd.grad(self._losses, self._parameters, self._slopes, allow_unused=True)

    def __call__(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """The losses of other inputs, differentiable in the parameters, once."""
        torch._foreach_copy_(self._inputs, list(inputs))
        losses: Tensor = _Replay.apply(self, *self._parameters)  # type: ignore[no-untyped-call]
        return dict(zip(self.names, losses.unbind(), strict=True))

    def replay_forward(self) -> Tensor:
        self._replay_forward()
        return self._losses.detach().clone()

    def replay_backward(self, slopes: Tensor) -> list[Tensor | None]:
        self._slopes.copy_(slopes)
        self._replay_backward()
        # copies: parameters keep them as their gradients, and the next replay overwrites these
        copies = iter(torch._foreach_mul([g for g in self._gradients if g is not None], 1.0))
        return [None if g is None else next(copies) for g in self._gradients]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: GraphedLosses, *parameters: Tensor) -> Tensor:
        ctx.graph = graph
        return graph.replay_forward()

    @staticmethod
    @once_differentiable  # type: ignore[no-untyped-call, untyped-decorator]
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.graph.replay_backward(slopes)


class StepGraphs:
    """The graphs of a model's steps, one for each set of shapes, or the reason why there are none.

    Args:
        choice: True, False or 'auto': where it is possible, proved equal on the first batch, and one process trains.
        record: how work is recorded; None: as a CUDA graph, on CUDA devices only.

    Raises:
        ValueError: another choice.
    """

    def __init__(self, choice: bool | str = "auto", record: Recorder | None = None) -> None:
        if choice not in CHOICES or (isinstance(choice, int) and not isinstance(choice, bool)):
            raise InvalidValueError("cuda-graph-unknown", f"cuda_graph must be True, False or 'auto', got {choice!r}")
        self.choice = choice
        self.refusal = ""
        self._given = record
        self._record = record
        self._graphs: dict[tuple[object, ...], GraphedLosses] = {}
        self._state: tuple[int, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> StepGraphs:
        return StepGraphs(self.choice, self._given)  # graphs hold the addresses of the original's parameters

    def losses(
        self, model: nn.Module, compute: Compute, inputs: Sequence[Tensor], key: tuple[object, ...]
    ) -> dict[str, Tensor]:
        """``compute(*inputs)``, by a graph where there can be one.

        Args:
            model: whose parameters are trained.
            key: of what ``compute`` depends on beside the inputs.

        Raises:
            ValueError: a graph was asked for by ``choice=True``, and there can be none.
        """
        graph = self._graph(model, compute, inputs, key) if self._wanted(model, inputs) else None
        return dict(compute(*inputs)) if graph is None else graph(inputs)

    def _wanted(self, model: nn.Module, inputs: Sequence[Tensor]) -> bool:
        device = inputs[0].device
        if self.choice is False or self.refusal or not (torch.is_grad_enabled() and model.training):
            return False
        if self._given is None and device.type != "cuda":
            return self._refuse(f"on {device.type} there are no CUDA graphs") if self.choice is True else False
        if self.choice == "auto" and get_world_size() > 1:
            return self._refuse("several processes train; cuda_graph=True records nevertheless")
        watched = [name for name, part in model.named_modules() if part._forward_hooks or part._forward_pre_hooks]
        return not watched or self._refuse(f"{watched[0]} has a forward hook, which a graph would not call")

    def _graph(
        self, model: nn.Module, compute: Compute, inputs: Sequence[Tensor], key: tuple[object, ...]
    ) -> GraphedLosses | None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        # another device or precision, other parameters that train, or layers in another mode
        state = (*(p.data_ptr() for p in parameters), *(part.training for part in model.modules()))
        if state != self._state:
            self._graphs, self._state = {}, state
        kind = inputs[0].device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = (*key, autocast, *((value.shape, value.dtype) for value in inputs))
        if key not in self._graphs:
            if len(self._graphs) >= _MOST_GRAPHS:
                return None
            made = self._made(model, compute, parameters, inputs)
            if made is None:
                return None
            self._graphs[key] = made
        return self._graphs[key]

    def _made(
        self, model: nn.Module, compute: Compute, parameters: Sequence[nn.Parameter], inputs: Sequence[Tensor]
    ) -> GraphedLosses | None:
        self._record = self._record or cuda_recorder()
        graph = GraphedLosses(compute, parameters, inputs, self._record)
        for _ in range(_WARM_UPS):
            with unchanged(model):
                losses, gradients = graph.compute_eagerly()
        try:
            with unchanged(model):
                graph.record()
            with unchanged(model):
                found = graph.replayed()
        except RuntimeError as error:
            self._refuse(f"recording failed: {error}")
            return None
        of_losses, of_gradients = _difference([found[0]], [losses]), _difference(found[1], gradients)
        if not (of_losses <= LOSS_LIMIT and of_gradients <= GRADIENT_LIMIT):  # NaN is no match either
            self._refuse(f"its losses differ from the eager ones by {of_losses:.2g}, its gradients by {of_gradients:.2g}")
            return None
        print_log(
            f"the step is recorded as a CUDA graph; from the eager one its losses differ by {of_losses:.2g}, its gradients "
            f"by {of_gradients:.2g}",
            "current",
        )
        return graph

    def _refuse(self, why: str) -> bool:
        """No graphs from now on; False."""
        if self.choice is True:
            raise InvalidValueError(
                "cuda-graph-impossible", f"cuda_graph=True, but {why}; use cuda_graph='auto', which trains without it, or False"
            )
        self.refusal = why
        self._graphs = {}
        print_log(f"the step is not recorded as a CUDA graph: {why}", "current")
        return False


def taken_apart(
    outs: Mapping[str, TeacherOutput],
) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], dict[str, TeacherOutput]]]:
    """The tensors of teachers' outputs, each once, and a function that puts others of their shapes in their places."""
    found: list[Tensor] = []

    def place(value: Tensor) -> int:
        known = next((i for i, other in enumerate(found) if other is value), None)
        if known is None:
            found.append(value)
        return len(found) - 1 if known is None else known

    def moved(out: TeacherOutput, change: Callable[[Any], Any]) -> TeacherOutput:
        cls, decoded = (None if value is None else change(value) for value in (out.cls, out.decoded))
        tokens = {block: change(value) for block, value in out.tokens.items()}
        return TeacherOutput(tokens, out.grid, cls, decoded, out.views)

    plan = {name: moved(out, place) for name, out in outs.items()}  # places in place of tensors

    def rebuilt(values: Sequence[Tensor]) -> dict[str, TeacherOutput]:
        return {name: moved(out, values.__getitem__) for name, out in plan.items()}

    return found, rebuilt


def _nothing() -> None:
    """Before anything is recorded."""


def _difference(values: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Relative, of all tensors as one vector."""
    apart = torch.stack([(a.float() - b.float()).norm() for a, b in zip(values, expected, strict=True)]).norm()
    return float(apart / torch.stack([b.float().norm() for b in expected]).norm().clamp_min(1e-30))


@contextmanager
def _side_stream(device: torch.device) -> Iterator[None]:
    """Another stream of a GPU, where work that comes before a recording belongs; nothing elsewhere."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.current_stream(device)
    stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        yield
    before.wait_stream(stream)


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Weights that autocast has cast outside of a graph would not be cast again inside."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
