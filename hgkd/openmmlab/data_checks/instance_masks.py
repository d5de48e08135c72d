"""Checks of objects' masks in COCO's format: polygons, or runs of pixels (RLE).

pycocotools draws what it gets: a coordinate that is not a number takes all memory, runs that do not cover the image are read
from memory that is not theirs, a list of four numbers is a box.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

FAR = 10
"""So many times the longer side of its image a polygon may reach, drawing takes memory by its length."""


def is_number(value: object) -> bool:
    """Whether a value of a JSON file is a finite number."""
    try:
        return isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # a whole number of more than 308 digits
        return False


def mask_problem(mask: object, image: Mapping[str, Any]) -> str | None:
    """Problem of an annotation's ``segmentation``, to be read after its name, or None.

    Args:
        mask: as the file has it.
        image: its entry of the file, with ``height`` and ``width``.
    """
    if not mask:
        return "has no 'segmentation', but the config reads masks; add polygons or RLE, or use a detector of boxes"
    if isinstance(mask, Mapping):
        return _rle_problem(mask, [image["height"], image["width"]])
    if not isinstance(mask, list):
        return f"has segmentation={_short(mask)}, needed is a list of polygons, or RLE with size and counts"
    if all(map(is_number, mask)):
        return f"has a flat list as its mask ({_short(mask)}), needed is a list of polygons: [[x1, y1, x2, y2, x3, y3, ...]]"
    reach = FAR * max(image["height"], image["width"])
    return next(filter(None, (_polygon_problem(polygon, reach) for polygon in mask)), None)


def _polygon_problem(polygon: object, reach: float) -> str | None:
    needed = "needed are the x and y of three corners or more: x1, y1, x2, y2, x3, y3"
    if not isinstance(polygon, list):
        return f"has {_short(polygon)} as a polygon, {needed}"
    try:
        finite = math.isfinite(sum(polygon))  # fast: files hold millions of coordinates
    except (TypeError, OverflowError):
        finite = False
    if not finite:
        wrong = next((value for value in polygon if not is_number(value)), polygon)
        return f"has {_short(wrong)} in a polygon, {needed}, all of them numbers"
    if len(polygon) < 6 or len(polygon) % 2:
        return f"has a polygon of {len(polygon)} numbers ({_short(polygon)}), {needed}"
    if max(polygon) > reach or min(polygon) < -reach:
        return f"has a polygon that reaches to {max(polygon, key=abs):g}, far outside its image; needed are pixels of the image"
    return None


def _rle_problem(mask: Mapping[str, Any], size: list[Any]) -> str | None:
    if mask.get("size") is None or mask.get("counts") is None:
        return f"has a mask (RLE) with {_short(sorted(mask))}, needed are 'size' (height, width) and 'counts'"
    if not isinstance(mask["size"], list) or mask["size"] != size:
        return f"has a mask (RLE) of size {mask['size']}, but its image has height and width {size}"
    runs = _runs(mask["counts"])
    if runs is None or min(runs, default=0) < 0:
        return f"has a mask (RLE) with counts={_short(mask['counts'])}, needed are run lengths: a list, or COCO's text form"
    if sum(runs) != size[0] * size[1]:
        return f"has a mask (RLE) of {sum(runs)} pixels, but its image has {size[0]} x {size[1]} = {size[0] * size[1]}"
    return None


def _runs(counts: object) -> Sequence[int] | None:
    """Run lengths of a mask, or None where there are none.

    COCO's text form has five bits a character, from '0' on, the lowest first; a sixth says that more follow. From the fourth
    run on the difference to the last but one is written.
    """
    if isinstance(counts, list):
        return counts if all(is_number(run) and run == int(run) for run in counts) else None
    if not isinstance(counts, str):
        return None
    runs: list[int] = []
    value = bits = 0
    for character in counts:
        code = ord(character) - 48
        if not 0 <= code < 64:
            return None
        value |= (code & 31) << bits
        bits += 5
        if code & 32:
            continue
        if code & 16:  # negative
            value -= 1 << bits
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = bits = 0
    return runs if not bits else None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
