"""The sparse engine on a GPU: every kernel and ten families against fp64, equal bits from run to run, no waits, no faults.

``make test-gpu`` runs them; ``HGKD_TEST_DEVICE=cpu pytest -m gpu`` tries what a CPU can of them.
"""

import warnings
from collections.abc import Callable

import pytest
import torch
from gpu_device import DEVICE, ON_GPU, ON_THE_DEVICE, gpu_only
from refusals import refused
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn

from hgkd.sparse import CellLayout, MaskedTensor, PackedTensor, kernels, measure_parity, self_check, sparsify
from hgkd.sparse.families import FAMILIES
from hgkd.sparse.hardware import has_tensor_cores

pytestmark = ON_THE_DEVICE

# error against fp64, norm over norm; fp32 with room for TF32
LIMITS = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 2e-3, torch.float64: 1e-12}
# numbers of visible cells 1, 3 and 6; no tile divides what follows from them
VISIBLE = torch.tensor([[[0, 0, 0], [0, 1, 0]], [[1, 1, 0], [0, 0, 1]], [[1, 1, 1], [1, 1, 1]]]).bool()
PAIRS = torch.tensor([[[0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 0]], [[0, 1, 1], [0, 0, 0]]]).bool()
LAYOUTS: dict[str, Callable[[], CellLayout]] = {
    "cells": lambda: CellLayout(VISIBLE.to(DEVICE), 32),
    "rectangles": lambda: CellLayout(PAIRS.to(DEVICE), 32, rectangle=(1, 2)),
}
# name: (in, out, kernel, stride, dilation, groups, side of a cell)
LAYERS = {
    "1x1": (64, 48, 1, 1, 1, 1, 4),
    "1x1 stride 2": (64, 48, 1, 2, 1, 1, 4),
    "3x3": (64, 64, 3, 1, 1, 1, 5),
    "3x3 tails": (40, 130, 3, 1, 1, 1, 3),
    "3x3 stride 2": (32, 64, 3, 2, 1, 1, 4),
    "3x3 dilated": (16, 24, 3, 1, 2, 1, 4),
    "5x5": (24, 40, 5, 1, 1, 1, 5),
    "2x2 stride 2": (96, 64, 2, 2, 1, 1, 4),
    "stem": (3, 64, 7, 2, 1, 1, 8),
    "depthwise": (48, 48, 7, 1, 1, 48, 4),
    "grouped": (64, 64, 3, 1, 1, 4, 4),
}
FAMILY_NAMES = (
    "resnet18 resnet50 seresnet18 resnetv2_18 convnext_atto convnextv2_atto regnety_002 efficientnet_b0 tf_efficientnetv2_b0 "
    "mobilenetv2_035"
).split()


def family(name: str) -> nn.Module:
    torch.manual_seed(0)
    return next(f for f in FAMILIES if f.member == name).build(short=True)


