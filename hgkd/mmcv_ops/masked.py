"""Masked convolution of one image (mmcv's MaskedConv2d; Guided Anchoring, arXiv 1901.03278): chosen output places only."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def masked_im2col_forward(
    features: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    data_col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Gather the receptive fields of M output places (stride 1, zero padding).

    Args:
        features: (1, C, H, W), float.
        mask_h_idx, mask_w_idx: (M,) int64, row and column of each place in the output.
        data_col: (C * kernel_h * kernel_w, M), filled in place.
    """
    padded = F.pad(features[0], (pad_w, pad_w, pad_h, pad_h))
    rows = mask_h_idx + torch.arange(kernel_h, device=features.device)[:, None, None]
    columns = mask_w_idx + torch.arange(kernel_w, device=features.device)[:, None]
    data_col.copy_(padded[:, rows, columns].flatten(0, 2))


def masked_col2im_forward(
    masked_output: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    output: Tensor,
    height: int,
    width: int,
    channels: int,
) -> None:
    """Write the results (C, M) of M places into ``output`` (1, C, height, width); other places stay as they are."""
    output[0, :, mask_h_idx, mask_w_idx] = masked_output
