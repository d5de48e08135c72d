"""Batch normalisation with ReLU and addition by Triton kernels against torch, in Triton's interpreter: a process of its own."""

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import regnet
from torch import Tensor

from hgkd.sparse import norm_act, sparsify
from hgkd.training.sync_norm import sync_batch_norms

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs inside the interpreter's process")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="would start itself for ever")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    folder = Path(__file__).parents[1]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(map(str, (folder.parent, folder)))}
    done = subprocess.run(command, env=environment, cwd=folder.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "20 passed" in done.stdout, done.stdout


def both(rows: int, channels: int, dtype: torch.dtype, add: bool, relu: bool, offset: float) -> list[list[Tensor]]:
    """[values, gradients of rows, weight, bias (, residual), mean, variance] of the kernels, and of torch in fp64."""
    from hgkd.sparse.fused_norm import NormAct

    given = [torch.randn(rows, channels).add(offset).to(dtype), torch.randn(channels), torch.randn(channels)]
    given += [torch.randn(rows, channels).to(dtype)] if add else []
    probe = torch.randn(rows, channels).to(dtype)
    found = []
    for kind in (None, torch.float64):
        leaves = [value.clone().to(kind or value.dtype).requires_grad_() for value in given]
        x, weight, bias, residual = (*leaves, None)[:4]
        if kind is None:
            out, mean, variance = NormAct.apply(x, weight, bias, residual, relu, 1e-5)
        else:
            out = F.batch_norm(x, None, None, weight, bias, training=True) + (0.0 if residual is None else residual)
            out = F.relu(out) if relu else out
            variance, mean = torch.var_mean(x, 0, correction=0)
        out.backward(probe.to(out.dtype))
        found.append([out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None), mean.detach(), variance.detach()])
    return found


@interpreted
@pytest.mark.parametrize(
    ("rows", "channels", "add", "relu", "offset"),
    [
        (300, 24, True, True, 0.0),
        (300, 24, False, True, 0.0),
        (65, 130, True, False, 0.0),  # tiles of rows and channels in part
        (7, 3, False, False, 0.0),
        (20000, 5, True, True, 0.0),  # several blocks a slice
        (500, 16, False, True, 1000.0),  # a mean that would cost the variance its digits
    ],
)
def test_values_gradients_and_statistics(rows: int, channels: int, add: bool, relu: bool, offset: float) -> None:
    found, expected = both(rows, channels, torch.float32, add, relu, offset)
    assert len(found) == len(expected) == 6 + add
    for one, other in zip(found, expected, strict=True):
        assert float((one.double() - other).norm() / other.norm()) < (1e-5 if not offset else 1e-3)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_of_half_precision_are_fp32(dtype: torch.dtype) -> None:
    found, expected = both(400, 32, dtype, True, False, 0.0)
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        exact = i in (2, 3, 5, 6)  # gradients of weight and bias, mean, variance
        assert one.dtype == (torch.float32 if exact else dtype)
        assert float((one.double() - other).norm() / other.norm()) < (1e-4 if exact else 1e-2)


@interpreted
def test_nothing_that_is_not_finite_is_hidden() -> None:
    from hgkd.sparse.fused_norm import NormAct

    rows = torch.randn(10, 4)
    rows[3, 2] = float("nan")
    out = NormAct.apply(rows, torch.ones(4), torch.zeros(4), None, True, 1e-5)[0]
    assert out.isnan().all(0).tolist() == [False, False, True, False]


SOME = [[[True, False], [True, True]], [[False, True], [True, False]]]
ROWS = [[[True, True], [False, False]], [[False, False], [True, True]]]  # taken as crops of 32 x 64