def error(found: Tensor, expected: Tensor) -> float:
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def layer_run(name: str, dtype: torch.dtype, kernel: str | None) -> list[Tensor]:
    """Output and both gradients of a layer: by a kernel in a type, or (None) masked-dense."""
    channels, out_channels, size, stride, dilation, groups, side = LAYERS[name]
    cells = CellLayout(VISIBLE.to(DEVICE), side)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, channels, 2 * side, 3 * side, generator=generator).to(DEVICE, dtype)
    fan_in = channels // groups * size**2
    weight = (torch.randn(out_channels, channels // groups, size, size, generator=generator) / fan_in**0.5).to(DEVICE, dtype)
    pad = 0 if size == stride else dilation * (size - 1) // 2
    if kernel is None:
        x, weight = x.double(), weight.double()
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    poison = [torch.full((1 << 20,), float("nan"), device=DEVICE) for _ in range(4)]
    del poison  # memory that is handed out next holds NaN
    if kernel is None:
        packed = MaskedTensor.pack(x, cells)
        out = packed.like(nn.functional.conv2d(packed.zeroed, weight, None, stride, pad, dilation, groups)).to_dense()
    else:
        packed = PackedTensor.pack(x, cells)
        geometry = kernels.ConvGeometry(side, (size, size), (stride, stride), (pad, pad), (dilation, dilation))
        out = packed.like(kernels.convolve(packed.plain, weight, None, groups, geometry, cells, kernel)).to_dense()
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, out.dtype)
    return [out.detach(), *torch.autograd.grad((out * probe).sum(), leaves)]


CASES = [
    (layer, kernel)
    for layer, (_, _, size, _, _, groups, _) in LAYERS.items()
    for kernel in (["matmul"] if size == 1 else ["halo", "map"] if groups > 1 else ["im2col", "columns", "halo", "map"])
]


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize(("layer", "kernel"), CASES)
def test_every_kernel_against_fp64(layer, kernel, dtype) -> None:
    expected = layer_run(layer, dtype, None)
    found, again = layer_run(layer, dtype, kernel), layer_run(layer, dtype, kernel)
    for name, a, b, c in zip(("output", "input gradient", "weight gradient"), found, expected, again, strict=True):
        assert a.dtype == dtype
        assert error(a, b) < LIMITS[dtype], name
        if kernel in ("im2col", "columns", "matmul"):  # the others end in a library's convolution
            assert torch.equal(a, c), f"{name} differs from run to run"


@gpu_only
@pytest.mark.parametrize("dtype", list(self_check.LIMITS), ids=str)
def test_the_fused_kernels_pass_their_check(dtype) -> None:
    if not has_tensor_cores(DEVICE):
        assert "below 8.0" in self_check.describe(DEVICE)[0]
        pytest.skip("Triton has no tensor cores here, so torch's kernels serve")
    found = self_check.verdict(DEVICE, dtype)
    assert found.ok, found.why
    assert kernels._fused(torch.zeros(1, 16, dtype=dtype, device=DEVICE)) is not None


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_families_in_fp64(name) -> None:
    """Outputs, gradients of pixels and parameters, and statistics; with hidden cells and without."""
    assert measure_parity(family(name), device=DEVICE).worst < 1e-9


def step(network: nn.Module, images: Tensor, cells: CellLayout, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Output and gradients of a step in training mode, under autocast when a type is given."""
    network.zero_grad(set_to_none=True)
    with torch.autocast(DEVICE.type, dtype, enabled=dtype is not None):
        out = network.forward_features(network.pack(images, cells)).to_dense()
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, out.dtype)
    (out * probe).sum().backward()
    return {"output": out.detach()} | {n: p.grad.clone() for n, p in network.named_parameters() if p.grad is not None}


def prepared(name: str, backend: str = "gather") -> tuple[nn.Module, Tensor]:
    network = sparsify(family(name), 32, backend).to(DEVICE).eval()  # no dropout; statistics are taken by the norms below
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    return network, torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(2)).to(DEVICE)


@pytest.mark.parametrize("shown", LAYOUTS)
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_families_under_autocast(name, shown) -> None:
    """bf16 against fp64 masked-dense: no further than the ordinary dense network is from itself in fp64, with room."""
    network, images = prepared(name)
    reference, _ = prepared(name, "masked")
    found = step(network, images, LAYOUTS[shown](), torch.bfloat16)
    masked = step(reference, images, LAYOUTS[shown](), torch.bfloat16)
    expected = step(reference.double(), images.double(), LAYOUTS[shown]())
    largest = max(value.norm() for key, value in expected.items() if key != "output")
    for key, value in expected.items():
        if key != "output" and value.norm() < 1e-2 * largest:
            continue  # what rounding leaves of a gradient that is nearly 0
        assert error(found[key], value) < max(0.05, 2 * error(masked[key], value)), key


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_families_to_equal_bits(name, dtype) -> None:
    network, images = prepared(name)
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        first, second = (step(network, images, CellLayout(VISIBLE.to(DEVICE), 32), dtype) for _ in range(2))
    assert [key for key, value in first.items() if not torch.equal(value, second[key])] == []


def test_what_repeats_rows_and_reflects_has_equal_bits() -> None:
    """Global response norm and reflected borders: torch's own gradients of both would add atomically."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(16, 16, 3), GlobalResponseNorm(16, channels_last=False))
    network = sparsify(layers, 8).to(DEVICE)
    images = torch.randn(3, 16, 16, 24, device=DEVICE)
    runs = []
    for _ in range(2):
        leaf = images.clone().requires_grad_()
        network(leaf, visible=VISIBLE.to(DEVICE)).to_dense().square().sum().backward()
        runs.append(leaf.grad)
    assert torch.equal(*runs)


@gpu_only
@pytest.mark.parametrize(("backend", "shown"), [("gather", "cells"), ("gather", "rectangles"), ("masked", "cells")])
def test_a_step_waits_for_nothing(backend, shown) -> None:
    network, images = prepared("seresnet18", backend)
    step(network, images, LAYOUTS[shown](), torch.bfloat16)  # kernels are checked and compiled

    def forward_and_backward(cells: CellLayout) -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = network.forward_features(network.pack(images, cells)).plain.float().square().mean()
        loss.backward()

    cells = LAYOUTS[shown]()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_backward(cells)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_image_without_a_visible_cell_is_refused() -> None:
    with refused(ValueError, "image-without-visible-cell", "[1]"):
        CellLayout(torch.tensor([[[True, False]], [[False, False]]], device=DEVICE), 32)


def test_weights_that_came_from_the_cpu_are_laid_out_for_the_device() -> None:
    network = sparsify(nn.Sequential(nn.Conv2d(32, 32, 3, padding=1)), 8).to(DEVICE)
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last) == ON_GPU


@gpu_only
def test_fp32_is_as_exact_and_as_fast_as_the_setting_of_convolutions_says() -> None:
    network, images = prepared("resnet18")
    cells = CellLayout(VISIBLE.to(DEVICE), 32)
    before = torch.backends.cudnn.allow_tf32
    try:
        errors = {}
        for allowed in (True, False):
            torch.backends.cudnn.allow_tf32 = allowed
            single = step(network.float(), images, cells)["output"]
            errors[allowed] = error(single, step(network.double(), images.double(), cells)["output"])
    finally:
        torch.backends.cudnn.allow_tf32 = before
    assert errors[False] < 1e-5
    assert errors[True] < 1e-2


@gpu_only
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_second_device_computes_while_the_first_is_current() -> None:
    second = torch.device("cuda", 1)
    network = sparsify(family("resnet18"), 32).to(second).train()
    with warnings.catch_warnings(), torch.autocast("cuda", torch.bfloat16):
        warnings.simplefilter("error")
        network(torch.randn(3, 3, 64, 96, device=second), visible=VISIBLE.to(second)).plain.float().mean().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in network.parameters() if p.grad is not None)


def test_measured_kernels_compute_the_same(monkeypatch, tmp_path) -> None:
    network, images = prepared("resnet18")
    cells = LAYOUTS["cells"]
    expected = step(network.double(), images.double(), cells())
    monkeypatch.setenv("HGKD_KERNELS", "measure")
    monkeypatch.setenv("HGKD_KERNELS_CACHE", str(tmp_path))
    found = step(network.train(), images.double(), cells())
    (choice,) = network.sparse_choices.values()
    assert {"gather", "masked"} <= choice.step_ms.keys(), choice.why
    assert max(error(found[key], value) for key, value in expected.items() if value.norm() > 1e-6) < 1e-9
