"""Deformable convolutions against the definition in loops (float64), torchvision's Python-level function, and gradcheck."""

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision

# stride, padding, dilation, groups, groups of offsets
GEOMETRIES = [
    ((1, 1), (1, 1), (1, 1), 1, 1),
    ((2, 1), (0, 2), (1, 2), 2, 1),
    ((1, 2), (2, 1), (2, 1), 2, 4),
    ((1, 1), (1, 1), (1, 1), 4, 2),
]


def tensors(stride, padding, dilation, groups, offset_groups, batch=2, size=(6, 7), kernel=(3, 2)):
    """Input, offset, mask, weight and bias."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    geometry = zip(size, kernel, stride, padding, dilation, strict=True)
    out = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in geometry)
    places = offset_groups * kernel[0] * kernel[1]
    return (
        randn(batch, 4, *size),
        randn(batch, 2 * places, *out),
        randn(batch, places, *out),
        randn(8, 4 // groups, *kernel),
        randn(8),
    )


def sample(plane: torch.Tensor, y: float, x: float) -> torch.Tensor:
    """Bilinear, with zeros around the image."""
    total = plane.new_zeros(())
    for i in (math.floor(y), math.floor(y) + 1):
        for j in (math.floor(x), math.floor(x) + 1):
            if 0 <= i < plane.shape[0] and 0 <= j < plane.shape[1]:
                total = total + plane[i, j] * (1 - abs(y - i)) * (1 - abs(x - j))
    return total


def by_definition(x, offset, mask, weight, bias, stride, padding, dilation, groups, offset_groups):
    kernel, (height, width) = weight.shape[2:], offset.shape[2:]
    per_group, per_offsets, outputs = x.shape[1] // groups, x.shape[1] // offset_groups, weight.shape[0] // groups
    result = x.new_zeros(len(x), len(weight), height, width)
    for b, h, w, i, j in ((b, h, w, i, j) for b in range(len(x)) for h in range(height) for w in range(width)
                          for i in range(kernel[0]) for j in range(kernel[1])):  # fmt: skip
        for channel in range(x.shape[1]):
            place = (channel // per_offsets) * kernel[0] * kernel[1] + i * kernel[1] + j
            y = h * stride[0] - padding[0] + i * dilation[0] + float(offset[b, 2 * place, h, w])
            z = w * stride[1] - padding[1] + j * dilation[1] + float(offset[b, 2 * place + 1, h, w])
            value = sample(x[b, channel], y, z) * (1 if mask is None else mask[b, place, h, w])
            group = channel // per_group
            rows = slice(group * outputs, (group + 1) * outputs)
            result[b, rows, h, w] += weight[rows, channel % per_group, i, j] * value
    return result if bias is None else result + bias[:, None, None]


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_values_by_definition(ops, geometry):
    x, offset, mask, weight, bias = (t.detach() for t in tensors(*geometry, batch=1, size=(4, 5)))
    torch.testing.assert_close(
        ops.deform_conv2d(x, offset, weight, *geometry), by_definition(x, offset, None, weight, None, *geometry)
    )
    wanted = by_definition(x, offset, mask, weight, bias, *geometry)
    torch.testing.assert_close(ops.modulated_deform_conv2d(x, offset, mask, weight, bias, *geometry), wanted)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_deformable_is_torchvisions(ops, geometry):
    x, offset, _, weight, _ = tensors(*geometry)
    result = ops.deform_conv2d(x, offset, weight, *geometry)
    wanted = torchvision.ops.deform_conv2d(x, offset, weight, None, *geometry[:3])
    torch.testing.assert_close(result, wanted)
    upstream = torch.randn_like(result)
    inputs = (x, offset, weight)
    grads = [torch.autograd.grad(value, inputs, upstream) for value in (result, wanted)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_modulated_is_torchvisions(ops, geometry, with_bias):
    x, offset, mask, weight, bias = tensors(*geometry)
    result = ops.modulated_deform_conv2d(x, offset, mask, weight, bias if with_bias else None, *geometry)
    wanted = torchvision.ops.deform_conv2d(x, offset, weight, bias if with_bias else None, *geometry[:3], mask)
    torch.testing.assert_close(result, wanted)
    upstream = torch.randn_like(result)
    inputs = (x, offset, mask, weight, bias)[: 5 if with_bias else 4]
    grads = [torch.autograd.grad(value, inputs, upstream) for value in (result, wanted)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("geometry", GEOMETRIES[2:])
def test_gradcheck(ops, geometry):
    x, offset, mask, weight, bias = tensors(*geometry, batch=1, size=(3, 4))
    assert torch.autograd.gradcheck(lambda *t: ops.deform_conv2d(*t, *geometry), (x, offset, weight), fast_mode=True)
    modulated = (x, offset, mask, weight, bias)
    assert torch.autograd.gradcheck(lambda *t: ops.modulated_deform_conv2d(*t, *geometry), modulated, fast_mode=True)


def test_only_the_weight_learns(ops):
    geometry = GEOMETRIES[1]
    x, offset, _, weight, _ = tensors(*geometry)
    grads = []
    for convolve in (ops.deform_conv2d, lambda x, o, w, *g: torchvision.ops.deform_conv2d(x, o, w, None, *g[:3])):
        convolve(x.detach(), offset.detach(), weight, *geometry).pow(2).sum().backward()
        grads.append(weight.grad.clone())
        weight.grad = None
    torch.testing.assert_close(*grads)


def test_without_offsets_it_is_a_convolution(ops):
    layer = ops.ModulatedDeformConv2dPack(4, 6, 3, padding=1, groups=2, deform_groups=2)
    x = torch.randn(2, 4, 5, 5)
    # offsets start at 0 and masks at sigmoid(0)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight / 2, layer.bias, padding=1, groups=2), rtol=1e-4, atol=1e-5)
    layer = ops.DeformConv2dPack(4, 6, 3, padding=1)
    torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, padding=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(ops, dtype):
    geometry = GEOMETRIES[0]
    x, offset, mask, weight, bias = (t.detach().to(dtype).requires_grad_() for t in tensors(*geometry))
    result = ops.modulated_deform_conv2d(x, offset, mask, weight, bias, *geometry)
    assert result.dtype == dtype
    wanted = torchvision.ops.deform_conv2d(
        x.double(), offset.double(), weight.double(), bias.double(), *geometry[:3], mask.double()
    )
    torch.testing.assert_close(result.double(), wanted, rtol=0.01, atol=0.1)
    result.sum().backward()
    assert all(t.grad.dtype == dtype and t.grad.any() for t in (x, offset, mask, weight, bias))


def test_no_images(ops):
    x, offset, mask, weight, bias = (t.detach() for t in tensors(*GEOMETRIES[0], batch=0))
    # mmcv's own Python refuses them, before any operator is asked, compiled or not
    for call in (
        lambda: ops.deform_conv2d(x, offset, weight, *GEOMETRIES[0]),
        lambda: ops.modulated_deform_conv2d(x, offset, mask, weight, bias, *GEOMETRIES[0]),
    ):
        with pytest.raises(ValueError, match=r"convolution input is too small \(output would be 0x8x"):
            call()
