"""What a data set must be before a detector or segmentor is trained on it: files, categories, label values.

mmdet drops a class that the annotation file calls otherwise, mmsegmentation lets a label out of range reach the loss (an index
error, on a GPU a dead device). Both are said here, with the file, before the model is built.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from mmengine import registry as roots
from mmengine.config import Config
from mmengine.registry import DefaultScope
from PIL import Image

from hgkd.errors import DataError
from hgkd.openmmlab.config import dataset_class, datasets_of

MAX_LABEL_MAPS = 30_000
"""So many of a data set are read, evenly spaced; one of 480 x 360 pixels takes 1 ms, one of 1920 x 1024 9 ms."""
MISSING_SHARE = 0.1
"""More of the training images may not be absent."""
_IGNORED = 255
_HEADS = {"bbox_head", "mask_head", "decode_head", "auxiliary_head"}  # whose classes are the data set's


def check_data(cfg: Config, loaders: Sequence[str]) -> list[str]:
    """Check the data sets of these dataloaders against the files and against the model's heads.

    Returns:
        What is no error, but should be in the run's log.

    Raises:
        FileNotFoundError: a folder, an annotation file, a label map or an image is missing; of training images a tenth may be.
        DataError: categories that do not agree with the config, label maps that cannot be read or have values out of range.
    """
    remarks: list[str] = []
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        heads = dict(_class_counts(cfg.model.get("student", cfg.model), "model"))
        for name in loaders:
            if not cfg.get(name):
                continue
            for dataset in datasets_of(cfg, [name]):
                cls: Any = dataset_class(dataset, cfg.default_scope)
                classes = _classes(dataset, cls)
                panoptic = _is_panoptic(cls)  # its heads divide the classes into things and stuff
                if not panoptic:
                    _check_heads(heads, classes, name)
                _check_folders(dataset, name)
                if cfg.default_scope == "mmdet":
                    file = _annotation_file(dataset, name)
                    if file.suffix == ".json" and not panoptic:
                        remarks += _check_annotations(file, dataset, classes, name)
                else:
                    _check_label_maps(dataset, len(classes), _ignore_index(cfg), name)
    return remarks


def _classes(dataset: Mapping[str, Any], cls: Any) -> tuple[str, ...]:
    given = (dataset.get("metainfo") or {}).get("classes") or getattr(cls, "METAINFO", {}).get("classes") or ()
    return (given,) if isinstance(given, str) else tuple(given)


def _is_panoptic(cls: Any) -> bool:
    return any(base.__name__ == "CocoPanopticDataset" for base in cls.__mro__)


def _class_counts(part: Any, path: str) -> Iterator[tuple[str, int]]:
    if isinstance(part, Mapping):
        for key, value in part.items():
            if key == "num_classes" and isinstance(value, int) and _HEADS & set(path.split(".")):
                yield path, value
            else:
                yield from _class_counts(value, f"{path}.{key}")
    elif isinstance(part, (list, tuple)):
        for index, item in enumerate(part):
            yield from _class_counts(item, f"{path}.{index}")


def _check_heads(heads: Mapping[str, int], classes: Sequence[str], name: str) -> None:
    for path, count in heads.items():
        if classes and count != len(classes):
            raise DataError(
                f"{path}.num_classes={count}, but the data set of {name} has {len(classes)} classes ({_few(classes)}); set "
                f"{path}.num_classes={len(classes)}, or the data set's metainfo.classes"
            )


def _check_folders(dataset: Mapping[str, Any], name: str) -> None:
    root = Path(dataset.get("data_root") or "")
    if not root.is_dir():
        raise FileNotFoundError(f"{name}: folder {root} does not exist; set --cfg-options data_root=DIR")
    for key, folder in (dataset.get("data_prefix") or {}).items():
        if folder is not None and not (root / folder).is_dir():
            raise FileNotFoundError(
                f"{name}: folder {root / folder} does not exist (data_prefix.{key}={folder!r} under data_root={str(root)!r}); "
                "set data_root, or the data set's data_prefix"
            )


def _annotation_file(dataset: Mapping[str, Any], name: str) -> Path:
    file = Path(dataset.get("data_root") or "") / dataset.get("ann_file", "")
    if not file.is_file():
        raise FileNotFoundError(
            f"{name}: annotation file {file} does not exist; set data_root to the folder that holds {dataset.get('ann_file')!r}"
        )
    return file


def _check_annotations(file: Path, dataset: Mapping[str, Any], classes: Sequence[str], name: str) -> list[str]:
    """Check a file in COCO's format; what should be said of it, without being an error."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = {category["id"]: category["name"] for category in content["categories"]}
        annotations = content.get("annotations", [])
        used = {annotation["category_id"] for annotation in annotations}
        images = {image["id"]: image.get("file_name") for image in content["images"]}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{name}: {file} is no COCO annotation file ({type(error).__name__}: {error})") from error
    missing = [label for label in classes if label not in found.values()]
    if missing:
        raise DataError(
            f"{name}: {file} has {len(found)} categories ({_few(list(found.values()))}), the config {len(classes)} "
            f"({_few(classes)}); the file lacks {_few(missing)}. Set the data set's metainfo.classes and the heads' num_classes"
        )
    if used - found.keys():
        raise DataError(
            f"{name}: {file} annotates objects of category {sorted(used - found.keys())[0]}, which it does not list"
        )
    remarks = []
    extra = [label for label in found.values() if label not in classes]
    if extra:
        remarks.append(f"{name}: {_few(extra)} of {file} are not among the config's classes and will be left out")
    if (dataset.get("filter_cfg") or {}).get("filter_empty_gt") and not dataset.get("test_mode"):
        images = {key: images[key] for key in {annotation.get("image_id") for annotation in annotations} & images.keys()}
    return remarks + _check_images(file, dataset, [file_name for file_name in images.values() if file_name], name)


