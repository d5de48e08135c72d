"""Pooling of regions of interest, over torchvision's ``roi_align`` and ``roi_pool``.

RoIAlign: He et al., Mask R-CNN, arXiv 1703.06870. RoIPool: Girshick, Fast R-CNN, arXiv 1504.08083, with mmcv's bins: the edges
are not rounded before they are divided (torchvision rounds), which is why each bin is handed over as a region of its own.
RoIs are (K, 5): index of the image, x1 y1 x2 y2 in pixels of the image. Results are written into the buffers that mmcv lends.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hgkd.mmcv_ops.precision import at_least_float32

_MAX = 0  # mmcv's number for pool_mode='max'; 1 is 'avg'


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Mean or maximum of bilinear samples in each bin.

    Args:
        input: (B, C, H, W), float.
        output: (K, C, aligned_height, aligned_width), filled in place.
        argmax_y: as ``output`` for the maximum: which sample of the bin won, kept for the backward; empty for the mean.
        argmax_x: unused; mmcv's own operators keep a coordinate here.
        sampling_ratio: samples along each side of a bin; 0: one a pixel, ceil(size of the region / size of the output).
        aligned: shift by half a pixel, so that integer coordinates are the centres of pixels.
    """
    features, rois = at_least_float32(input), at_least_float32(rois)
    rois = rois.to(features.dtype)
    size = (aligned_height, aligned_width)
    if pool_mode != _MAX:
        output.copy_(torch.ops.torchvision.roi_align(features, rois, spatial_scale, *size, sampling_ratio, aligned))
        return
    for chosen, (rows, columns) in _sample_grids(rois, size, spatial_scale, sampling_ratio, aligned):
        # one sample a bin of a finer grid: the same points as rows x columns samples a bin
        fine = (size[0] * rows, size[1] * columns)
        samples = torch.ops.torchvision.roi_align(features, rois[chosen], spatial_scale, *fine, 1, aligned)
        bins = samples.view(-1, features.shape[1], size[0], rows, size[1], columns).transpose(3, 4).flatten(4)
        values, winners = bins.max(-1)
        output[chosen] = values.to(output.dtype)
        argmax_y[chosen] = winners.to(argmax_y.dtype)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of :func:`roi_align_forward` with respect to the features, added to ``grad_input`` (B, C, H, W)."""
    grad, rois = at_least_float32(grad_output), at_least_float32(rois)
    rois = rois.to(grad.dtype)
    size, shape = (aligned_height, aligned_width), grad_input.shape
    if pool_mode != _MAX:
        grad_input += torch.ops.torchvision._roi_align_backward(
            grad, rois, spatial_scale, *size, *shape, sampling_ratio, aligned
        )
        return
    for chosen, (rows, columns) in _sample_grids(rois, size, spatial_scale, sampling_ratio, aligned):
        fine = (size[0] * rows, size[1] * columns)
        samples = grad.new_zeros(*grad[chosen].shape, rows * columns)
        samples.scatter_(-1, argmax_y[chosen].long().unsqueeze(-1), grad[chosen].unsqueeze(-1))
        samples = samples.unflatten(-1, (rows, columns)).transpose(3, 4).reshape(*samples.shape[:2], *fine)
        grad_input += torch.ops.torchvision._roi_align_backward(samples, rois[chosen], spatial_scale, *fine, *shape, 1, aligned)


def _sample_grids(
    rois: Tensor, size: tuple[int, int], spatial_scale: float, sampling_ratio: int, aligned: bool
) -> list[tuple[Tensor, tuple[int, int]]]:
    """Regions that take the same number of samples: (K,) bool, and samples along the height and the width of a bin."""
    if sampling_ratio > 0:
        return [(torch.ones(len(rois), dtype=torch.bool, device=rois.device), (sampling_ratio, sampling_ratio))]
    sides = (rois[:, [4, 3]] - rois[:, [2, 1]]) * spatial_scale
    if not aligned:
        sides = sides.clamp(min=1)
    counts = torch.ceil(sides / sides.new_tensor(size)).long()
    # a region without area takes no sample and stays zero
    return [((counts == grid).all(1), (int(grid[0]), int(grid[1]))) for grid in counts.unique(dim=0) if bool((grid > 0).all())]


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Maximum of the pixels that each bin touches; a bin outside of the image gives 0.

    Args:
        input: (B, C, H, W), float.
        output: (K, C, pooled_height, pooled_width), filled in place.
        argmax: as ``output``, int32: place of the maximum in its plane (row * W + column), -1 for an empty bin.
    """
    features, rois = at_least_float32(input), at_least_float32(rois)
    height, width = features.shape[2:]
    top, bottom = _bin_edges(rois[:, 2], rois[:, 4], pooled_height, spatial_scale, height)
    left, right = _bin_edges(rois[:, 1], rois[:, 3], pooled_width, spatial_scale, width)
    # (K, pooled_height, pooled_width, 5): every bin as a region, last row and column included
    edges = [rois[:, :1], left, top, right - 1, bottom - 1]
    columns, rows = (slice(None), None, slice(None)), (slice(None), slice(None), None)
    views = [rows, columns, rows, columns, rows]
    bins = torch.stack(torch.broadcast_tensors(*(edge[view] for edge, view in zip(edges, views, strict=True))), -1)
    empty = ((bins[..., 3] < bins[..., 1]) | (bins[..., 4] < bins[..., 2]))[:, None]
    values, places = torch.ops.torchvision.roi_pool(features, bins.view(-1, 5).to(features.dtype), 1.0, 1, 1)
    shape = (len(rois), pooled_height, pooled_width, features.shape[1])
    output.copy_(values.view(shape).permute(0, 3, 1, 2).masked_fill(empty, 0))
    argmax.copy_(places.view(shape).permute(0, 3, 1, 2).masked_fill(empty, -1))


def _bin_edges(start: Tensor, end: Tensor, bins: int, spatial_scale: float, limit: int) -> tuple[Tensor, Tensor]:
    """First place and the one after the last, (K, bins) each, of the bins along one side; empty for a side without length."""
    start, end = start * spatial_scale, (end + 1) * spatial_scale
    step = torch.arange(bins, device=start.device)
    size = ((end - start) / bins)[:, None]
    low = (step * size + start[:, None]).floor().clamp(0, limit)
    high = ((step + 1) * size + start[:, None]).ceil().clamp(0, limit)
    return low, torch.where(size > 0, high, low)


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Gradient of :func:`roi_pool_forward` with respect to the features, added to ``grad_input`` (B, C, H, W)."""
    grad = at_least_float32(grad_output)
    size = (pooled_height, pooled_width)
    grad_input += torch.ops.torchvision._roi_pool_backward(
        grad, rois.to(grad.dtype), argmax, spatial_scale, *size, *grad_input.shape
    )
