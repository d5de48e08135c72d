"""Predictions drawn on their picture: labels, boxes with scores, label maps."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_GOLDEN = 0.618034  # of the colour circle: hues of following classes lie far apart, however many there are
_OPACITY = 0.55


def class_colour(index: int) -> tuple[int, int, int]:
    """A colour for a class, the same everywhere."""
    red, green, blue = colorsys.hsv_to_rgb(index * _GOLDEN % 1.0, 0.85, 0.95 if index % 2 else 0.75)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_lines(picture: Image.Image, lines: Sequence[str]) -> Image.Image:
    """A copy with lines of text in its upper left corner, on a dark ground."""
    made = picture.copy()
    _write(ImageDraw.Draw(made), (0, 0), "\n".join(lines), _font(made), (0, 0, 0))
    return made


def draw_boxes(picture: Image.Image, objects: Sequence[Mapping[str, Any]]) -> Image.Image:
    """A copy with boxes, the best last and so on top.

    Args:
        objects: each with 'box' (left, top, right, bottom in pixels), 'label', 'class' (its number) and 'score'.
    """
    made = picture.copy()
    draw, font = ImageDraw.Draw(made), _font(made)
    for found in sorted(objects, key=lambda item: float(item["score"])):
        left, top, right, bottom = (float(value) for value in found["box"])
        colour = class_colour(int(found["class"]))
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=max(1, min(made.size) // 200))
        _write(draw, (left, top), f"{found['label']} {found['score']:.2f}", font, colour)
    return made


def draw_label_map(
    picture: Image.Image, labels: NDArray[np.integer[Any]], names: Mapping[int, str], outside: int
) -> Image.Image:
    """A copy under the colours of its classes, with their names.

    Args:
        labels: (H, W), of the picture's size.
        names: class -> its name, of the classes that are told.
        outside: label of places that are left as they are.
    """
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    table = np.zeros((int(labels.max()) + 1, 3), dtype=np.float32)
    for index in np.bincount(labels.ravel()).nonzero()[0].tolist():  # of the classes in the picture, not of 65535
        table[index] = class_colour(index)
    colours = table[labels]
    share = np.where(labels == outside, 0.0, _OPACITY)[..., None]
    made = Image.fromarray((pixels * (1 - share) + colours * share).round().astype(np.uint8))
    draw, font = ImageDraw.Draw(made), _font(made)
    top = 0.0
    for index, name in names.items():
        top = _write(draw, (0, top), name, font, class_colour(index))
    return made


def _font(picture: Image.Image) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(max(10, min(picture.size) // 24))


def _write(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    ground: tuple[int, int, int],
) -> float:
    """Text on a ground of its own; returns where it ends below."""
    left, _, right, bottom = draw.textbbox(place, text, font=font)
    draw.rectangle((left - 1, place[1], right + 1, bottom + 1), fill=ground)
    light = sum(ground) > 380
    draw.text(place, text, font=font, fill=(0, 0, 0) if light else (255, 255, 255))
    return float(bottom) + 2
