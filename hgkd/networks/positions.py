"""Absolute positions of a ViT, for another grid of patches.

Fixed sin-cos positions (MAE's) are computed for the new grid, learned ones (DINOv2's, CLIP's, DeiT's ...) are resampled. The
reason: fixed ones are a function of row and column, which the blocks were trained with at steps of one patch. Computed, two
neighbours stay one step apart; resampled, the steps would be as many times wider or narrower as the grid is smaller or larger.
Learned ones are known at the places of their own grid only.
"""

from __future__ import annotations

import torch
from mmengine.logging import print_log
from timm.layers import resample_abs_pos_embed
from torch import Tensor

_TOLERANCE = 1e-3  # fp16 files round by 5e-4


def sincos_positions(width: int, grid: tuple[int, int], class_token: bool = True) -> Tensor:
    """Fixed positions (1, [1 +] gh*gw, width): for each place sin and cos of the column, then of the row.

    Frequencies are 10000^(-4i/width), i = 0 ... width/4 - 1; the class token gets zeros.
    """
    rate = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    parts = []
    for coordinate in (columns, rows):
        angle = coordinate.flatten()[:, None] * rate
        parts += [angle.sin(), angle.cos()]
    table = torch.cat(parts, 1).float()[None]
    return torch.cat([table.new_zeros(1, 1, width), table], 1) if class_token else table


def follow_sincos(positions: Tensor, grid: tuple[int, int], prefix: int) -> bool:
    """Whether positions (1, prefix + gh*gw, D) are :func:`sincos_positions` for the patches, whatever the first ones are."""
    width = positions.shape[2]
    if width % 4 or positions.shape[1] != prefix + grid[0] * grid[1]:
        return False
    expected = sincos_positions(width, grid, class_token=False).to(positions.device)
    return torch.allclose(positions[:, prefix:].float(), expected, rtol=0, atol=_TOLERANCE)


def positions_for(
    grid: tuple[int, int], positions: Tensor, native: tuple[int, int], prefix: int, name: str = "pos_embed"
) -> Tensor:
    """Positions for another grid, see the module's header; as they are for their own.

    Args:
        grid: patches (rows, columns) that are wanted.
        positions: fp32 (1, prefix + n, D), for the grid ``native`` of n patches.
        prefix: how many of them are of other tokens; they stay.
        name: for the log.

    Returns:
        (1, prefix + gh*gw, D), fp32.
    """
    if grid == native:
        return positions
    fixed = follow_sincos(positions, native, prefix)
    print_log(f"{name} {'computed' if fixed else 'resampled'} for {grid} patches, from {native}", "current")
    if not fixed:
        return resample_abs_pos_embed(positions, list(grid), list(native), num_prefix_tokens=prefix)
    patches = sincos_positions(positions.shape[2], grid, class_token=False).to(positions.device)
    return torch.cat([positions[:, :prefix], patches], 1)
