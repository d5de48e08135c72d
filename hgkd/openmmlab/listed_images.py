"""Whether the images that a data set lists are there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

MISSING_SHARE = 0.1
"""More of the training images may not be absent."""


def check_images(file: Path, folder: Path, names: Sequence[str], name: str) -> list[str]:
    """Look for the images that ``file`` lists in ``folder``; what should be said, without being an error.

    Raises:
        FileNotFoundError: one of a validation or test is missing, or more than a tenth of a training's.
    """
    missing = sorted(absent(folder, names))
    if not missing:
        return []
    said = f"{name}: {len(missing)} of the {len(names)} images of {file} are not in {folder} ({few(missing, 3)})"
    if name != "train_dataloader" or len(missing) > MISSING_SHARE * len(names):
        raise FileNotFoundError(
            f"{said}; set data_root, or the data set's data_prefix, to where they are, or take them out of the file"
        )
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


def few(names: Sequence[object], most: int = 6) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
