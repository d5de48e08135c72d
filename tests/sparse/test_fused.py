"""The Triton kernels against ``masked``, run by Triton's interpreter, in a process of their own: it is chosen at import."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hgkd.sparse import CellLayout, MaskedTensor, PackedTensor, kernels

CHECKED = [str(Path(__file__).with_name("test_self_check.py")) + "::test_the_kernels_pass_in_the_interpreter"]
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs inside the interpreter's process")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="would start itself for ever")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__, *CHECKED]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": root}
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "10 passed" in done.stdout, done.stdout


@pytest.fixture
def fused(monkeypatch):
    """The kernels take CPU tensors in the interpreter; let every convolution use them, and count the calls."""
    from hgkd.sparse import fused

    calls = []
    for name in ("gather_multiply", "weight_gradient"):
        function = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *a, name=name, function=function: calls.append(name) or function(*a))
    monkeypatch.setattr(kernels, "_fused", lambda rows: fused)
    return calls


@interpreted
@pytest.mark.parametrize(
    ("channels", "out_channels", "kernel", "stride", "dilation", "dtype"),
    [
        (16, 8, 3, 1, 1, torch.float32),
        (40, 20, 3, 2, 1, torch.float32),  # channels in two blocks, one of them in part
        (17, 3, 5, 1, 2, torch.float32),
        (16, 130, 2, 2, 1, torch.float32),  # the outputs in two blocks
        (16, 16, 1, 3, 1, torch.float32),  # inputs that no output reads
        (32, 16, 3, 1, 1, torch.float16),
    ],
)
def test_fused_convolution_and_gradients(fused, channels, out_channels, kernel, stride, dilation, dtype) -> None:
    visible = torch.tensor([[[True, False], [False, True]], [[False, True], [True, True]]])
    s = 2 * stride
    layout = CellLayout(visible, s)
    padding = dilation * (kernel - 1) // 2
    torch.manual_seed(0)
    x = torch.randn(2, channels, 2 * s, 2 * s).to(dtype)
    weight = torch.randn(out_channels, channels, kernel, kernel).mul(0.1).to(dtype)
    results = []
    for kind in (PackedTensor, MaskedTensor):
        leaves = [t.clone().to(dtype if kind is PackedTensor else torch.float32).requires_grad_() for t in (x, weight)]
        packed = kind.pack(leaves[0], layout)
        if kind is PackedTensor:
            geometry = kernels.ConvGeometry(s, (kernel,) * 2, (stride,) * 2, (padding,) * 2, (dilation,) * 2)
            out = packed.like(kernels.convolve(packed.plain, leaves[1], None, 1, geometry, layout, "im2col")).to_dense()
        else:
            out = F.conv2d(packed, leaves[1], None, stride, padding, dilation).to_dense()
        probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(out.dtype)
        results.append([out, *torch.autograd.grad((out * probe).sum(), leaves)])
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    for found, expected in zip(*results, strict=True):
        assert found.dtype == dtype
        assert ((found.float() - expected).abs().max() / expected.abs().max()).item() < tolerance
    assert set(fused) == {"gather_multiply", "weight_gradient"}


@interpreted
def test_fused_weight_gradient_in_slices() -> None:
    """More points than one slice takes; by hand, without a layout."""
    from hgkd.sparse import fused

    torch.manual_seed(0)
    source, grad = torch.randn(50, 16), torch.randn(300, 16)
    index = torch.randint(0, 51, (300, 2))
    found = fused.weight_gradient(source, index, grad)
    columns = torch.cat([source, torch.zeros(1, 16)])[index].view(300, 32)
    torch.testing.assert_close(found, grad.T @ columns, rtol=1e-4, atol=1e-4)


@interpreted
def test_gather_of_hidden_places_only_is_zero() -> None:
    from hgkd.sparse import fused

    found = fused.gather_multiply(torch.randn(4, 16), torch.full((3, 2), 4), torch.randn(32, 8))
    assert torch.equal(found, torch.zeros(3, 8))


def test_cpu_tensors_use_the_torch_kernels() -> None:
    assert kernels._fused(torch.zeros(2, 16)) is None


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled there")
@pytest.mark.parametrize("name", ["_gather_multiply", "_weight_gradient"])
def test_the_kernels_compile_for_a_gpu(name, tmp_path, monkeypatch) -> None:
    """Some seconds each: the interpreter takes code that the compiler refuses. No GPU is needed for it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hgkd.sparse import fused

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(fused, name)
    constants = {"BLOCK_POINTS": 32, "BLOCK_CHANNELS": 32, "BLOCK_WIDTH": 32, "PRECISION": "ieee"}
    kinds = {"index": "*i64", "partial": "*fp32"} | dict.fromkeys(["source", "matrix", "out", "grad"], "*bf16")
    kinds |= dict.fromkeys(["rows", "points", "taps", "channels", "width", "slices"], "i32")
    signature = {argument: kinds.get(argument, "constexpr") for argument in kernel.arg_names}
    given = {(i,): constants[a] for i, a in enumerate(kernel.arg_names) if a in constants}
    made = triton.compile(ASTSource(kernel, signature, given), target=GPUTarget("cuda", 90, 32))
    assert "mma" in made.asm["ptx"], "the product should run on tensor cores"
