"""Checks of label maps for training and evaluation by mmsegmentation: readable, in range, of their image's size.

A value out of range is an index error in the loss, on a GPU a dead device; one that the evaluation does not ignore lowers the
measure in silence.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mmengine import registry as roots
from mmengine.dataset import BaseDataset
from PIL import Image

from hgkd.errors import DataError, MissingFileError, abbreviate
from hgkd.openmmlab.data_checks.listed_images import (
    absent,
    check_images,
    check_readable,
    image_size,
    is_opened_by_pillow,
    is_turned_upright,
    look_at,
    why_absent,
)

IGNORED = 255
"""What mmsegmentation ignores where nothing else is said, and makes of labels that are left out."""


@dataclass(frozen=True)
class LabelMap:
    """Facts of a label map: the values that occur in it, its size and its image's as (width, height)."""

    values: list[int]
    size: tuple[int, int]
    image_size: tuple[int, int] | None


def check_label_maps(dataset: Mapping[str, Any], count: int, ignored: Mapping[str, int], name: str) -> tuple[list[str], bool]:
    """Check the label maps of a data set.

    Args:
        count: of the classes.
        ignored: keys of the config -> the value that is ignored there.

    Returns:
        What should be said of them, without being an error, and whether any place has a label.

    Raises:
        DataError: see the module's header.
        FileNotFoundError: no images, or a label map is missing.
    """
    built = roots.DATASETS.build({**dataset, "lazy_init": True, "pipeline": [], "test_mode": False})
    entries = built.load_data_list()
    if not entries:
        raise MissingFileError(
            "no-images-of-suffix",
            f"{name}: no images with the suffix {built.img_suffix!r} in {built.data_prefix.get('img_path')}; set data_root, or "
            "the data set's img_suffix",
        )
    pairs = [(Path(entry["seg_map_path"]), Path(entry["img_path"])) for entry in entries if entry.get("seg_map_path")]
    if not pairs:
        return [], True  # its ground truth is of another kind: depth, for example
    lost = next(absent(Path(), [str(file) for file, _ in pairs]), None)
    if lost is not None:
        raise MissingFileError(
            "label-map-missing",
            f"{name}: label map {lost} does not exist{_why_lost(built, lost)}; every image needs one of its name",
        )
    pipeline = dataset.get("pipeline") or []
    remarks = _check_zero_label(built, pipeline, name) + _check_partners(built, pairs, name)
    upright = is_turned_upright(pipeline)
    by_cv2 = any(step.get("type") == "LoadAnnotations" and step.get("imdecode_backend") == "cv2" for step in pipeline)
    labelled, scaled, unreadable = False, [], []
    for (file, image), found in look_at(pairs, lambda pair: _read(pair[0], pair[1], upright, by_cv2)):
        labels = {value: _label(value, bool(built.reduce_zero_label), built.label_map) for value in found.values}
        for value, label in labels.items():
            if not 0 <= label < count:
                _check_ignored(value, label, file, built, count, ignored, name)
        labelled |= any(0 <= label < count for label in labels.values())
        if found.image_size is None and image.exists():
            unreadable.append(str(image))
        elif found.image_size not in (None, found.size):
            _check_size(found, file, image, name)
            scaled.append(file)
    if is_opened_by_pillow(pipeline):
        remarks += check_readable(unreadable, len(pairs), name)
    if scaled:
        remarks.append(
            f"{name}: {len(scaled)} label maps are of another scale than their images ({abbreviate(scaled, 3)}); only a "
            "pipeline that resizes both to one scale can train on them"
        )
    return remarks, labelled


