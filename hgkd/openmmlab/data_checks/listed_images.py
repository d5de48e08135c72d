"""Whether the images that a data set lists are there, can be opened, and have the size that is noted of them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from hgkd.errors import DataError, MissingFileError, abbreviate

MISSING_SHARE = 0.1
"""More of the training images may not be absent."""
UNREADABLE_SHARE = 0.5
"""More of the training images may not be unreadable: those are left out one by one, and counted."""
MAX_FILES = 30_000
"""Upper limit of files opened per data set (an evenly spaced sample)."""
_ORIENTATION = 274  # EXIF
_TURNED = (5, 6, 7, 8)  # a quarter: width and height change places

_Item = TypeVar("_Item")
_Seen = TypeVar("_Seen")


def check_images(file: Path, folder: Path, names: Sequence[str], name: str) -> list[str]:
    """Look for the images that ``file`` lists in ``folder``; what should be said, without being an error.

    Raises:
        FileNotFoundError: one of a validation or test is missing, or more than a tenth of a training's.
    """
    missing = sorted(absent(folder, names))
    if not missing:
        return []
    said = f"{name}: {len(missing)} of the {len(names)} images of {file} are not in {folder} ({abbreviate(missing, 3)})"
    said += why_absent(folder, missing[0])
    if name != "train_dataloader" or len(missing) > MISSING_SHARE * len(names):
        raise MissingFileError(
            "annotated-images-missing",
            f"{said}; set data_root, or the data set's data_prefix, to where they are, or take them out of the file",
        )
    return [f"{said}; training goes on without them"]


def check_readable(unreadable: Sequence[str], count: int, name: str) -> list[str]:
    """Judge the images that cannot be opened, of ``count``; what should be said, without being an error.

    Raises:
        DataError: one of a validation or test is among them, or more than half of a training's are.
    """
    if not unreadable:
        return []
    said = f"{name}: {len(unreadable)} of {count} images cannot be opened: cut off, or no images ({abbreviate(unreadable, 3)})"
    if name != "train_dataloader" or len(unreadable) > UNREADABLE_SHARE * count:
        raise DataError("annotated-images-unreadable", f"{said}; replace them, or take them out of the data set")
    return [f"{said}; training goes on without them"]


def absent(folder: Path, names: Iterable[str]) -> Iterator[str]:
    """The names that are no files below a folder."""
    listed: dict[str, set[str]] = {}  # one listing a folder: faster than a question a file, over a network above all
    for name in names:
        where, base = os.path.split(folder / name)
        if where not in listed:
            listed[where] = set(os.listdir(where)) if os.path.isdir(where) else set()
        if base not in listed[where]:
            yield name


def why_absent(folder: Path, name: str) -> str:
    """Part of a sentence about what is there instead of an absent file, or nothing."""
    if name.startswith("\ufeff"):
        return "; the list begins with a byte order mark (BOM), which is read with the name: save it as UTF-8 without one"
    reasons = [
        (name.strip(), "without the blanks around it"),
        (name.replace("\\", "/"), "with / for \\"),
        (os.path.splitext(name)[0], "without its last suffix, which the data set adds"),
        (re.split(r"[,;\s]", name.strip())[0], "without what follows its first comma or blank: a list has names alone"),
        (os.path.basename(name), "without its folders"),
    ]
    for other, reason in reasons:
        if other not in ("", name) and (folder / other).is_file():
            return f"; {other!r} is there, {reason}"
    where, base = os.path.split(folder / name)
    alike = [
        other
        for other in (os.listdir(where) if os.path.isdir(where) else [])
        if other != base and other.lower() == base.lower()
    ]
    return f"; {alike[0]!r} is there, in other upper and lower case" if alike else ""


def is_turned_upright(pipeline: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the images' EXIF orientation is applied, as it never is to labels."""
    load = next((step for step in pipeline if "color_type" in step), {})
    return load.get("color_type", "color") in ("color", "grayscale")


def is_opened_by_pillow(pipeline: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the images are read by what :class:`hgkd.openmmlab.images.LoadReadableImage` takes the place of."""
    return any(step.get("type") == "LoadImageFromFile" for step in pipeline)


def image_size(file: str | os.PathLike[str], upright: bool) -> tuple[int, int] | None:
    """Width and height of an image as it is read, by its header; None when it cannot be opened."""
    try:
        with Image.open(file) as image:
            # getexif would decode a PNG that has none
            turned = upright and "exif" in image.info and image.getexif().get(_ORIENTATION) in _TURNED
            return (image.height, image.width) if turned else image.size
    except Exception:  # Pillow's decoders raise all sorts of errors on damaged files
        return None


def look_at(items: Sequence[_Item], look: Callable[[_Item], _Seen]) -> Iterator[tuple[_Item, _Seen]]:
    """Look at files in several threads, at :data:`MAX_FILES` of them at most."""
    count = min(len(items), MAX_FILES)
    chosen = [items[i * len(items) // count] for i in range(count)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as workers:  # Pillow decodes without holding Python's lock
        yield from zip(chosen, workers.map(look, chosen), strict=True)
