"""Checks of annotation files in COCO's format, for training and evaluation by mmdet.

mmdet numbers the classes as the file lists them, leaves out in silence a box that it cannot use, and looks keys up without
asking, some of them only after the training: in the evaluation.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from hgkd.errors import DataError, abbreviate
from hgkd.openmmlab.data_checks.box_places import Places
from hgkd.openmmlab.data_checks.instance_masks import is_number, mask_problem
from hgkd.openmmlab.data_checks.listed_images import (
    check_images,
    check_readable,
    image_size,
    is_opened_by_pillow,
    is_turned_upright,
    look_at,
)

_PARTS = ("images", "annotations", "categories")
_NEEDS_INFO = ("2.0.9", "2.0.10")  # of pycocotools


@dataclass
class BoxCounts:
    """The objects of the config's classes in a file, counted.

    Attributes:
        total: all of them.
        usable: those that a detector can learn or find.
        crowds: those that stand for many objects.
        dropped: those that mmdet leaves out: smaller than a pixel, without area, or outside their image.
        orphans: annotations of images that the file does not list.
        runs: those whose mask is RLE, where the pipeline takes polygons alone.
        images: ids of the images that have an object.
        places: how they lie in their images.
    """

    total: int = 0
    usable: int = 0
    crowds: int = 0
    dropped: int = 0
    orphans: int = 0
    runs: int = 0
    images: set[Any] = field(default_factory=set)
    places: Places = field(default_factory=Places)

    def __str__(self) -> str:
        return (
            f"of {self.total} boxes {self.dropped} are smaller than a pixel, without area or outside their image and "
            f"{self.crowds} are crowds; {self.orphans} belong to no listed image"
            + (f"; {self.runs} have RLE masks, which poly2mask=False leaves out" if self.runs else "")
        )


@dataclass(frozen=True)
class AnnotationUse:
    """Readers of an annotation file: the data set's class and pipeline, and the evaluators of its loader.

    Attributes:
        stock: mmdet's ``CocoDataset`` itself reads the file, and its rules hold.
        masks: the pipeline reads masks, or the evaluation those of its instances.
        polygons: the pipeline takes polygons alone (``poly2mask=False``).
        metrics: names of CocoMetric's measures that read the file: 'bbox', 'segm', ...
    """

    stock: bool
    masks: bool
    polygons: bool
    metrics: frozenset[str]


def check_annotation_file(
    file: Path, dataset: Mapping[str, Any], classes: Sequence[str], use: AnnotationUse, name: str
) -> tuple[list[str], BoxCounts]:
    """Check a file in COCO's format.

    Returns:
        What should be said of it, without being an error, and its boxes, not counted where the data set is not stock.

    Raises:
        DataError: see the module's header.
        FileNotFoundError: images that it lists are missing.
    """
    where = f"{name}: {file}"
    try:
        content = read_coco(file, name)
        categories = [(category["id"], category["name"]) for category in content["categories"]]
        _check_categories(categories, classes, where, use)
        extra = [label for _, label in categories if classes and label not in classes]
        remarks = (
            [f"{name}: {abbreviate(extra)} of {file} are not among the config's classes and will be left out"] if extra else []
        )
        images = _check_image_entries(content["images"], where, use)
        annotations = content.get("annotations", [])
        _check_ids(annotations, "category_id", dict(categories), "category", where)
        found = dict(categories)
        used = {annotation["category_id"] for annotation in annotations}
        if used - found.keys():
            raise DataError(
                "coco-category-not-listed",
                f"{where} annotates objects of category {next(iter(used - found.keys()))}, which it does not list",
            )
        wanted = {key for key, label in categories if not classes or label in classes}
        if use.stock:
            _check_ids(annotations, "image_id", images, "image", where)
            boxes = _check_annotations(annotations, images, wanted, where, use)
            remarks += _box_remarks(boxes, where)
        else:
            boxes = BoxCounts(images={a.get("image_id") for a in annotations if a["category_id"] in wanted})
        if use.metrics and any(annotation.get("id") == 0 for annotation in annotations):
            remarks.append(f"{where}: pycocotools counts the object of annotation 0 as missed; number annotations from 1")
        if use.metrics and "info" not in content and _pycocotools() in _NEEDS_INFO:
            raise DataError(
                "coco-info-missing",
                f"{where} has no 'info', without which the evaluation of pycocotools {_pycocotools()} fails; add "
                '"info": {} to the file, or install pycocotools>=2.0.11',
            )
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError("coco-file-other", f"{where} is no COCO annotation file ({type(error).__name__}: {error})") from error
    listed = set(images)
    if (dataset.get("filter_cfg") or {}).get("filter_empty_gt") and not dataset.get("test_mode"):
        listed &= boxes.images
    folder = Path(dataset.get("data_root") or "") / ((dataset.get("data_prefix") or {}).get("img") or "")
    entries = [entry for key, entry in images.items() if key in listed and entry.get("file_name")]
    names = [str(entry["file_name"]) for entry in entries]
    remarks += check_images(file, folder, names, name)
    twice = [listed_name for listed_name, count in Counter(names).items() if count > 1]
    if twice:
        remarks.append(
            f"{where} lists {len(twice)} images under several ids, each with a part of their objects ({abbreviate(twice, 3)}); "
            "what an entry lacks is background to it"
        )
    if use.stock:
        remarks += _check_sizes(entries, folder, dataset.get("pipeline") or [], file, name)
        problem = boxes.places.problem()
        if problem and boxes.usable:
            raise DataError("coco-boxes-misplaced", f"{where}: {problem}")
        remarks += [f"{where}: {remark}" for remark in boxes.places.remarks()]
    return remarks, boxes


def read_coco(file: Path, name: str) -> dict[str, Any]:
    """The content of a file in COCO's format: an object with lists of objects.

    Raises:
        DataError: it is not that; the message says what it is.
    """
    where = f"{name}: {file} is no COCO annotation file"
    data = file.read_bytes()
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise DataError(
            "coco-byte-order-mark", f"{where}: it begins with a byte order mark (BOM); save it as UTF-8 without one"
        )
    try:
        content = json.loads(data)
    except UnicodeDecodeError as error:
        raise DataError("coco-not-utf8", f"{where}: it is not UTF-8 ({error}); save it as UTF-8") from error
    except ValueError as error:
        raise DataError("coco-not-json", f"{where}, which is JSON: {error}; it begins with {data[:40]!r}") from error
    if not isinstance(content, dict):
        raise DataError(
            "coco-not-an-object",
            f"{where}: it holds a {type(content).__name__}, needed is an object with images, annotations and categories "
            "(a list alone is of results, or of another tool: convert it)",
        )
    for part in _PARTS:
        if part not in content:
            if part == "annotations":  # of a test set
                continue
            raise DataError("coco-part-missing", f"{where}: it has no {part!r}; its keys are {abbreviate(sorted(content))}")
        if not isinstance(content[part], list):
            raise DataError(
                "coco-part-not-a-list", f"{where}: {part!r} is a {type(content[part]).__name__}, needed is a list of objects"
            )
        for place, entry in enumerate(content[part]):
            if not isinstance(entry, dict):
                raise DataError(
                    "coco-entry-not-an-object",
                    f"{where}: number {place} of {part!r} is {str(entry)[:60]!r}, needed is an object",
                )
    for category in content["categories"]:
        if "id" not in category or not isinstance(category.get("name"), str):
            raise DataError("coco-category-incomplete", f"{where}: category {category} has no 'id', or no text as its 'name'")
    return content


def _check_ids(annotations: Sequence[Mapping[str, Any]], key: str, listed: Mapping[Any, Any], what: str, where: str) -> None:
    """Refuse ids that are texts where they are numbers elsewhere, or the other way round."""
    texts = {str(other): other for other in listed}
    for annotation in annotations:
        given = annotation.get(key)
        if given is not None and given not in listed and str(given) in texts:
            raise DataError(
                "coco-id-text-and-number",
                f"{where}: {key}={given!r}, but the {what} has the id {texts[str(given)]!r}: a text and a number are not the "
                "same. Write both as numbers",
            )


def listing(file: Path) -> tuple[Any, Any]:
    """Categories and images of a file in COCO's format: two files with the same are of the same data set."""
    content = json.loads(file.read_text(encoding="utf-8"))
    images = {image["id"]: image.get("file_name") for image in content["images"]}
    return [(category["id"], category["name"]) for category in content["categories"]], images


