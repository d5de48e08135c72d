"""What a file in COCO's format must be for mmdet to train on it and for its evaluation to measure by it.

mmdet numbers the classes as the file lists them, leaves out in silence a box that it cannot use, and looks keys up without
asking, some of them only after the training: in the evaluation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hgkd.errors import DataError
from hgkd.openmmlab.listed_images import check_images, few


@dataclass
class Boxes:
    """The objects of the config's classes in a file, counted.

    Attributes:
        total: all of them.
        usable: those that a detector can learn or find.
        crowds: those that stand for many objects.
        dropped: those that mmdet leaves out: smaller than a pixel, without area, or outside their image.
        strangers: annotations of images that the file does not list.
        images: ids of the images that have an object.
    """

    total: int = 0
    usable: int = 0
    crowds: int = 0
    dropped: int = 0
    strangers: int = 0
    images: set[Any] = field(default_factory=set)

    def __str__(self) -> str:
        return (
            f"of {self.total} boxes {self.dropped} are smaller than a pixel, without area or outside their image and "
            f"{self.crowds} are crowds; {self.strangers} belong to no listed image"
        )


@dataclass(frozen=True)
class Use:
    """What will read a file: the data set's class and pipeline, and the evaluators of its loader.

    Attributes:
        stock: mmdet's ``CocoDataset`` itself reads the file, and its rules hold.
        masks: the pipeline reads masks.
        metrics: names of CocoMetric's measures that read the file: 'bbox', 'segm', ...
    """

    stock: bool
    masks: bool
    metrics: frozenset[str]


def check_annotation_file(
    file: Path, dataset: Mapping[str, Any], classes: Sequence[str], use: Use, name: str
) -> tuple[list[str], Boxes]:
    """Check a file in COCO's format.

    Returns:
        What should be said of it, without being an error, and its boxes, not counted where the data set is not stock.

    Raises:
        DataError: see the module's header.
        FileNotFoundError: images that it lists are missing.
    """
    where = f"{name}: {file}"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        categories = [(category["id"], category["name"]) for category in content["categories"]]
        _check_categories(categories, classes, where, use)
        extra = [label for _, label in categories if classes and label not in classes]
        remarks = [f"{name}: {few(extra)} of {file} are not among the config's classes and will be left out"] if extra else []
        images = _check_image_entries(content["images"], where, use)
        annotations = content.get("annotations", [])
        found = dict(categories)
        used = {annotation["category_id"] for annotation in annotations}
        if used - found.keys():
            raise DataError(f"{where} annotates objects of category {next(iter(used - found.keys()))}, which it does not list")
        wanted = {key for key, label in categories if not classes or label in classes}
        if use.stock:
            boxes = _check_annotations(annotations, images, wanted, where, use)
            remarks += _box_remarks(boxes, where)
        else:
            boxes = Boxes(images={a.get("image_id") for a in annotations if a["category_id"] in wanted})
        if use.metrics and any(annotation.get("id") == 0 for annotation in annotations):
            remarks.append(f"{where}: pycocotools counts the object of annotation 0 as missed; number annotations from 1")
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{where} is no COCO annotation file ({type(error).__name__}: {error})") from error
    listed = set(images)
    if (dataset.get("filter_cfg") or {}).get("filter_empty_gt") and not dataset.get("test_mode"):
        listed &= boxes.images
    folder = Path(dataset.get("data_root") or "") / ((dataset.get("data_prefix") or {}).get("img") or "")
    names = [str(images[key]["file_name"]) for key in listed if images[key].get("file_name")]
    return remarks + check_images(file, folder, names, name), boxes


def listing(file: Path) -> tuple[Any, Any]:
    """Categories and images of a file in COCO's format: two files with the same are of the same data set."""
    content = json.loads(file.read_text(encoding="utf-8"))
    images = {image["id"]: image.get("file_name") for image in content["images"]}
    return [(category["id"], category["name"]) for category in content["categories"]], images


def _check_categories(categories: Sequence[tuple[Any, str]], classes: Sequence[str], where: str, use: Use) -> None:
    labels = [label for _, label in categories]
    missing = [label for label in classes if label not in labels]
    if missing:
        raise DataError(
            f"{where} has {len(labels)} categories ({few(labels)}), the config {len(classes)} "
            f"({few(classes)}); the file lacks {few(missing)}. Set the data set's metainfo.classes and the heads' num_classes"
        )
    wanted = [label for label in labels if label in classes]
    if use.stock and classes:
        keys = [key for key, _ in categories]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise DataError(f"{where} lists category {twice} more than once; give every category an id of its own")
        if len(set(wanted)) < len(wanted):
            label = next(label for label in wanted if wanted.count(label) > 1)
            ids = [key for key, other in categories if other == label]
            raise DataError(
                f"{where} has {len(ids)} categories called {label!r} (ids {few(ids)}): mmdet would number them as different "
                "classes, and all that follow would be shifted. Take out or rename those that no object has"
            )
        if wanted != list(classes):
            raise DataError(
                f"{where} lists the classes in the order {tuple(wanted)}, the config in the order {tuple(classes)}; mmdet "
                "numbers them as the file does, so names and labels would be mixed up. Set metainfo.classes of all data sets "
                "to the file's order, or list the file's categories in the config's"
            )


