"""Renormalised taps against the formula of partial convolution, written out for masked dense maps."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hgkd.errors import code_of
from hgkd.sparse import CellLayout, load_sparse, measure_parity, save_sparse, sparsify

CELL = 8


def mask(batch: int = 3, h: int = 2, w: int = 3) -> Tensor:
    visible = torch.zeros(batch, h, w, dtype=torch.bool)
    visible[0, 1, 1] = visible[1, 0, 0] = visible[1, 0, 1] = visible[1, 1, 2] = True
    visible[2:] = torch.rand(batch - 2, h, w, generator=torch.Generator().manual_seed(5)) < 0.6
    visible[:, 0, 0] = True
    return visible


class ByFormula(nn.Module):
    """Runs layers one after the other on dense maps, each convolution as arXiv 1804.07723 has it."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        for layer in self.layers:
            m = F.interpolate(visible[:, None].to(x.dtype), size=x.shape[2:], mode="nearest")
            x = x * m
            if isinstance(layer, nn.Conv2d):
                ones = torch.ones(1, 1, *layer.kernel_size, dtype=x.dtype)
                window = dict(stride=layer.stride, padding=layer.padding, dilation=layer.dilation)
                seen, inside = F.conv2d(m, ones, **window), F.conv2d(torch.ones_like(m), ones, **window)
                out = F.conv2d(x, layer.weight, None, groups=layer.groups, **window)
                out = out * inside / seen.clamp_min(1)
                x = out if layer.bias is None else out + layer.bias.view(1, -1, 1, 1)
            elif isinstance(layer, nn.AvgPool2d):
                window = dict(kernel_size=layer.kernel_size, stride=layer.stride, padding=layer.padding)
                # the mean of the layer, times the share of the window that is visible
                seen, inside = F.avg_pool2d(m, **window), F.avg_pool2d(torch.ones_like(m), **window)
                area = seen.new_tensor(layer.kernel_size**2)
                x = layer(x) * (inside * area) / (seen * area).clamp_min(1)
            else:
                x = layer(x)
        return x * F.interpolate(visible[:, None].to(x.dtype), size=x.shape[2:], mode="nearest")


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 7, stride=2, padding=3),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.Conv2d(8, 6, 3, padding=2, dilation=2),
        nn.AvgPool2d(3, stride=1, padding=1),
        nn.Conv2d(6, 64, 1),
        nn.Conv2d(64, 4, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(4, 5, 2, stride=2),
    ).double()


@pytest.mark.parametrize("backend", ["gather", "masked"])
def test_values_and_gradients_are_those_of_the_formula(backend: str) -> None:
    network, visible = layers(), mask()
    images = torch.randn(3, 3, 16, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    reference = copy.deepcopy(network)
    net = sparsify(network, CELL, backend, renormalize=True)
    ours, theirs = (images.clone().requires_grad_() for _ in range(2))
    found = net(ours, visible=visible).to_dense()
    expected = ByFormula(reference)(theirs, visible)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    probe = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(2))
    (found * probe).sum().backward()
    (expected * probe).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    for (name, one), other in zip(net.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_a_constant_image_stays_constant_whatever_is_hidden() -> None:
    """What it is for: a mean over visible neighbours does not fall towards a hidden cell."""
    net = nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
    nn.init.ones_(net.weight)
    ones = torch.ones(3, 1, 16, 24, dtype=torch.float64)
    layout = CellLayout(mask(), CELL, renormalize=True)
    inside = net(ones)  # 9, 6 at the image's border, 4 in its corners
    seen = layout.mask(1).expand_as(inside)
    for backend in ("gather", "masked"):
        out = sparsify(net, CELL, backend, renormalize=True)(ones, visible=layout).to_dense()
        torch.testing.assert_close(out[seen], inside[seen])
        plain = sparsify(net, CELL, backend)(ones, visible=layout.visible).to_dense()
        assert (plain[seen] < inside[seen]).any()


@pytest.mark.parametrize("name", ["resnet18d", "convnextv2_atto", "test_efficientnet", "tf_efficientnet_lite0"])
def test_backends_agree_and_whole_images_are_the_dense_network(name: str) -> None:
    torch.manual_seed(0)
    found = measure_parity(timm.create_model(name, num_classes=0, global_pool=""), renormalize=True)
    assert found.worst < 1e-8, found


def test_half_precision_keeps_its_dtype() -> None:
    net = sparsify(layers().float(), CELL, renormalize=True)
    images = torch.randn(3, 3, 16, 24)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(images, visible=mask()).to_dense()
    assert out.dtype == torch.bfloat16
    expected = net(images, visible=mask()).to_dense()
    assert (out.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_layout_of_the_other_arithmetic_is_refused() -> None:
    net = sparsify(layers().float(), CELL, renormalize=True)
    with pytest.raises(ValueError, match=r"renormalize=False, the network renormalize=True") as refused:
        net(torch.zeros(3, 3, 16, 24), visible=CellLayout(mask(), CELL))
    assert code_of(refused.value) == "layout-of-another-network"


def test_a_saved_network_renormalises_as_before(tmp_path) -> None:
    torch.manual_seed(0)
    net = sparsify(timm.create_model("test_resnet", num_classes=0, global_pool=""), 32, renormalize=True).eval()
    save_sparse(net, tmp_path / "net.safetensors", timm_model="test_resnet", timm_kwargs={"num_classes": 0, "global_pool": ""})
    loaded = load_sparse(tmp_path / "net.safetensors")
    assert loaded.sparse_renormalize
    images = torch.randn(3, 3, 64, 96)
    torch.testing.assert_close(loaded(images, visible=mask()).to_dense(), net(images, visible=mask()).to_dense())
