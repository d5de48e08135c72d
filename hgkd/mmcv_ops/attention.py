"""Multi-scale deformable attention (Zhu et al., Deformable DETR, arXiv 2010.04159): mmcv's own torch formulation on any device.

mmcv uses it on the CPU and asks for a compiled operator on a GPU; here both are the same. The gradient is autograd's,
of the formulation computed again in the backward.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    im2col_step: int,
) -> Tensor:
    """Weighted sum of bilinear samples over levels and points.

    Args:
        value: (B, sum of H * W, heads, D), float.
        spatial_shapes: (levels, 2) int64, height and width of each level.
        level_start_index: (levels,), implied by the shapes.
        sampling_loc: (B, Q, heads, levels, points, 2), x and y in [0, 1] of the level.
        attn_weight: (B, Q, heads, levels, points).

    Returns:
        (B, Q, heads * D).
    """
    from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

    return multi_scale_deformable_attn_pytorch(value, spatial_shapes, sampling_loc, attn_weight)


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Write the gradients of :func:`ms_deform_attn_forward` with respect to values, locations and weights."""
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in (value, sampling_loc, attn_weight)]
        output = ms_deform_attn_forward(inputs[0], spatial_shapes, level_start_index, inputs[1], inputs[2], im2col_step)
        grads = torch.autograd.grad(output, inputs, grad_output)
    for buffer, grad in zip((grad_value, grad_sampling_loc, grad_attn_weight), grads, strict=True):
        buffer.copy_(grad)
