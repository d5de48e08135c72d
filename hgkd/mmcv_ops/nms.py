"""Non-maximum suppression: torchvision's compiled one, and soft-NMS (Bodla et al., ICCV 2017, arXiv 1704.04503) in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from hgkd.mmcv_ops.precision import at_least_float32

_NAIVE, _LINEAR, _GAUSSIAN = range(3)  # mmcv's numbers for the methods of soft-NMS


def _grown(boxes: Tensor, offset: int) -> Tensor:
    """Boxes whose plain width is mmcv's ``x2 - x1 + offset``: intersections and areas grow by the same rule."""
    return boxes + boxes.new_tensor([0, 0, offset, offset])


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Greedy NMS: a box is dropped when its IoU with a kept box of a higher score is above the threshold.

    Args:
        boxes: (N, 4), x1 y1 x2 y2 in pixels, float.
        scores: (N,), float.
        iou_threshold: in [0, 1].
        offset: 0, or 1 when x2 and y2 are the last pixel inside the box.

    Returns:
        (K,) int64, indices of the kept boxes, best score first; of equal scores the lower index.
    """
    boxes = at_least_float32(boxes)
    return torch.ops.torchvision.nms(_grown(boxes, offset), scores.to(boxes), iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Soft-NMS: the best box is taken, the scores of the others decay by their IoU with it, and so on.

    The decay is 1 - IoU from the threshold on (linear), exp(-IoU^2 / sigma) (gaussian), or 0 from the threshold on (naive). A
    box whose score falls below ``min_score`` is dropped; the very best box is always kept, as in mmcv. Of equal scores the
    lower index goes first. Two boxes without area have IoU 0 here (0/0 in mmcv).

    Args:
        boxes: (N, 4), x1 y1 x2 y2 in pixels, float, on the CPU.
        scores: (N,), float.
        dets: (N, 5), filled in place: the first K rows become box and decayed score, in the order of taking.
        method: 0 naive, 1 linear, 2 gaussian.
        offset: 0, or 1 when x2 and y2 are the last pixel inside the box.

    Returns:
        (K,) int64, indices of the boxes in ``dets``.
    """
    grown = _grown(at_least_float32(boxes), offset)
    areas = (grown[:, 2:] - grown[:, :2]).prod(1)
    left = torch.arange(len(boxes), device=boxes.device)
    scores = at_least_float32(scores).clone()
    order: list[int] = []
    while len(left):
        best = int(left[scores[left].argmax()])
        dets[len(order), :4] = boxes[best]
        dets[len(order), 4] = scores[best]
        order.append(best)
        left = left[left != best]
        low = torch.maximum(grown[left, :2], grown[best, :2])
        high = torch.minimum(grown[left, 2:], grown[best, 2:])
        intersection = (high - low).clamp(min=0).prod(1)
        iou = (intersection / (areas[left] + areas[best] - intersection)).nan_to_num(0.0)
        if method == _GAUSSIAN:
            decay = torch.exp(-(iou**2) / sigma)
        else:
            decay = torch.where(iou >= iou_threshold, 1 - iou if method == _LINEAR else torch.zeros_like(iou), 1.0)
        scores[left] *= decay
        left = left[scores[left] >= min_score]
    return torch.tensor(order, dtype=torch.long, device=boxes.device)
