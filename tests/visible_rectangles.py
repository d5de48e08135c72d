"""Masks that show one rectangle of cells in each image, and what they show."""

import torch
from torch import Tensor


def rectangles(rows: int, columns: int, grid: tuple[int, int], *corners: tuple[int, int]) -> Tensor:
    """Masks with ``rows`` x ``columns`` visible cells at these (top, left) cells: bool (len(corners), *grid)."""
    visible = torch.zeros(len(corners), *grid, dtype=torch.bool)
    for image, (top, left) in zip(visible, corners, strict=True):
        image[top : top + rows, left : left + columns] = True
    return visible


def crops_of(maps: Tensor, visible: Tensor) -> Tensor:
    """The places of a map (B, C, H, W) that lie in each image's rectangle of ``visible`` (B, h, w)."""
    height, width = maps.shape[2] // visible.shape[1], maps.shape[3] // visible.shape[2]
    crops = []
    for image, shown in zip(maps, visible, strict=True):
        places = shown.nonzero()
        (top, left), (bottom, right) = places[0].tolist(), (places[-1] + 1).tolist()
        crops.append(image[:, top * height : bottom * height, left * width : right * width])
    return torch.stack(crops)
