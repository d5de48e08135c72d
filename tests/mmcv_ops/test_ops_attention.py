"""Multi-scale deformable attention against its definition in loops (float64), and gradcheck."""

import math

import pytest
import torch

SHAPES = torch.tensor([[3, 4], [2, 2]])
STARTS = torch.tensor([0, 12])


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values (2, 16, 2, 3), locations (2, 5, 2, 2, 3, 2) of which some lie outside of the map, weights (2, 5, 2, 2, 3)."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, 16, 2, 3, dtype=torch.float64, generator=generator)
    places = torch.rand(2, 5, 2, 2, 3, 2, dtype=torch.float64, generator=generator) * 1.4 - 0.2
    weights = torch.rand(2, 5, 2, 2, 3, dtype=torch.float64, generator=generator)
    return value, places, weights


def by_definition(value, places, weights):
    batch, queries, heads, levels, points, _ = places.shape
    output = value.new_zeros(batch, queries, heads, value.shape[-1])
    for b, q, h, level, p in torch.cartesian_prod(*map(torch.arange, (batch, queries, heads, levels, points))).tolist():
        height, width = SHAPES[level].tolist()
        # pixel (i, j) has its centre at ((j + 0.5) / width, (i + 0.5) / height); zeros around the map
        x, y = float(places[b, q, h, level, p, 0]) * width - 0.5, float(places[b, q, h, level, p, 1]) * height - 0.5
        for i in (math.floor(y), math.floor(y) + 1):
            for j in (math.floor(x), math.floor(x) + 1):
                if 0 <= i < height and 0 <= j < width:
                    pixel = value[b, int(STARTS[level]) + i * width + j, h]
                    output[b, q, h] += weights[b, q, h, level, p] * (1 - abs(y - i)) * (1 - abs(x - j)) * pixel
    return output.flatten(2)


@pytest.fixture
def attend(ops):
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    return lambda value, places, weights: MultiScaleDeformableAttnFunction.apply(value, SHAPES, STARTS, places, weights, 64)


def test_values(attend):
    torch.testing.assert_close(attend(*tensors()), by_definition(*tensors()))


def test_gradients(attend):
    assert torch.autograd.gradcheck(attend, tuple(t.requires_grad_() for t in tensors()), fast_mode=True)


def test_no_queries(attend):
    value, places, weights = (t.requires_grad_() for t in tensors())
    output = attend(value, places[:, :0], weights[:, :0])
    assert output.shape == (2, 0, 6)
    output.sum().backward()
    assert not value.grad.any()