@interpreted
@pytest.mark.parametrize(
    ("name", "shown"),
    [*((name, SOME) for name in ("resnet18", "resnet50", "regnet", "regnet with SE")), ("resnet18", ROWS), ("regnet", ROWS)],
)
def test_networks_train_as_with_torchs_kernels(
    name: str, shown: list[list[list[bool]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features, gradients and running statistics of a masked network, every block of it by the kernels."""
    from hgkd.sparse import fused_norm

    results, calls = [], []
    if name.startswith("regnet"):
        se_ratio = 0.25 if name.endswith("SE") else 0.0
        model = regnet.RegNet(regnet.RegNetCfg(4, 8, 36.0, 2.0, 8, se_ratio=se_ratio), num_classes=0, global_pool="")
    else:
        model = timm.create_model(name, num_classes=0, global_pool="", layers=(1, 1, 1, 1))
    for norm in [part for part in model.modules() if isinstance(part, torch.nn.BatchNorm2d)]:
        torch.nn.init.uniform_(norm.weight, 0.5, 1.0)  # timm begins with residual branches of zero
    visible = torch.tensor(shown)
    images = torch.randn(2, 3, 64, 64)
    for served in (None, fused_norm):
        monkeypatch.setattr(norm_act, "_fused", lambda x, served=served: (calls.append(x), served)[1])
        net = sparsify(model, 32).train()
        out = net(images, visible=visible).to_dense()
        out.square().mean().backward()
        results.append([out.detach(), *(p.grad for p in net.parameters()), *(b.float() for b in net.buffers())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-5)
    # once a block, and in a RegNet for the stem and for the two layers in a block
    layers = 1 + 2 * 4 if name.startswith("regnet") else 0
    assert len(calls) == 2 * (4 + layers)


@interpreted
def test_layers_in_evaluation_keep_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm_act, "_fused", lambda x: pytest.fail("asked for the kernels"))
    net = sparsify(timm.create_model("resnet18", num_classes=0, global_pool=""), 32).eval()
    net(torch.randn(1, 3, 64, 64), visible=torch.ones(1, 2, 2, dtype=torch.bool).tril())


@interpreted
class TestAgreement:
    """The check that comes before the kernels' first use on a device."""

    def test_right_kernels_pass(self) -> None:
        for dtype, limit in norm_act.LIMITS.items():
            assert norm_act._error(torch.device("cpu"), dtype) < limit / 2

    def test_wrong_ones_are_left_with_a_warning(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from hgkd.sparse import fused_norm

        monkeypatch.setattr(norm_act, "_agreed", {})
        right = fused_norm.statistics
        monkeypatch.setattr(fused_norm, "statistics", lambda rows: (right(rows)[0], right(rows)[1] * 1.1))
        with pytest.warns(UserWarning, match="differ by"):
            assert not norm_act.agrees(torch.device("cpu"), torch.float32)


def test_norms_of_other_kinds_keep_their_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are synchronised between processes, or have another activation, are no matter of the kernels."""
    monkeypatch.setattr(norm_act, "_fused", lambda x: pytest.fail("asked for the kernels"))
    layer = timm.layers.ConvNormAct(3, 8, 3, norm_layer=torch.nn.BatchNorm2d, act_layer=torch.nn.ReLU)
    synced, silu = copy.deepcopy(layer), copy.deepcopy(layer)
    assert sync_batch_norms(synced) == 1
    silu.bn.act = torch.nn.SiLU()
    visible, images = torch.tensor([[[True, False], [True, True]]]), torch.randn(1, 3, 16, 16)
    for changed in (synced, silu):
        sparsify(changed, 8).train()(images, visible=visible)
    with pytest.raises(pytest.fail.Exception):
        sparsify(layer, 8).train()(images, visible=visible)
    assert sync_batch_norms(sparsify(layer, 8)) == 1


def test_a_cpu_runs_the_blocks_own_forward() -> None:
    net = sparsify(timm.create_model("resnet18", num_classes=0, global_pool=""), 32).train()
    out = net(torch.randn(2, 3, 64, 64), visible=torch.tensor([[[True, False], [False, True]]] * 2))
    assert "NormAct" not in str(out.plain.grad_fn)
    assert norm_act._fused(out) is None