def _pycocotools() -> str:
    """The version of pycocotools; nothing where it does not say."""
    try:
        return metadata.version("pycocotools")
    except metadata.PackageNotFoundError:
        return ""


def _check_categories(categories: Sequence[tuple[Any, str]], classes: Sequence[str], where: str, use: AnnotationUse) -> None:
    labels = [label for _, label in categories]
    missing = [label for label in classes if label not in labels]
    if missing:
        alike = [(label, other) for label in missing for other in labels if label.strip().lower() == other.strip().lower()]
        raise DataError(
            "coco-categories-differ",
            f"{where} has {len(labels)} categories ({abbreviate(labels)}), the config {len(classes)} "
            f"({abbreviate(classes)}); the file lacks {abbreviate(missing)}. "
            + "".join(
                f"{label!r} in the config and {other!r} in the file differ by blanks, or upper and lower case. "
                for label, other in alike[:1]
            )
            + "Set the data set's metainfo.classes and the heads' num_classes",
        )
    wanted = [label for label in labels if label in classes]
    if use.stock and classes:
        keys = [key for key, _ in categories]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise DataError(
                "coco-category-id-twice", f"{where} lists category {twice} more than once; give every category an id of its own"
            )
        if len(set(wanted)) < len(wanted):
            label = next(label for label in wanted if wanted.count(label) > 1)
            ids = [key for key, other in categories if other == label]
            raise DataError(
                "coco-category-name-twice",
                f"{where} has {len(ids)} categories called {label!r} (ids {abbreviate(ids)}): mmdet would number them as "
                "different classes, and all that follow would be shifted. Take out or rename those that no object has",
            )
        if wanted != list(classes):
            raise DataError(
                "coco-categories-in-other-order",
                f"{where} lists the classes in the order {tuple(wanted)}, the config in the order {tuple(classes)}; mmdet "
                "numbers them as the file does, so names and labels would be mixed up. Set metainfo.classes of all data sets "
                "to the file's order, or list the file's categories in the config's",
            )


