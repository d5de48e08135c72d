"""Pictures at the size that an exported graph takes, and its places back on the picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from hgkd.data.transforms import CentreCropToSize, PILToTensor
from hgkd.pixels import to_unit_range
from hgkd.weights.signature import Signature


def outside_label(classes: int) -> int:
    """Label, in a map of so many classes (0: unknown), of places beyond a crop, which the graph has not seen."""
    return 255 if classes <= 255 else 65535


@dataclass(frozen=True)
class Placed:
    """A picture as the input of a graph: a place x of the picture is ``x * scale - offset`` of the input.

    Attributes:
        images: float (1, C, H, W) in [0, 1].
        size: (H, W) of the picture.
        scale, offset: (vertical, horizontal); offset in pixels of the input.
    """

    images: Tensor
    size: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[float, float]

    def boxes(self, boxes: Tensor) -> Tensor:
        """Boxes (N, 4: left, top, right, bottom) in pixels of the input -> of the picture, cut at its border."""
        scale, offset = (torch.tensor([pair[1], pair[0]] * 2) for pair in (self.scale, self.offset))
        height, width = self.size
        return ((boxes.float() + offset) / scale).clamp(min=0).minimum(torch.tensor([width, height] * 2))

    def label_map(self, labels: Tensor, outside: int = 255) -> Tensor:
        """A map (h, w) of the input -> (H, W) of the picture, int64, nearest; ``outside`` where it ends."""
        places, inside = [], []
        for side, scale, offset, within, pixels in zip(
            self.size, self.scale, self.offset, labels.shape, self.images.shape[-2:], strict=True
        ):
            at = ((torch.arange(side) + 0.5) * scale - offset) * within / pixels  # a map may be coarser than its input
            inside.append((at >= 0) & (at < within))
            places.append(at.long().clamp(0, within - 1))
        found = labels.long()[places[0]][:, places[1]]
        return torch.where(inside[0][:, None] & inside[1], found, outside)


def place(pixels: Image.Image | Tensor, signature: Signature) -> Placed:
    """A picture at a size that a graph takes, by the way of resizing in its record.

    For a graph of free sides what is kept whole may lie or stand, as OpenMMLab's ``Resize`` has it, and beyond what the record
    asks for only as much is filled in as the graph needs.

    Args:
        pixels: PIL's 8-bit RGB, or float (C, H, W) in [0, 1].
    """
    expected = signature.input
    height, width = v2.functional.get_size(pixels)
    target = expected.height or expected.size[0], expected.width or expected.size[1]
    if expected.resize == "crop":
        return _cropped(pixels, (height, width), target)
    free = expected.height is None and expected.width is None
    resized = _resized((height, width), target, expected.resize, free)
    filled = {"pad": (max(resized[0], target[0]), max(resized[1], target[1])), "square": (max(resized),) * 2}
    target = filled.get(expected.resize, resized)
    if free:
        target = _up(max(expected.least, target[0]), expected.multiple), _up(max(expected.least, target[1]), expected.multiple)
    # as OpenCV resizes for OpenMMLab: no smoothing
    values = PILToTensor()(pixels)
    images = v2.functional.resize(values, list(resized), interpolation=v2.InterpolationMode.BILINEAR, antialias=False)
    images = to_unit_range(images)
    if resized != target:
        canvas = images.new_full((images.shape[0], *target), expected.pad)
        canvas[:, : resized[0], : resized[1]] = images
        images = canvas
    scale = resized[0] / height, resized[1] / width
    return Placed(images[None], (height, width), scale, (0.0, 0.0))


def _resized(size: tuple[int, int], box: tuple[int, int], how: str, free: bool) -> tuple[int, int]:
    """Sides of a picture after its resizing, before it is filled up; rounded as OpenMMLab does."""
    if how == "keep":
        return size
    if how == "stretch":
        return box
    if free and (size[0] > size[1]) != (box[0] > box[1]):
        box = box[1], box[0]
    ratio = min(box[0] / size[0], box[1] / size[1])
    return max(1, int(size[0] * ratio + 0.5)), max(1, int(size[1] * ratio + 0.5))


def _up(side: int, step: int) -> int:
    return -(-side // step) * step


def _cropped(pixels: Image.Image | Tensor, size: tuple[int, int], target: tuple[int, int]) -> Placed:
    crop = CentreCropToSize(target, 1.0)
    images = to_unit_range(PILToTensor()(crop(pixels)))
    (top, left), resized, before = crop.places(*size)
    scale = resized[0] / before[0], resized[1] / before[1]
    # what is cut off before resizing, only of long strips, and after it
    cut = [round((after - kept) / 2.0) for after, kept in zip(resized, target, strict=True)]
    return Placed(images[None], size, scale, (top * scale[0] + cut[0], left * scale[1] + cut[1]))
