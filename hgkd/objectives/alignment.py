"""What brings a student's feature map to a teacher's: grid, channels, block indices."""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

PROJECTORS = ("linear", "mlp")


class DecodingStudent(Protocol):
    """What objectives read of a student: channels of its levels and of its decoder's output, pixels per place and per cell."""

    feature_channels: tuple[int, ...]
    decoded_channels: int
    out_stride: int
    cell: int


def fit_grid(feature: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map (B, C, H, W) on another grid, (B, C, gh, gw).

    Averages the places that fall together when (H, W) is a whole multiple of the grid, else interpolates bilinearly.
    """
    height, width = feature.shape[-2:]
    if (height, width) == grid:
        return feature
    if height % grid[0] == 0 and width % grid[1] == 0:
        return F.avg_pool2d(feature, (height // grid[0], width // grid[1]))
    return F.interpolate(feature, size=grid, mode="bilinear", align_corners=False)


def build_projector(kind: str, in_channels: int, out_channels: int) -> nn.Module:
    """A place-wise map of channels: 'linear' (one 1x1 convolution) or 'mlp' (1x1, GELU, 1x1, as wide as its output)."""
    if kind == "linear":
        return nn.Conv2d(in_channels, out_channels, 1)
    if kind == "mlp":
        return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1), nn.GELU(), nn.Conv2d(out_channels, out_channels, 1))
    raise ValueError(f"projector must be one of {', '.join(map(repr, PROJECTORS))}, got {kind!r}")


def resolve_block(block: int, depth: int, what: str = "block") -> int:
    """The index in [0, depth) of a block; negative ones count from the end (-1 = last).

    Raises:
        ValueError: out of range; the message names the depth.
    """
    if not -depth <= block < depth:
        raise ValueError(
            f"{what} {block} is out of range: the teacher has depth {depth}, so {what} is in [0, {depth - 1}] "
            f"or, counted from the end, in [-{depth}, -1]"
        )
    return block % depth