def _check_image_entries(entries: Sequence[Mapping[str, Any]], where: str, use: AnnotationUse) -> dict[Any, Mapping[str, Any]]:
    images: dict[Any, Mapping[str, Any]] = {}
    for place, entry in enumerate(entries):
        if "id" not in entry:
            raise DataError("coco-image-without-id", f"{where}: image number {place} has no 'id'; number the images")
        if use.stock:
            if entry["id"] in images:
                raise DataError(
                    "coco-image-id-twice",
                    f"{where} has several images with the id {entry['id']!r}; give every image an id of its own",
                )
            if not isinstance(entry.get("file_name"), str):
                raise DataError(
                    "coco-image-file-name",
                    f"{where}: image {entry['id']!r} has file_name={entry.get('file_name')!r}, needed is a name",
                )
            for key in ("width", "height"):
                if not (is_number(entry.get(key)) and entry[key] > 0):
                    raise DataError(
                        "coco-image-size",
                        f"{where}: image {entry['id']!r} has {key}={entry.get(key)!r}, needed is a number of pixels",
                    )
        images[entry["id"]] = entry
    return images


def _check_annotations(
    annotations: Sequence[Mapping[str, Any]],
    images: Mapping[Any, Mapping[str, Any]],
    wanted: set[Any],
    where: str,
    use: AnnotationUse,
) -> BoxCounts:
    boxes, seen, problems = BoxCounts(), set(), []
    for place, annotation in enumerate(annotations):
        for key in ("id", "image_id"):
            if key not in annotation:
                raise DataError(
                    "coco-annotation-incomplete",
                    f"{where}: annotation number {place} has no {key!r}; every annotation needs one",
                )
        image = images.get(annotation["image_id"])
        if image is None:
            boxes.orphans += 1
            continue
        if annotation["id"] in seen:
            raise DataError(
                "coco-annotation-id-twice",
                f"{where} has several annotations with the id {annotation['id']!r}; give each an id of its own",
            )
        seen.add(annotation["id"])
        problem = _count(annotation, image, annotation["category_id"] in wanted, boxes, use)
        if problem:
            problems.append(f"annotation {annotation['id']!r} {problem}")
    if problems:
        others = f" (this is the first of {len(problems)} faulty annotations)" if problems[1:] else ""
        raise DataError("coco-annotation-wrong", f"{where}: {problems[0]}. Correct it, or take it out{others}")
    return boxes