def _check_image_entries(entries: Sequence[Mapping[str, Any]], where: str, use: Use) -> dict[Any, Mapping[str, Any]]:
    images: dict[Any, Mapping[str, Any]] = {}
    for place, entry in enumerate(entries):
        if "id" not in entry:
            raise DataError(f"{where}: image number {place} has no 'id'; number the images")
        if use.stock:
            if entry["id"] in images:
                raise DataError(f"{where} has several images with the id {entry['id']!r}; give every image an id of its own")
            if not isinstance(entry.get("file_name"), str):
                raise DataError(f"{where}: image {entry['id']!r} has file_name={entry.get('file_name')!r}, needed is a name")
            for key in ("width", "height"):
                if not (_is_number(entry.get(key)) and entry[key] > 0):
                    raise DataError(
                        f"{where}: image {entry['id']!r} has {key}={entry.get(key)!r}, needed is a number of pixels"
                    )
        images[entry["id"]] = entry
    return images


def _check_annotations(
    annotations: Sequence[Mapping[str, Any]], images: Mapping[Any, Mapping[str, Any]], wanted: set[Any], where: str, use: Use
) -> Boxes:
    boxes, seen = Boxes(), set()
    for place, annotation in enumerate(annotations):
        for key in ("id", "image_id"):
            if key not in annotation:
                raise DataError(f"{where}: annotation number {place} has no {key!r}; every annotation needs one")
        image = images.get(annotation["image_id"])
        if image is None:
            boxes.strangers += 1
            continue
        if annotation["id"] in seen:
            raise DataError(f"{where} has several annotations with the id {annotation['id']!r}; give each an id of its own")
        seen.add(annotation["id"])
        problem = _count(annotation, image, annotation["category_id"] in wanted, boxes, use)
        if problem:
            raise DataError(f"{where}: annotation {annotation['id']!r} {problem}. Correct it, or take it out")
    return boxes


def _count(annotation: Mapping[str, Any], image: Mapping[str, Any], wanted: bool, boxes: Boxes, use: Use) -> str | None:
    """Count the box of an annotation; or what is wrong with it."""
    measured = wanted and bool(use.metrics)
    if annotation.get("ignore") and not measured:
        return None  # mmdet does not look at it
    box = annotation.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
        return f"has bbox={box!r}, needed are four numbers: x, y, width, height in pixels"
    if not _is_number(annotation.get("area")):
        return f"has area={annotation.get('area')!r}, needed is a number of pixels (width * height of the box, without masks)"
    if measured and "iscrowd" not in annotation:
        return "has no 'iscrowd', which the evaluation reads; add iscrowd=0 to every annotation that is of one object"
    if measured and not str(annotation["id"]).isdigit():
        return "has no whole number as its id, which the evaluation needs; number the annotations from 1"
    if not wanted:
        return None
    left, top, width, height = box
    boxes.total += 1
    boxes.images.add(annotation["image_id"])
    kept = (
        min(left + width, image["width"]) > max(left, 0)
        and min(top + height, image["height"]) > max(top, 0)
        and width >= 1
        and height >= 1
        and annotation["area"] > 0
        and not annotation.get("ignore")
    )
    boxes.dropped += not kept
    if kept and annotation.get("iscrowd"):
        boxes.crowds += 1
    elif kept:
        boxes.usable += 1
    if "segm" in use.metrics or (use.masks and kept):
        return _mask_problem(annotation.get("segmentation"), image)
    return None


def _mask_problem(mask: Any, image: Mapping[str, Any]) -> str | None:
    if not mask:
        return "has no 'segmentation', but the config reads masks; add polygons or RLE, or use a detector of boxes"
    size = mask.get("size") if isinstance(mask, Mapping) else None
    if size is not None and list(size) != [image["height"], image["width"]]:
        return f"has a mask (RLE) of size {size}, but its image has height and width [{image['height']}, {image['width']}]"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _box_remarks(boxes: Boxes, where: str) -> list[str]:
    remarks = []
    if boxes.dropped:
        remarks.append(
            f"{where}: mmdet leaves out {boxes.dropped} of the {boxes.total} boxes: smaller than a pixel, without area or "
            "outside their image"
        )
    if boxes.strangers:
        remarks.append(f"{where}: {boxes.strangers} annotations belong to no listed image and are left out")
    return remarks
