"""Whether boxes lie in their images as they are read: x, y, width, height in pixels.

Boxes of another order are numbers, too, and mmdet trains on them. What tells them is that many leave their images, and would
not if they were read in another way; or the areas that the file gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

SLACK = 2
"""Pixels by which a box may leave its image: rounding, and numbers that begin at 1."""
_CORNERS = "x1, y1, x2, y2"
_CENTRE = "x and y of the centre, width, height"


@dataclass
class Places:
    """How the boxes of a file lie in their images.

    Attributes:
        total: boxes looked at.
        leaving: those that leave their image.
        misfits: those that would not fit if they were read in another way, by its name.
        areas: those whose ``area`` is that of corners, and not width * height.
        example: the first one that leaves its image.
    """

    total: int = 0
    leaving: int = 0
    misfits: dict[str, int] = field(default_factory=lambda: dict.fromkeys((_CORNERS, _CENTRE), 0))
    areas: int = 0
    example: str = ""

    def add(self, annotation: Mapping[str, Any], image: Mapping[str, Any]) -> None:
        """Count a box, of four numbers."""
        box, size = annotation["bbox"], (image["width"], image["height"])
        left, top, width, height = box  # or left, top, right, bottom
        self.total += 1
        if not _fits(left, top, left + width, top + height, size):
            self.leaving += 1
            told = f"annotation {annotation['id']!r} has bbox={box} in an image of {size[0]} x {size[1]}"
            self.example = self.example or told
        self.misfits[_CORNERS] += not _fits(left, top, width, height, size)
        self.misfits[_CENTRE] += not _fits(left - width / 2, top - height / 2, left + width / 2, top + height / 2, size)
        area, corners = annotation["area"], max(width - left, 0) * max(height - top, 0)
        self.areas += _equal(area, corners) and not _equal(area, width * height)

    def problem(self) -> str | None:
        """Why the boxes cannot be what they are read as, or None."""
        if 2 * self.areas > self.total:
            return (
                f"the area of {self.areas} of {self.total} boxes is not width * height, but what it would be if bbox was "
                f"{_CORNERS}. Write x, y, width, height"
            )
        if self.leaving < 3 or 10 * self.leaving < self.total:
            return None
        told = f"{self.leaving} of {self.total} boxes leave their image by more than {SLACK} pixels ({self.example})"
        clip = "if objects do reach out of their images, clip the boxes to them"
        for reading, misfits in self.misfits.items():
            if 20 * misfits <= self.leaving:
                return f"{told}; read as {reading} they fit. Write x, y, width, height; {clip}"
        if 2 * self.leaving > self.total:
            return f"{told}. Write x, y, width, height in pixels of the image as it is; {clip}"
        return None

    def remarks(self) -> list[str]:
        """Remarks about boxes that leave their images."""
        if not self.leaving:
            return []
        return [f"{self.leaving} of {self.total} boxes leave their image by more than {SLACK} pixels ({self.example})"]


def _fits(left: float, top: float, right: float, bottom: float, size: Sequence[float]) -> bool:
    return -SLACK <= left <= right <= size[0] + SLACK and -SLACK <= top <= bottom <= size[1] + SLACK


def _equal(area: float, other: float) -> bool:
    return other > 0 and abs(area - other) <= 0.01 * other + 1
