"""Distances between token maps that several objectives share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hgkd.errors import InvalidValueError


def layer_norm0(tokens: Tensor, eps: float = 1e-6) -> Tensor:
    """Layer normalisation over the channel axis without affine parameters, in fp32: (B, D, h, w) -> (B, D, h, w)."""
    last = tokens.float().permute(0, 2, 3, 1)  # of a teacher's maps a view: one pass, where the means would take five
    return F.layer_norm(last, last.shape[-1:], eps=eps).permute(0, 3, 1, 2)


def smooth_l1_by_position(prediction: Tensor, target: Tensor, beta: float = 2.0) -> Tensor:
    """Smooth L1 averaged over channels, in fp32: two maps (B, D, h, w) -> (B, h, w).

    0.5 d^2 / beta where |d| < beta, |d| - beta / 2 elsewhere.

    Raises:
        ValueError: the shapes differ (they would broadcast silently).
    """
    if prediction.shape != target.shape:
        raise InvalidValueError(
            "shapes-differ", f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape"
        )
    return F.smooth_l1_loss(prediction.float(), target.float(), beta=beta, reduction="none").mean(dim=1)
