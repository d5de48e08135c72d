"""Deformable convolution (Dai et al., arXiv 1703.06211) and modulated (Zhu et al., arXiv 1811.11168): torchvision's operator.

Both libraries order offsets alike: (B, groups * kh * kw * 2, H', W') with y before x. ``columns`` and ``ones`` are scratch
memory of mmcv's own kernels, and ``im2col_step`` cuts batches for them: neither is needed here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hgkd.mmcv_ops.precision import at_least_float32


def _arguments(
    input: Tensor, weight: Tensor, offset: Tensor, mask: Tensor | None, bias: Tensor | None, geometry: tuple[int, ...]
) -> tuple[object, ...]:
    """Arguments of torchvision's ``deform_conv2d``: it wants a tensor for a mask and a bias that there are none of."""
    input, weight, offset = map(at_least_float32, (input, weight, offset))
    use_mask = mask is not None
    mask = input.new_zeros(len(input), 1) if mask is None else at_least_float32(mask)
    bias = input.new_zeros(len(weight)) if bias is None else at_least_float32(bias)
    return input, weight, offset, mask, bias, *geometry, use_mask


def _forward(*arguments: object) -> Tensor:
    return torch.ops.torchvision.deform_conv2d(*arguments)


def _backward(grad_output: Tensor, *arguments: object) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of input, weight, offset, mask and bias."""
    return torch.ops.torchvision._deform_conv2d_backward(at_least_float32(grad_output), *arguments)


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """``output`` (B, O, H', W') becomes the convolution of ``input`` (B, C, H, W) at places moved by ``offset``, in pixels."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    output.copy_(_forward(*_arguments(input, weight, offset, None, None, geometry)))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Write the gradients of :func:`deform_conv_forward` with respect to input and offset."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    grads = _backward(grad_output, *_arguments(input, weight, offset, None, None, geometry))
    grad_input.copy_(grads[0])
    grad_offset.copy_(grads[2])


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Add ``scale`` times the gradient with respect to the weight to ``grad_weight`` (O, C / group, kH, kW)."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    # the gradient by the weight does not depend on the weight's values, which mmcv does not hand over
    grads = _backward(grad_output, *_arguments(input, grad_weight, offset, None, None, geometry))
    grad_weight.add_(grads[1], alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """As :func:`deform_conv_forward`, each sample multiplied by ``mask`` (B, groups * kh * kw, H', W'), plus a bias (O,)."""
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    output.copy_(_forward(*_arguments(input, weight, offset, mask, bias if with_bias else None, geometry)))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Write all gradients of :func:`modulated_deform_conv_forward`; that of the bias only with one."""
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    grads = _backward(grad_output, *_arguments(input, weight, offset, mask, bias if with_bias else None, geometry))
    for buffer, grad in zip((grad_input, grad_weight, grad_offset, grad_mask), grads, strict=False):
        buffer.copy_(grad)
    if with_bias:
        grad_bias.copy_(grads[4])
