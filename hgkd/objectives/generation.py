"""MGD's loss: a small generator restores a masked feature map (formula: :mod:`hgkd.objectives.masked.mgd`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hgkd.errors import InvalidValueError

MASKS = ("channel", "position")
REDUCTIONS = ("sum", "mean")


def draw_visible(feature: Tensor, mask: str, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """Draw which part of a map (N, C, H, W) is visible: bool (N, C, 1, 1) for 'channel', (N, 1, H, W) for 'position'.

    Each entry is hidden with probability ``ratio``, independently.
    """
    count, channels, height, width = feature.shape
    shape = (count, channels, 1, 1) if mask == "channel" else (count, 1, height, width)
    return torch.rand(shape, device=feature.device, generator=generator) >= ratio


def error_by_position(restored: Tensor, teacher: Tensor, reduction: str) -> Tensor:
    """Squared error, fp32, summed or averaged over channels: two maps (N, C, H, W) -> (N, H, W).

    Raises:
        ValueError: the shapes differ (they would broadcast silently).
    """
    if restored.shape != teacher.shape:
        raise InvalidValueError(
            "shapes-differ",
            f"restored {tuple(restored.shape)} and teacher's {tuple(teacher.shape)} feature map differ in shape",
        )
    squares = (restored.float() - teacher.float()).square()
    return squares.sum(dim=1) if reduction == "sum" else squares.mean(dim=1)


class MGDLoss(nn.Module):
    """MGD between two feature maps.

    Args:
        student_channels, teacher_channels: of the two maps.
        mask: 'channel' (classification) or 'position' (detection, segmentation).
        ratio: share of hidden channels or positions, in [0, 1).
        alpha: weight of the loss.
        reduction: 'sum' over an image, as published, or 'mean'.

    Raises:
        ValueError: an unknown mask or reduction, or a ratio out of range.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        mask: str = "channel",
        ratio: float = 0.15,
        alpha: float = 7e-5,
        reduction: str = "sum",
    ) -> None:
        super().__init__()
        if mask not in MASKS:
            raise InvalidValueError(
                "generation-mask-unknown", f"mask must be one of {', '.join(map(repr, MASKS))}, got {mask!r}"
            )
        if reduction not in REDUCTIONS:
            raise InvalidValueError(
                "reduction-unknown", f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}"
            )
        if not 0.0 <= ratio < 1.0:
            raise InvalidValueError(
                "hidden-ratio-out-of-range", f"ratio is the share that is hidden and must be in [0, 1), got {ratio}"
            )
        if reduction == "mean" and alpha < 1e-2:
            raise InvalidValueError(
                "alpha-of-sum", f"alpha {alpha} is for reduction='sum'; with 'mean', which is near 1, use 1.0"
            )
        self.mask = mask
        self.ratio = ratio
        self.alpha = alpha
        self.reduction = reduction
        differ = student_channels != teacher_channels
        self.align = nn.Conv2d(student_channels, teacher_channels, 1) if differ else nn.Identity()
        self.generation = nn.Sequential(
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
        )

    def restore(self, student: Tensor) -> Tensor:
        """The teacher's map as generated from the masked student's: (N, C, H, W) -> (N, C', H, W)."""
        aligned = self.align(student)
        restored: Tensor = self.generation(aligned * draw_visible(aligned, self.mask, self.ratio))
        return restored

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss, an fp32 scalar; no gradient reaches the teacher.

        Args:
            student: (N, C, H, W).
            teacher: (N, C', H, W).
        """
        values = error_by_position(self.restore(student), teacher.detach(), self.reduction)
        return self.alpha * values.sum() / (len(values) if self.reduction == "sum" else values.numel())

    def extra_repr(self) -> str:
        return f"mask={self.mask!r}, ratio={self.ratio}, alpha={self.alpha}, reduction={self.reduction!r}"
