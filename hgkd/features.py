"""Numbers that describe a set of features: statistics of the channels, spread, effective rank."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hgkd.errors import InvalidValueError


def channel_statistics(bank: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and std (C,) of features (N, C); channels that never change get std 1, so they become 0."""
    mean = bank.mean(dim=0)
    std = bank.std(dim=0, unbiased=False)
    constant = std <= 1e-6 * bank.abs().amax(dim=0).clamp_min(1e-30)  # rounding leaves a little of a constant channel
    return mean, torch.where(constant, torch.ones_like(std), std)


def _check_finite(what: str, features: Tensor) -> None:
    broken = int((~torch.isfinite(features)).any(dim=1).sum())
    if broken:
        raise InvalidValueError(
            "features-not-finite",
            f"{broken} of {len(features)} {what} features hold NaN or infinity, so they have no neighbours; "
            "the network has diverged or its weights are damaged",
        )


def feature_spread(features: Tensor) -> float:
    """How far features (N, C) of length 1 differ from one another: 0 = all the same, 1 = every direction alike.

    It is sqrt(C) times the mean over channels of the std over images, so it does not depend on scale or width.

    Raises:
        ValueError: a feature is NaN or infinite.
    """
    _check_finite("image", features)
    unit = F.normalize(features.double(), dim=1)
    return unit.std(dim=0, unbiased=False).mean().item() * features.shape[1] ** 0.5


def effective_rank(matrix: Tensor) -> float:
    """exp(entropy of the singular values divided by their sum) of a matrix (N, C): 1 .. min(N, C); 0 for a zero matrix.

    Nothing is subtracted: centre features first when their mean should not count as a direction.

    Raises:
        ValueError: a feature is NaN or infinite: its rank would be counted as 0.
    """
    _check_finite("image", matrix)
    small = matrix.double() if matrix.shape[0] >= matrix.shape[1] else matrix.double().T
    squared = torch.linalg.eigvalsh(small.T @ small).clamp_min(0)
    # eigenvalues carry an error of about machine precision of the largest: below that they are zero
    squared = squared[squared > squared.max() * torch.finfo(torch.float64).eps * len(squared)]
    if squared.numel() == 0:
        return 0.0
    share = squared.sqrt() / squared.sqrt().sum()
    return torch.exp(-(share * share.log()).sum()).item()