def _check_zero_label(built: BaseDataset, pipeline: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """Look at what becomes of the value 0; what should be said, without being an error.

    Raises:
        DataError: the data set and its pipeline differ.
    """
    from_one = bool(built.reduce_zero_label)
    steps = [step["reduce_zero_label"] for step in pipeline if step.get("reduce_zero_label") is not None]
    if any(bool(step) != from_one for step in steps):
        raise DataError(
            "reduce-zero-label-differs",
            f"{name}: the data set has reduce_zero_label={from_one}, its pipeline's LoadAnnotations {steps[0]}; take it out of "
            "LoadAnnotations, and set the data set's",
        )
    first = built.metainfo["classes"][0]
    if from_one and first.strip("_").lower() in ("background", "bg"):
        return [
            f"{name}: with reduce_zero_label=True the value 0 is ignored, and 1 is {first!r}; where 0 is the background in the "
            "label maps, set it to False"
        ]
    return []


def _check_partners(built: BaseDataset, pairs: Sequence[tuple[Path, Path]], name: str) -> list[str]:
    """Look for images of a list that are not there, or for maps whose image has another suffix."""
    if built.ann_file and not os.path.isdir(built.ann_file):
        return check_images(Path(built.ann_file), Path(), [str(image) for _, image in pairs], name)
    folder, suffix = built.data_prefix.get("seg_map_path"), built.seg_map_suffix
    known = {file for file, _ in pairs}
    alone = sorted(file for file in Path(folder).rglob(f"*{suffix}") if file not in known)
    if not alone:
        return []
    return [
        f"{name}: {len(alone)} label maps of {folder} have no image with the suffix {built.img_suffix!r} in "
        f"{built.data_prefix.get('img_path')} and are left out ({abbreviate([file.name for file in alone], 3)}); suffixes "
        "count upper and lower case, img_suffix sets another"
    ]


def _why_lost(built: BaseDataset, file: str) -> str:
    """What a list of names has instead of the name of a label map, as a part of a sentence, or nothing."""
    folder = Path(built.data_prefix["seg_map_path"])
    line = os.path.relpath(file, folder).removesuffix(built.seg_map_suffix)
    if not built.ann_file or os.path.isdir(built.ann_file):
        return ""
    if line in ("", "."):
        return f", since {built.ann_file} has an empty line; take it out"
    why = why_absent(folder, line + built.seg_map_suffix) or why_absent(Path(built.data_prefix["img_path"]), line)
    if not why and line.endswith((built.img_suffix, built.seg_map_suffix)):
        why = f", since names are listed without suffix, which the data set adds, and {built.ann_file} has {line!r}"
    return why


def _read(file: Path, image: Path, upright: bool, by_cv2: bool) -> LabelMap:
    try:
        with Image.open(file) as opened:
            size, bands, mode = opened.size, opened.getbands(), opened.mode
            if len(bands) == 1 and opened.mode in ("L", "P"):
                values = [value for value, places in enumerate(opened.histogram()) if places]  # half the time of sorting
            elif len(bands) == 1:
                values = [int(value) for value in np.unique(np.asarray(opened))]
    except Exception as error:  # Pillow's decoders raise all sorts of errors on damaged files
        raise DataError(
            "label-map-unreadable",
            f"label map {file} cannot be read ({type(error).__name__}: {error}); replace it, or take it and its image away",
        ) from error
    if len(bands) > 1:
        raise DataError(
            "label-map-channels",
            f"label map {file} has the channels {''.join(bands)}, needed is one channel that holds the classes' numbers; "
            "translate its colours, or save it as one channel of 8 bits or with a palette",
        )
    if by_cv2 and mode in ("P", "1"):
        raise DataError(
            "label-map-palette",
            f"label map {file} has a palette or one bit a place, of which OpenCV reads the colours, not the numbers; take "
            "imdecode_backend='cv2' out of LoadAnnotations",
        )
    return LabelMap(values, size, image_size(image, upright))


def _label(value: int, from_one: bool, label_map: Mapping[int, int] | None) -> int:
    """The class of a value once mmseg has read it: less one, then renumbered where classes are chosen."""
    if from_one:
        value = IGNORED if value in (0, IGNORED) else value - 1
    return value if label_map is None else label_map.get(value, value)


def _check_ignored(
    value: int, label: int, file: Path, built: BaseDataset, count: int, ignored: Mapping[str, int], name: str
) -> None:
    key = next((key for key, index in ignored.items() if index != label), None)
    if key is None:
        return
    # where classes are chosen, the files hold all of the data set's
    labels = count if built.label_map is None else len(built.label_map)
    from_one = bool(built.reduce_zero_label)
    raise DataError(
        "label-map-value",
        f"{name}: label map {file} holds the value {value}, but the {labels} classes are 0 .. "
        f"{labels if from_one else labels - 1}"
        + (" (0 = unlabelled, reduce_zero_label)" if from_one else "")
        + f" and {ignored[key]} is ignored ({key}). Bring the maps to these values, or set classes, num_classes and {key}",
    )


def _check_size(found: LabelMap, file: Path, image: Path, name: str) -> None:
    assert found.image_size is not None
    (width, height), (image_width, image_height) = found.size, found.image_size
    if name == "train_dataloader" and width * image_height == height * image_width:
        return  # resized to the image's scale it fits
    raise DataError(
        "label-map-size",
        f"{name}: label map {file} has {width} x {height} pixels, its image {image} is read as {image_width} x "
        f"{image_height}; save the map at its image's size, turned as the image is shown",
    )
