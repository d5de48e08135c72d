"""What a data set must be before a detector or segmentor is trained on it: files, categories, label values.

mmdet drops a class that the annotation file calls otherwise, mmsegmentation lets a label out of range reach the loss (an index
error, on a GPU a dead device). Both are said here, with the file, before the model is built.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine import registry as roots
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import DefaultScope
from PIL import Image

from hgkd.errors import DataError
from hgkd.openmmlab.config import dataset_class, datasets_of

MAX_LABEL_MAPS = 200
_IGNORED = 255


def check_data(cfg: Config, loaders: Sequence[str]) -> None:
    """Check the data sets of these dataloaders against the files and against the model's heads.

    Label maps are read, at most ``MAX_LABEL_MAPS`` of a data set, evenly spaced.

    Raises:
        FileNotFoundError: a folder, an annotation file or a label map is missing.
        DataError: categories that do not agree with the config, or label values out of range.
    """
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        heads = dict(_class_counts(cfg.model.get("student", cfg.model), "model"))
        for name in loaders:
            if not cfg.get(name):
                continue
            for dataset in datasets_of(cfg, [name]):
                cls: Any = dataset_class(dataset, cfg.default_scope)
                classes = _classes(dataset, cls)
                _check_heads(heads, classes, name)
                _check_folders(dataset, name)
                if cfg.default_scope == "mmdet":
                    _check_annotations(dataset, classes, name)
                else:
                    _check_label_maps(dataset, cls, len(classes), _ignore_index(cfg), name)


def _classes(dataset: Mapping[str, Any], cls: Any) -> tuple[str, ...]:
    given = (dataset.get("metainfo") or {}).get("classes") or getattr(cls, "METAINFO", {}).get("classes") or ()
    return (given,) if isinstance(given, str) else tuple(given)


def _class_counts(part: Any, path: str) -> Iterator[tuple[str, int]]:
    if isinstance(part, Mapping):
        for key, value in part.items():
            if key == "num_classes" and isinstance(value, int):
                yield path, value
            elif key not in ("backbone", "rpn_head", "teacher"):  # an RPN knows one class: object
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


def _check_annotations(dataset: Mapping[str, Any], classes: Sequence[str], name: str) -> None:
    file = Path(dataset.get("data_root") or "") / dataset.get("ann_file", "")
    if not file.is_file():
        raise FileNotFoundError(
            f"{name}: annotation file {file} does not exist; set data_root to the folder that holds {dataset.get('ann_file')!r}"
        )
    if file.suffix != ".json":
        return
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = {category["id"]: category["name"] for category in content["categories"]}
        used = {annotation["category_id"] for annotation in content.get("annotations", [])}
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
    extra = [label for label in found.values() if label not in classes]
    if extra:
        print_log(f"{name}: {_few(extra)} of {file} are not among the config's classes and will be left out", "current", 30)


def _ignore_index(cfg: Config) -> int:
    head = cfg.model.get("student", cfg.model).get("decode_head", {})
    first = head[0] if isinstance(head, (list, tuple)) else head
    return int(first.get("ignore_index", _IGNORED))


def _check_label_maps(dataset: Mapping[str, Any], cls: Any, count: int, ignored: int, name: str) -> None:
    default = inspect.signature(cls).parameters.get("reduce_zero_label")
    from_one = bool(dataset.get("reduce_zero_label", default.default if default is not None else False))
    built: Any = roots.DATASETS.build({**dataset, "lazy_init": True, "pipeline": [], "test_mode": False})
    entries = [entry for entry in built.load_data_list() if entry.get("seg_map_path")]
    if not entries:
        raise FileNotFoundError(
            f"{name}: no images with the suffix {built.img_suffix!r} in {built.data_prefix.get('img_path')}; set data_root, or "
            "the data set's img_suffix"
        )
    last = count if from_one else count - 1
    count_read = min(len(entries), MAX_LABEL_MAPS)
    for i in range(count_read):
        file = Path(entries[i * len(entries) // count_read]["seg_map_path"])
        if not file.is_file():
            raise FileNotFoundError(f"{name}: label map {file} does not exist; every image needs one of its name")
        with Image.open(file) as image:
            values = np.unique(np.asarray(image))
        wrong = [int(value) for value in values if value > last and value not in (ignored, _IGNORED if from_one else ignored)]
        if wrong:
            raise DataError(
                f"{name}: label map {file} holds the value {wrong[0]}, but the {count} classes are 0 .. {last}"
                + (" (0 = unlabelled, reduce_zero_label)" if from_one else "")
                + f" and {ignored} is ignored. Bring the maps to these values, or set classes, num_classes and ignore_index"
            )


def _few(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
