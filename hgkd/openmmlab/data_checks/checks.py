"""Checks of a data set before a detector or segmentor is trained on it: files, categories, label values.

mmdet drops a class that the annotation file calls otherwise, mmsegmentation lets a label out of range reach the loss. Both are
said here, with the file, before the model is built; so is an evaluator that measures something else than the data set.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DefaultScope

from hgkd.errors import DataError, MissingFileError, abbreviate
from hgkd.openmmlab.config import dataset_class, datasets_of
from hgkd.openmmlab.data_checks.annotation_files import AnnotationUse, BoxCounts, check_annotation_file, listing
from hgkd.openmmlab.data_checks.label_maps import IGNORED, check_label_maps
from hgkd.openmmlab.heads import class_heads, pixel_heads
from hgkd.openmmlab.measures import (
    check_all_measured,
    check_best,
    check_coco_metric,
    check_iou_metric,
    check_pixel_heads,
    coco_metrics,
    evaluator_of,
    evaluators_of,
    type_name,
)
from hgkd.openmmlab.xml_files import check_xml_files

# data sets whose classes are not their heads': panoptic ones divide them into things and stuff, trackers detect some of them
_OTHER_CLASSES = {"CocoPanopticDataset", "MOTChallengeDataset"}


def check_data(cfg: Config, loaders: Sequence[str]) -> list[str]:
    """Check the data sets of these dataloaders against the files, the model's heads and the evaluators.

    Returns:
        What is no error, but should be in the run's log.

    Raises:
        FileNotFoundError: a folder, an annotation file, a label map or an image is missing; of training images a tenth may be.
        DataError: categories that do not agree with the config, annotations or label maps that cannot be used, or that the
            evaluators would not measure.
    """
    remarks: list[str] = []
    orders: dict[frozenset[str], tuple[str, ...]] = {}
    model = cfg.model.get("student", cfg.model)
    check = _check_detection if cfg.default_scope == "mmdet" else _check_segmentation
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        heads = {path: head["num_classes"] for path, head in class_heads(model, "model")}
        for name in loaders:
            if not cfg.get(name):
                continue
            _check_workers(cfg[name], name)
            datasets = list(datasets_of(cfg, [name]))
            for dataset in datasets:
                cls = dataset_class(dataset, cfg.default_scope)
                classes = class_names(dataset, cls, f"{name}.dataset")
                # mmdet counts the colours when it draws
                _check_palette(dataset, len(classes) if cfg.default_scope == "mmseg" else 0, f"{name}.dataset")
                if not _is_a(cls, *_OTHER_CLASSES):
                    _check_heads(heads, classes, name)
                _check_order(orders, classes, name)
                _check_folders(dataset, name)
            remarks += check(cfg, model, datasets, name)
        if "train_dataloader" in loaders:
            check_best(cfg)
    return remarks


def _check_detection(cfg: Config, model: Mapping[str, Any], datasets: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    from mmdet.datasets import CocoDataset

    remarks: list[str] = []
    read: list[tuple[Path, BoxCounts]] = []
    evaluators = list(evaluators_of(cfg, name))
    measured = [part for part in evaluators if type_name(part) == "CocoMetric" and not part.get("format_only")]
    for dataset in datasets:
        cls = dataset_class(dataset, cfg.default_scope)
        coco = _is_a(cls, "CocoDataset")
        if not (coco or dataset.get("ann_file")):
            continue
        file = _annotation_file(dataset, name)
        if len(datasets) == 1:
            _check_evaluated_file(evaluators, file, name)
        for part in measured:
            check_all_measured(dataset, part, name)
        stock = all(getattr(cls, part, 0) is getattr(CocoDataset, part) for part in ("load_data_list", "parse_data_info"))
        if coco and not _is_a(cls, "CocoPanopticDataset") and (stock or file.suffix == ".json"):
            steps = [step for step in dataset.get("pipeline") or [] if step.get("with_mask")]
            use = AnnotationUse(
                stock=stock,
                # without a file of its own a metric measures by what the data set hands on
                masks=bool(steps) or any("segm" in coco_metrics(part) for part in measured if not part.get("ann_file")),
                polygons=any(step.get("poly2mask") is False for step in steps),
                metrics=frozenset(metric for part in measured if part.get("ann_file") for metric in coco_metrics(part)),
            )
            said, boxes = check_annotation_file(file, dataset, class_names(dataset, cls, name), use, name)
            remarks += said
            if use.stock:
                read.append((file, boxes))
        elif _is_a(cls, "XMLDataset"):
            remarks += check_xml_files(dataset, file, class_names(dataset, cls, name), name)
    for part in measured:
        check_coco_metric(part, model, evaluator_of(name))
    # one of several data sets may be without objects: unlabelled images
    if len(read) == len(datasets) and not any(boxes.usable for _, boxes in read) and (name == "train_dataloader" or measured):
        raise DataError(
            "no-usable-boxes",
            f"{name}: no object that mmdet can use: "
            + "; ".join(f"{file}: {boxes}" for file, boxes in read)
            + ". Boxes are x, y, width, height in pixels; correct the file",
        )
    return remarks


def _check_evaluated_file(evaluators: Sequence[Mapping[str, Any]], file: Path, name: str) -> None:
    for evaluator in evaluators:
        if not evaluator.get("ann_file"):
            continue
        other, key = Path(evaluator["ann_file"]), f"{evaluator_of(name)}.ann_file"
        if not other.is_file():
            raise MissingFileError(
                "evaluated-file-missing", f"{key}: {other} does not exist; set it to the file of {name}, {file}"
            )
        if os.path.realpath(other) != os.path.realpath(file) and _differ(other, file):
            raise DataError(
                "evaluated-file-differs",
                f"{key}={str(other)!r} lists other images or categories than {name} reads from {str(file)!r}, so the measure "
                "would be wrong; set both to the same file",
            )


def _differ(one: Path, other: Path) -> bool:
    """Whether two annotation files are of different data; False where it cannot be told."""
    try:
        return listing(one) != listing(other)
    except (ValueError, KeyError, TypeError):
        return False


def _check_segmentation(cfg: Config, model: Mapping[str, Any], datasets: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    remarks: list[str] = []
    labelled: list[bool] = []
    by_path = dict(pixel_heads(model))
    check_pixel_heads(by_path)
    ignored = {f"{path}.ignore_index": int(head.get("ignore_index", IGNORED)) for path, head in by_path.items()}
    evaluators = list(evaluators_of(cfg, name))
    if evaluators and all(part.get("format_only") for part in evaluators):
        return []  # a test set whose labels are not public
    measure = next((part for part in evaluators if type_name(part) == "IoUMetric" and not part.get("format_only")), None)
    heads = ignored
    if measure is not None:
        check_iou_metric(measure, evaluator_of(name))
        key, value = f"{evaluator_of(name)}.ignore_index", int(measure.get("ignore_index", IGNORED))
        ignored = {key: value}
        remarks += [f"{key}={value}, but {path}={index}" for path, index in heads.items() if index != value]
    for dataset in datasets:
        cls = dataset_class(dataset, cfg.default_scope)
        classes = class_names(dataset, cls, name)
        if not classes or not _is_a(cls, "BaseSegDataset", "BaseCDDataset"):
            continue
        said, any_label = check_label_maps(dataset, len(classes), ignored, name)
        remarks += said
        labelled.append(any_label)
        if name == "train_dataloader":
            _check_padding(model.get("data_preprocessor") or {}, heads, len(classes))
    if len(labelled) == len(datasets) and not any(labelled):
        raise DataError(
            "label-maps-all-ignored",
            f"{name}: no place of any label map has a class, all are ignored; "
            "correct the maps, ignore_index, or reduce_zero_label",
        )
    return remarks


def _check_padding(preprocessor: Mapping[str, Any], heads: Mapping[str, int], count: int) -> None:
    """Check what fills the labels of images that are smaller than the batch."""
    if preprocessor.get("size") is None and preprocessor.get("size_divisor") is None:
        return
    value = preprocessor.get("seg_pad_val", IGNORED)
    for key, index in heads.items():
        if value != index and not 0 <= value < count:
            raise DataError(
                "padding-value-not-ignored",
                f"model.data_preprocessor.seg_pad_val={value} is neither one of the {count} classes nor what {key}={index} "
                f"ignores; set model.data_preprocessor.seg_pad_val={index}",
            )


def _is_a(cls: type, *names: str) -> bool:
    return any(base.__name__ in names for base in cls.__mro__)


def class_names(dataset: Mapping[str, Any], cls: type, name: str) -> tuple[str, ...]:
    """The names of a data set's classes, or none where only its files have them.

    Args:
        dataset: its config.
        cls: its class.
        name: of the config, for the message.

    Raises:
        DataError: they are no tuple of names, as ``('cell')`` is none.
    """
    metainfo = dataset.get("metainfo")
    if not isinstance(metainfo, (Mapping, type(None))):
        raise DataError(
            "metainfo-not-a-dict", f"{name}.metainfo={metainfo!r}, needed is a dict: metainfo=dict(classes=('first', 'second'))"
        )
    for key in ("CLASSES", "PALETTE"):
        if key in (metainfo or {}):
            raise DataError("metainfo-key-case", f"{name}.metainfo.{key} is read by nobody; call it {key.lower()}")
    if metainfo and "classes" in metainfo:
        return _names(metainfo["classes"], f"{name}.metainfo.classes")
    own = getattr(cls, "METAINFO", {}).get("classes")
    return () if own is None else _names(own, f"{cls.__name__}.METAINFO['classes']")


def _names(given: Sequence[str] | str | None, place: str) -> tuple[str, ...]:
    if isinstance(given, str):
        if not os.path.isfile(given):  # mmengine takes a text for a file of names, or as it is: letters
            raise DataError(
                "class-names-are-a-text",
                f"{place}={given!r} is a text, needed is a tuple of names, or a file of one name a line; for one class write "
                f"({given!r},), with the comma",
            )
        place = f"{place}={given!r}"
        given = Path(given).read_text(encoding="utf-8").splitlines()
    texts = isinstance(given, (list, tuple)) and all(isinstance(label, str) and label.strip() for label in given)
    if not texts or not given:
        raise DataError(
            "class-names-not-names", f"{place}: {given!r} is no tuple of names like ('first', 'second'), none of them empty"
        )
    twice = next((label for label in given if given.count(label) > 1), None)
    if twice is not None:
        raise DataError("class-named-twice", f"{place} names {twice!r} more than once; give every class a name of its own")
    return tuple(given)


def _check_palette(dataset: Mapping[str, Any], count: int, name: str) -> None:
    """Refuse what is no list of colours, or of fewer than ``count``."""
    palette = (dataset.get("metainfo") or {}).get("palette")
    if palette is None or (isinstance(palette, (list, tuple)) and not palette):
        return
    triples = isinstance(palette, (list, tuple)) and all(
        isinstance(colour, (list, tuple)) and len(colour) == 3 and all(isinstance(part, int) for part in colour)
        for colour in palette
    )
    if not triples or len(palette) < count:
        raise DataError(
            "palette-not-colours",
            f"{name}.metainfo.palette={palette!r}, needed is a list of colours, one a class, like [(255, 0, 0)] for one class; "
            "set it to [] for random colours",
        )


def _check_heads(heads: Mapping[str, int], classes: Sequence[str], name: str) -> None:
    for path, count in heads.items():
        if classes and count != len(classes):
            raise DataError(
                "head-classes-differ",
                f"{path}.num_classes={count}, but the data set of {name} has {len(classes)} classes ({abbreviate(classes)}); "
                f"set {path}.num_classes={len(classes)}, or the data set's metainfo.classes",
            )


def _check_workers(loader: Mapping[str, Any], name: str) -> None:
    if loader.get("drop_last") and name != "train_dataloader":
        raise DataError("test-loader-drops-images", f"{name}.drop_last=True leaves images out of the measure; set it to False")
    if loader.get("persistent_workers") and not loader.get("num_workers"):
        raise DataError(
            "persistent-without-workers",
            f"{name}.persistent_workers=True, but num_workers=0: there is nobody to stay; set {name}.persistent_workers=False",
        )


def _check_order(orders: dict[frozenset[str], tuple[str, ...]], classes: tuple[str, ...], name: str) -> None:
    before = orders.setdefault(frozenset(classes), classes)
    if before != classes:
        raise DataError(
            "classes-in-other-order",
            f"{name} has the classes {classes}, another data set the same in the order {before}; numbers would mean different "
            "classes. Give all data sets the same metainfo.classes",
        )


def _check_folders(dataset: Mapping[str, Any], name: str) -> None:
    root = Path(dataset.get("data_root") or "")
    if not root.is_dir():
        raise MissingFileError("data-folder-missing", f"{name}: folder {root} does not exist; set --cfg-options data_root=DIR")
    for key, folder in (dataset.get("data_prefix") or {}).items():
        if folder is not None and not (root / folder).is_dir():
            raise MissingFileError(
                "data-prefix-missing",
                f"{name}: folder {root / folder} does not exist (data_prefix.{key}={folder!r} under data_root={str(root)!r}); "
                "set data_root, or the data set's data_prefix",
            )


def _annotation_file(dataset: Mapping[str, Any], name: str) -> Path:
    file = Path(dataset.get("data_root") or "") / dataset.get("ann_file", "")
    if not file.is_file():
        raise MissingFileError(
            "annotation-file-missing",
            f"{name}: annotation file {file} does not exist; "
            f"set data_root to the folder that holds {dataset.get('ann_file')!r}",
        )
    return file
