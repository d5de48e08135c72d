"""Proof that a network is exact on masked images: a sparse backend against dense compute with the hidden positions zeroed.

For the tests, the table in ``docs/reference/students.md``, and whoever has added a rule for a layer of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torchvision.ops import StochasticDepth

from hgkd.differences import largest_difference
from hgkd.sparse.convert import BACKENDS, sparsify
from hgkd.sparse.layout import CellLayout
from hgkd.sparse.masked import MaskedTensor
from hgkd.sparse.packed import PackedTensor
from hgkd.sparse.rectangle import RectangleTensor
from hgkd.sparse.tensor import SparseTensor

# a bias before a norm has gradient 0; what rounding leaves of it is judged by the size of the largest gradient
_FLOOR = 1e-4


@dataclass(frozen=True)
class Parity:
    """Largest differences, each relative to the largest magnitude of the tensor that differs; infinite for NaN.

    Attributes:
        outputs, gradients, statistics: backend against ``masked``, with some cells hidden; gradients are those of the
            pixels and of every parameter, statistics the buffers after a step in training mode.
        dense: backend with every cell visible against the original network: outputs, gradients and statistics.
    """

    outputs: float
    gradients: float
    statistics: float
    dense: float

    @property
    def worst(self) -> float:
        """The largest of the four."""
        return max(self.outputs, self.gradients, self.statistics, self.dense)


def image_channels(network: nn.Module) -> int:
    """Channels of the images that a network takes: those of its first convolution, where it runs on so many; else 3.

    It does not where something stands before that convolution, as YOLO's Focus does, which makes four channels of one.
    """
    first = next((layer for layer in network.modules() if isinstance(layer, nn.Conv2d)), None)
    if first is None or first.in_channels == 3:
        return 3
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            network(first.weight.new_zeros(1, first.in_channels, 64, 64))
    except (RuntimeError, ValueError):
        return 3
    finally:
        for module, training in modes.items():
            module.training = training
    return first.in_channels


def measure_parity(
    network: nn.Module,
    cell: int = 32,
    backend: str = "gather",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    renormalize: bool = False,
    device: torch.device | str = "cpu",
) -> Parity:
    """Run a copy of a network on three small images with 1, 3 and 6 of 2 x 3 cells visible, forward and backward.

    The backend 'gather' also on two cells side by side in each, which it takes as rectangles.

    The copy is in training mode, without dropout and drop path, and its constant parameters (fresh norms, layer scales)
    are drawn at random: their ones and zeros would hide errors. What is compared is ``forward_features`` where the
    network has it, so a pooling head is left out.

    Args:
        network: takes images (B, C, H, W).
        cell: side of a mask cell, pixels.
        backend: the one to be checked.
        dtype: of parameters and images.
        renormalize: of :func:`hgkd.sparse.sparsify`.
        device: where both run; numbers are drawn on the CPU, so they are the same everywhere.

    Raises:
        NoSparseRuleError: the network holds an operation that has no rule; it is named.
    """
    generator = torch.Generator().manual_seed(seed)
    network = copy.deepcopy(network).to(dtype).train()
    for module in network.modules():
        if isinstance(module, (_DropoutNd, DropPath, StochasticDepth)):
            module.eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
                parameter.uniform_(0.5, 1.5, generator=generator)
    images = torch.randn(3, image_channels(network), 2 * cell, 3 * cell, dtype=dtype, generator=generator).to(device)
    network = network.to(device)
    some = torch.zeros(3, 2, 3, dtype=torch.bool)
    some[0, 1, 1] = some[1, 0, 0] = some[1, 0, 1] = some[1, 1, 2] = True
    some[2] = True
    kind = BACKENDS[backend]
    compared = [_compare(network, images, backend, kind, CellLayout(some.to(device), cell, renormalize))]
    if kind is PackedTensor:
        pairs = torch.zeros(3, 2, 3, dtype=torch.bool)
        pairs[0, 1, 1:] = pairs[1, 0, :2] = pairs[2, 0, 1:] = True
        cells = CellLayout(pairs.to(device), cell, renormalize, rectangle=(1, 2))
        compared.append(_compare(network, images, backend, RectangleTensor, cells))
    outputs, gradients, statistics = map(max, zip(*compared, strict=True))
    everything = CellLayout(torch.ones_like(some, device=device), cell, renormalize)
    open_found = _run(sparsify(network, cell, backend, renormalize), images, kind, everything)
    open_expected = _run(copy.deepcopy(network), images, None, everything)
    dense = max(_difference(a, b) for a, b in zip(open_found, open_expected, strict=True))
    return Parity(outputs, gradients, statistics, dense)


def _compare(network: nn.Module, images: Tensor, backend: str, kind: type[SparseTensor], cells: CellLayout) -> list[float]:
    """Largest differences of outputs, gradients and buffers from the reference's."""
    found = _run(sparsify(network, cells.cell, backend, cells.renormalize), images, kind, cells)
    expected = _run(sparsify(network, cells.cell, "masked", cells.renormalize), images, MaskedTensor, cells)
    return [_difference(a, b) for a, b in zip(found, expected, strict=True)]


def _run(network: nn.Module, images: Tensor, kind: type[SparseTensor] | None, cells: CellLayout) -> list[dict[str, Tensor]]:
    """Outputs, gradients and buffers of one forward and backward; ``kind`` None: of the dense network."""
    leaf = images.clone().requires_grad_()
    forward = getattr(network, "forward_features", network)
    made = forward(leaf if kind is None else kind.pack(leaf, cells))
    outputs = {str(i): t.to_dense() if isinstance(t, SparseTensor) else t for i, t in enumerate(_tensors(made))}
    total = images.new_zeros(())
    for i, output in enumerate(outputs.values()):
        probe = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(i))
        total = total + (output * probe.to(output.device)).sum()
    total.backward()
    named = [("images", leaf), *network.named_parameters()]
    gradients = {name: tensor.grad for name, tensor in named if tensor.grad is not None}
    buffers = {name: buffer.to(images.dtype) for name, buffer in network.named_buffers()}
    return [outputs, gradients, buffers]


def _tensors(made: Tensor | Iterable[Any]) -> list[Tensor]:
    return [made] if isinstance(made, Tensor) else [tensor for part in made for tensor in _tensors(part)]


def _difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative difference; infinite when a tensor is there on one side only, or holds NaN or infinity."""
    if found.keys() != expected.keys():
        return float("inf")
    floor = _FLOOR * max((tensor.detach().abs().max().item() for tensor in expected.values() if tensor.numel()), default=0.0)
    return max((largest_difference(found[name], expected[name], max(floor, 1e-30)) for name in expected), default=0.0)