def _check_images(file: Path, dataset: Mapping[str, Any], names: Sequence[str], name: str) -> list[str]:
    folder = Path(dataset.get("data_root") or "") / ((dataset.get("data_prefix") or {}).get("img") or "")
    absent = sorted(_absent(folder, names))
    if not absent:
        return []
    said = f"{name}: {len(absent)} of the {len(names)} images of {file} are not in {folder} ({_few(absent, 3)})"
    if name != "train_dataloader" or len(absent) > MISSING_SHARE * len(names):
        raise FileNotFoundError(
            f"{said}; set data_root, or the data set's data_prefix.img, to where they are, or take them out of the file"
        )
    return [f"{said}; training goes on without them"]


def _absent(folder: Path, names: Iterable[str]) -> Iterator[str]:
    listed: dict[str, set[str]] = {}  # one listing a folder: faster than a question a file, over a network above all
    for name in names:
        where, base = os.path.split(folder / name)
        if where not in listed:
            listed[where] = set(os.listdir(where)) if os.path.isdir(where) else set()
        if base not in listed[where]:
            yield name


def _ignore_index(cfg: Config) -> int:
    head = cfg.model.get("student", cfg.model).get("decode_head", {})
    first = head[0] if isinstance(head, (list, tuple)) else head
    return int(first.get("ignore_index", _IGNORED))


def _check_label_maps(dataset: Mapping[str, Any], count: int, ignored: int, name: str) -> None:
    built: Any = roots.DATASETS.build({**dataset, "lazy_init": True, "pipeline": [], "test_mode": False})
    files = [Path(entry["seg_map_path"]) for entry in built.load_data_list() if entry.get("seg_map_path")]
    if not files:
        raise FileNotFoundError(
            f"{name}: no images with the suffix {built.img_suffix!r} in {built.data_prefix.get('img_path')}; set data_root, or "
            "the data set's img_suffix"
        )
    absent = next((file for file in files if not file.is_file()), None)
    if absent is not None:
        raise FileNotFoundError(f"{name}: label map {absent} does not exist; every image needs one of its name")
    count_read = min(len(files), MAX_LABEL_MAPS)
    chosen = [files[i * len(files) // count_read] for i in range(count_read)]
    # where classes are chosen, the files hold all of the data set's
    labels = count if built.label_map is None else len(built.label_map)
    from_one = bool(built.reduce_zero_label)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as readers:  # Pillow decodes without holding Python's lock
        for file, values in zip(chosen, readers.map(_label_values, chosen), strict=True):
            wrong = [value for value in values if not _is_label(value, count, ignored, from_one, built.label_map)]
            if wrong:
                raise DataError(
                    f"{name}: label map {file} holds the value {wrong[0]}, but the {labels} classes are "
                    f"0 .. {labels if from_one else labels - 1}"
                    + (" (0 = unlabelled, reduce_zero_label)" if from_one else "")
                    + f" and {ignored} is ignored. Bring the maps to these values, or set classes, num_classes and ignore_index"
                )


def _label_values(file: Path) -> list[int]:
    """The values that occur in a label map."""
    try:
        with Image.open(file) as image:
            if image.mode in ("L", "P"):
                return [value for value, places in enumerate(image.histogram()) if places]  # half the time of sorting
            return [int(value) for value in np.unique(np.asarray(image))]
    except Exception as error:  # Pillow's decoders raise all sorts of errors on damaged files
        raise DataError(
            f"label map {file} cannot be read ({type(error).__name__}: {error}); replace it, or take it and its image away"
        ) from error


def _is_label(value: int, count: int, ignored: int, from_one: bool, label_map: Mapping[int, int] | None) -> bool:
    """Whether a value is a class or ignored once mmseg has read it: less one, then renumbered where classes are chosen."""
    if from_one:
        value = _IGNORED if value in (0, _IGNORED) else value - 1
    if label_map is not None:
        value = label_map.get(value, value)
    return 0 <= value < count or value == ignored


def _few(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
