"""Focal loss (Lin et al., RetinaNet, ICCV 2017, arXiv 1708.02002, eq. 5), sigmoid and softmax, with gradients in closed form.

Not :func:`torchvision.ops.sigmoid_focal_loss`: mmcv's takes class indices and class weights, and asks for the gradient apart.
Unlike mmcv's compiled operators, logarithms are taken of the logits, so that nothing is clipped for large ones, and the class
weight of a target without a class is 1 (mmcv reads beyond the weights there). Half precision is computed in float32
and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hgkd.mmcv_ops.precision import at_least_float32


def _row_weights(target: Tensor, weight: Tensor) -> Tensor:
    """(N,): the class weight of every row's target; 1 without weights and for targets outside of the classes."""
    if weight.numel() == 0:
        return weight.new_ones(len(target))
    known = (target >= 0) & (target < len(weight))
    return torch.where(known, weight[target.where(known, 0)], 1.0)


def _positives(input: Tensor, target: Tensor) -> Tensor:
    """(N, C) bool, True where the column is the row's class; a row of another number (background) has none."""
    return target[:, None] == torch.arange(input.shape[1], device=input.device)


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """-alpha (1-p)^gamma log p for the row's class, -(1-alpha) p^gamma log(1-p) for every other one, p = sigmoid(input).

    Args:
        input: (N, C) logits, float.
        target: (N,) int64, class of the row; C (or any other number) is background.
        weight: (C,) class weights, applied to whole rows by their target, or empty.
        output: (N, C), filled in place.
    """
    input, weight = at_least_float32(input), at_least_float32(weight)
    p, log_p, log_q = input.sigmoid(), F.logsigmoid(input), F.logsigmoid(-input)
    loss = torch.where(_positives(input, target), -alpha * (1 - p) ** gamma * log_p, (alpha - 1) * p**gamma * log_q)
    output.copy_(loss * _row_weights(target, weight)[:, None])


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Derivative of :func:`sigmoid_focal_loss_forward` by its logits, written into ``grad_input`` (N, C)."""
    input, weight = at_least_float32(input), at_least_float32(weight)
    p, log_p, log_q = input.sigmoid(), F.logsigmoid(input), F.logsigmoid(-input)
    positive = -alpha * (1 - p) ** gamma * (1 - p - gamma * p * log_p)
    negative = (1 - alpha) * p**gamma * (p - gamma * (1 - p) * log_q)
    grad = torch.where(_positives(input, target), positive, negative)
    grad_input.copy_(grad * _row_weights(target, weight)[:, None])


def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """-alpha (1-p)^gamma log p, p = probability of the row's class; 0 for a negative target (ignored).

    Args:
        input: (N, C) probabilities (mmcv hands over the softmax), float.
        target: (N,) int64, class of the row in 0..C-1, or negative.
        weight: (C,) class weights, or empty.
        output: (N,), filled in place.
    """
    input, weight = at_least_float32(input), at_least_float32(weight)
    p, log_p = _own_probability(input, target)
    output.copy_(torch.where(target >= 0, -alpha * (1 - p) ** gamma * log_p * _row_weights(target, weight), 0.0))


def softmax_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, buff: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Derivative of :func:`softmax_focal_loss_forward` by the *logits*, written into ``grad_input`` (N, C).

    ``buff`` (N,) is filled with p times the derivative by the row's own probability.
    """
    input, weight = at_least_float32(input), at_least_float32(weight)
    p, log_p = _own_probability(input, target)
    q = (1 - p).clamp(min=torch.finfo(p.dtype).tiny)  # so that 0 * inf does not arise for a certain row and gamma < 1
    slope = alpha * (gamma * q ** (gamma - 1) * p * log_p - (1 - p) ** gamma) * _row_weights(target, weight)
    slope = torch.where(target >= 0, slope, 0.0)
    buff.copy_(slope)
    grad_input.copy_(slope[:, None] * (_positives(input, target).to(input.dtype) - input))


def _own_probability(probabilities: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) probability of each row's class (of class 0 for an ignored row) and its logarithm, finite for probability 0."""
    p = probabilities.gather(1, target.clamp(min=0)[:, None])[:, 0]
    return p, p.clamp(min=torch.finfo(p.dtype).tiny).log()
