"""Backend ``spconv``: against ``masked``; skipped where the library is not installed, except for what happens then."""

import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from refusals import refused

from hgkd.sparse import BACKENDS, CellLayout, MaskedTensor, measure_parity, sparsify
from hgkd.sparse.families import FAMILIES
from hgkd.sparse.kernels import ConvGeometry
from hgkd.sparse.spconv import SpconvTensor, check_indices, fits_spconv

installed = pytest.mark.skipif(importlib.util.find_spec("spconv") is None, reason="spconv is not installed")


@installed
@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    h=st.integers(1, 3),
    w=st.integers(1, 3),
    share=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    seed=st.integers(0, 10_000),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 1, 1, 3]),
    factor=st.integers(1, 3),
    bias=st.booleans(),
)
def test_convolution(batch, h, w, share, seed, kernel, stride, dilation, groups, factor, bias):
    s_in = stride * factor
    padding = tuple(dilation * (k - 1) // 2 for k in kernel)
    for size, k, p in zip((h * s_in, w * s_in), kernel, padding, strict=True):
        assume((size + 2 * p - dilation * (k - 1) - 1) // stride + 1 == size // stride)
    generator = torch.Generator().manual_seed(seed)
    visible = torch.rand(batch, h, w, generator=generator) < share
    visible[:, -1, 0] = True
    layout = CellLayout(visible, s_in)
    x = torch.randn(batch, 6, h * s_in, w * s_in, generator=generator)
    parameters = [torch.randn(9, 6 // groups, *kernel, generator=generator)]
    parameters += [torch.randn(9, generator=generator)] if bias else []
    results = []
    for kind in (SpconvTensor, MaskedTensor):
        leaves = [t.clone().requires_grad_() for t in (x, *parameters)]
        weight, *rest = leaves[1:]
        out = F.conv2d(kind.pack(leaves[0], layout), weight, *(rest or [None]), stride, padding, dilation, groups).to_dense()
        probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
        results.append([out, *torch.autograd.grad((out * probe).sum(), leaves)])
    for found, expected in zip(*results, strict=True):
        assert ((found - expected).abs().max() / expected.abs().max().clamp_min(1.0)).item() < 1e-4


@installed
@pytest.mark.parametrize("member", ["resnext26ts", "convnext_atto", "tf_mobilenetv3_small_minimal_100"])
def test_whole_networks(member: str) -> None:
    family = next(f for f in FAMILIES if f.member == member)
    torch.manual_seed(0)
    parity = measure_parity(family.build(short=True), backend="spconv")
    assert parity.worst < 1e-4, parity


@installed
def test_spconv_does_the_work(monkeypatch) -> None:
    """Not gather's kernel behind another name: 3x3, strided 3x3 and 7x7 run in spconv's layers, 1x1 does not."""
    from spconv.pytorch.conv import SparseConvolution

    seen = []
    forward = SparseConvolution.forward

    def watched(layer, x):
        seen.append((layer.subm, tuple(layer.kernel_size)))
        return forward(layer, x)

    monkeypatch.setattr(SparseConvolution, "forward", watched)
    layers = [torch.nn.Conv2d(3, 4, 7, 2, 3), torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.Conv2d(4, 4, 1)]
    net = sparsify(torch.nn.Sequential(*layers), 8, "spconv")
    out = net.forward(net.pack(torch.randn(1, 3, 16, 16), torch.eye(2, dtype=torch.bool)[None]))
    assert type(out) is SpconvTensor
    assert seen == [(False, (7, 7)), (True, (3, 3))]


@installed
def test_autocast_to_bf16_computes_in_fp32() -> None:
    x, weight = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
    layout = CellLayout(torch.ones(1, 2, 2, dtype=torch.bool), 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = F.conv2d(SpconvTensor.pack(x, layout), weight, padding=1)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.to_dense().float(), F.conv2d(x, weight, padding=1), rtol=2**-8, atol=1e-4)


def test_what_spconv_cannot_do() -> None:
    layout = CellLayout(torch.ones(1, 2, 2, dtype=torch.bool), 8)
    usual = ConvGeometry(8, (3, 3), (1, 1), (1, 1), (1, 1))
    assert fits_spconv(layout, 1, usual)
    assert fits_spconv(layout, 1, ConvGeometry(8, (2, 2), (2, 2), (0, 0), (1, 1)))
    assert not fits_spconv(layout, 4, usual), "groups"
    assert not fits_spconv(layout, 1, ConvGeometry(8, (1, 1), (2, 2), (0, 0), (1, 1))), "a matrix product"
    assert not fits_spconv(layout, 1, ConvGeometry(8, (2, 2), (1, 1), (0, 0), (1, 1))), "an even kernel of stride 1"
    assert not fits_spconv(layout, 1, ConvGeometry(8, (3, 3), (2, 2), (0, 0), (1, 1))), "more padding below than above"
    assert not fits_spconv(layout, 1, ConvGeometry(8, (3, 3), (1, 1), (1, 1), (1, 1), "reflect")), "reflection"


def test_indices_in_packed_row_order() -> None:
    visible = torch.tensor([[[False, True]], [[True, False]]])
    indices = check_indices(CellLayout(visible, 2).coordinates(2))
    expected = [[0, 0, 2], [0, 0, 3], [0, 1, 2], [0, 1, 3], [1, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1]]
    assert indices.tolist() == expected


@pytest.mark.parametrize("indices", [torch.zeros(4, 3), torch.zeros(3, 4, dtype=torch.int32).t()])
def test_indices_that_spconv_would_misread(indices) -> None:
    with refused(ValueError, "spconv-indices", "int32", "3"):
        check_indices(indices)


def test_without_the_library(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "spconv", None)
    monkeypatch.setitem(sys.modules, "spconv.pytorch", None)
    with refused(ImportError, "spconv-missing", "hgkd[spconv]", "backend='gather'"):
        sparsify(torch.nn.Conv2d(3, 4, 1), 4, "spconv")
    assert "spconv" in BACKENDS