def _count(
    annotation: Mapping[str, Any], image: Mapping[str, Any], wanted: bool, boxes: BoxCounts, use: AnnotationUse
) -> str | None:
    """Count the box of an annotation; or what is wrong with it."""
    measured = wanted and bool(use.metrics)
    for key in ("iscrowd", "ignore"):
        if annotation.get(key) not in (None, 0, 1):
            return f"has {key}={annotation[key]!r}, needed is 0 or 1"
    if annotation.get("ignore") and not measured:
        return None  # mmdet does not look at it
    box = annotation.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(map(is_number, box))):
        return f"has bbox={box!r}, needed are four numbers: x, y, width, height in pixels"
    if not is_number(annotation.get("area")):
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
    if width > 0 and height > 0 and not annotation.get("ignore"):
        boxes.places.add(annotation, image)
    runs = use.polygons and isinstance(annotation.get("segmentation"), Mapping)
    if kept and annotation.get("iscrowd"):
        boxes.crowds += 1
    elif kept:
        boxes.runs += runs
        boxes.usable += not runs
    if "segm" in use.metrics or (use.masks and kept):
        return mask_problem(annotation.get("segmentation"), image)
    return None


def _check_sizes(
    entries: Sequence[Mapping[str, Any]], folder: Path, pipeline: Sequence[Mapping[str, Any]], file: Path, name: str
) -> list[str]:
    """Compare the sizes in a file with those of the images; what should be said, without being an error.

    Raises:
        DataError: they differ, or images cannot be opened.
    """
    upright = is_turned_upright(pipeline)
    unreadable: list[str] = []
    others: list[str] = []
    turned = False
    for entry, size in look_at(entries, lambda entry: image_size(folder / entry["file_name"], upright)):
        said = (entry["width"], entry["height"])
        if size is None:
            if (folder / entry["file_name"]).exists():
                unreadable.append(entry["file_name"])
        elif size != said:
            others.append(f"{entry['file_name']}: {size[0]} x {size[1]}, in the file {said[0]} x {said[1]}")
            turned = turned or (upright and image_size(folder / entry["file_name"], False) == said)
    if others:
        raise DataError(
            "coco-image-sizes-differ",
            f"{name}: {len(others)} of {len(entries)} images are not of the width and height that {file} notes "
            f"({abbreviate(others, 3)}). "
            + (
                "Images with an EXIF orientation are turned when they are read, as they are shown: annotate what is shown, or "
                "set color_type='color_ignore_orientation' in the pipelines' LoadImageFromFile"
                if turned
                else "Correct the file where boxes are in pixels of the images as they are; else scale the boxes, too, or use "
                "the images that were annotated"
            ),
        )
    return check_readable(unreadable, len(entries), name) if is_opened_by_pillow(pipeline) else []


def _box_remarks(boxes: BoxCounts, where: str) -> list[str]:
    remarks = []
    if boxes.dropped:
        remarks.append(
            f"{where}: mmdet leaves out {boxes.dropped} of the {boxes.total} boxes: smaller than a pixel, without area or "
            "outside their image"
        )
    if boxes.runs:
        remarks.append(f"{where}: {boxes.runs} objects have RLE masks, which poly2mask=False leaves out; set poly2mask=True")
    if boxes.orphans:
        remarks.append(f"{where}: {boxes.orphans} annotations belong to no listed image and are left out")
    return remarks
