"""Settings of evaluators, checkpoints and heads that mmdet and mmseg would trip on after the first epoch, or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.config import Config

from hgkd.errors import DataError

_COCO_ITEMS = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")
_RECALLS = ("AR@100", "AR@300", "AR@1000", "AR_s@1000", "AR_m@1000", "AR_l@1000")
_IOU_KEYS = {"mIoU": ("mIoU", "mAcc"), "mDice": ("mDice", "mAcc"), "mFscore": ("mFscore", "mPrecision", "mRecall")}


def evaluator_of(loader: str) -> str:
    """The key of the evaluator that measures on a dataloader."""
    return loader.replace("_dataloader", "_evaluator")


def evaluators_of(cfg: Mapping[str, Any], loader: str) -> Iterator[Mapping[str, Any]]:
    """The metrics that measure on a dataloader, inside an evaluator of several too."""
    given = cfg.get(evaluator_of(loader)) or []
    for part in [given] if isinstance(given, Mapping) else given:
        inner = part.get("metrics")
        yield from [inner] if isinstance(inner, Mapping) else inner or [part]


def type_name(part: Mapping[str, Any]) -> str:
    """The name of what a config's part builds, without its scope."""
    given = part.get("type", "")
    return str(getattr(given, "__name__", given)).rpartition(".")[2]


def coco_metrics(evaluator: Mapping[str, Any]) -> list[str]:
    """Measures of a CocoMetric: 'bbox', 'segm', ..."""
    return _listed(evaluator.get("metric", "bbox"))


def check_coco_metric(evaluator: Mapping[str, Any], model: Mapping[str, Any], name: str) -> None:
    """Refuse what CocoMetric would refuse after the first epoch.

    Raises:
        DataError: unknown items, too few numbers of proposals, or masks of a model that predicts none.
    """
    items = evaluator.get("metric_items")
    known = {*_COCO_ITEMS, *_RECALLS}
    if items is not None and (isinstance(items, str) or not set(items) <= known):
        raise DataError(
            "metric-items-unknown", f"{name}.metric_items={items!r}, needed is a list of some of {', '.join(sorted(known))}"
        )
    numbers = evaluator.get("proposal_nums", (100, 300, 1000))
    # its own evaluation in several processes sums up otherwise
    if not evaluator.get("use_mp_eval") and (not isinstance(numbers, Sequence) or len(numbers) < 3):
        raise DataError(
            "proposal-nums-wrong",
            f"{name}.proposal_nums={numbers!r}, needed are three numbers of boxes an image, like (1, 10, 100)",
        )
    if "segm" in coco_metrics(evaluator) and not _mentions_masks(model):
        raise DataError(
            "metric-needs-masks",
            f"{name}.metric={evaluator['metric']!r} measures masks, but the model predicts none; set {name}.metric='bbox', or "
            "take a model with masks",
        )


def check_all_measured(dataset: Mapping[str, Any], evaluator: Mapping[str, Any], loader: str) -> None:
    """Refuse a data set that leaves out images whose objects its evaluator's own file holds: all of them would be missed.

    Raises:
        DataError: ``indices``, or a filter without ``test_mode``.
    """
    if not evaluator.get("ann_file"):
        return
    if dataset.get("indices") is not None:
        raise DataError(
            "indices-leave-images-out",
            f"{loader}: indices={dataset['indices']!r} leaves out images whose objects {evaluator_of(loader)}.ann_file counts "
            "as missed; write an annotation file of the images that are meant, and set it for both",
        )
    if any((dataset.get("filter_cfg") or {}).values()) and not dataset.get("test_mode"):
        raise DataError(
            "filter-leaves-images-out",
            f"{loader}: filter_cfg={dict(dataset['filter_cfg'])} leaves out images that {evaluator_of(loader)}.ann_file "
            "counts; set test_mode=True in the data set",
        )


def check_iou_metric(evaluator: Mapping[str, Any], name: str) -> None:
    """Refuse measures that IoUMetric does not know.

    Raises:
        DataError: one of those.
    """
    asked = _listed(evaluator.get("iou_metrics", "mIoU"))
    if not set(asked) <= _IOU_KEYS.keys():
        raise DataError(
            "iou-metric-unknown", f"{name}.iou_metrics={asked!r}, needed is a list of some of {', '.join(sorted(_IOU_KEYS))}"
        )


def check_best(cfg: Config) -> None:
    """Refuse a checkpoint hook that keeps the best of a score which no evaluator gives.

    Raises:
        DataError: the scores of all evaluators are known, and this is none of them.
    """
    asked = _listed(((cfg.get("default_hooks") or {}).get("checkpoint") or {}).get("save_best") or [])
    scores: set[str] = set()
    for evaluator in evaluators_of(cfg, "val_dataloader"):
        found = _scores(evaluator)
        if not found:
            return
        scores |= found
    unknown = [key for key in asked if key != "auto" and key not in scores]
    if unknown and scores:
        raise DataError(
            "save-best-unknown",
            f"default_hooks.checkpoint.save_best={unknown[0]!r} is no score of val_evaluator, which gives "
            f"{', '.join(sorted(scores))}; set one of them, or 'auto' for the first",
        )


def _scores(evaluator: Mapping[str, Any]) -> set[str]:
    """The scores that a metric gives; none where they are not known."""
    kind = type_name(evaluator)
    if kind == "IoUMetric":
        prefix = ""
        keys = {"aAcc", *(key for measure in _listed(evaluator.get("iou_metrics", "mIoU")) for key in _IOU_KEYS[measure])}
    elif kind == "CocoMetric" and not evaluator.get("classwise"):
        prefix = "coco"
        items = evaluator.get("metric_items")
        keys = set()
        for metric in coco_metrics(evaluator):
            if metric in ("bbox", "segm"):
                keys |= {f"{metric}_{item}" for item in items or _COCO_ITEMS}
            elif metric == "proposal":
                keys |= set(items or _RECALLS)
            else:
                keys |= {f"AR@{number}" for number in evaluator.get("proposal_nums", (100, 300, 1000))}
    else:
        return set()
    prefix = evaluator.get("prefix") or prefix
    return {f"{prefix}/{key}" if prefix else key for key in keys}


def check_pixel_heads(heads: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse heads of a segmentor whose cross entropy cannot be.

    Args:
        heads: by their paths.

    Raises:
        DataError: a softmax over one output, whose loss is 0, or weights for another number of classes.
    """
    for path, head in heads.items():
        outputs = head.get("out_channels") or head.get("num_classes")
        losses = head.get("loss_decode") or {"type": "CrossEntropyLoss"}
        for loss in [losses] if isinstance(losses, Mapping) else losses:
            if type_name(loss) != "CrossEntropyLoss":
                continue
            if outputs == 1 and not loss.get("use_sigmoid"):
                raise DataError(
                    "pixel-head-of-one-output",
                    f"{path} has one output and a softmax over it, whose loss is always 0. "
                    + (
                        f"Set {path}.loss_decode.use_sigmoid=True"
                        if head.get("num_classes") == 2
                        else f"Call what is no object a class, too: metainfo.classes=('background', NAME), and set "
                        f"{path}.num_classes=2"
                    ),
                )
            weights = loss.get("class_weight")
            if isinstance(weights, (list, tuple)) and not loss.get("use_sigmoid") and len(weights) != outputs:
                raise DataError(
                    "class-weights-differ",
                    f"{path}.loss_decode.class_weight has {len(weights)} weights, but the head {outputs} classes; give each "
                    "class one, in their order",
                )


def _mentions_masks(part: object) -> bool:
    """Whether a key of a model's config, but for the padding of images, has to do with masks."""
    if isinstance(part, Mapping):
        inner = {str(key): value for key, value in part.items() if key != "data_preprocessor" and value}
        return any("mask" in key for key in inner) or any(map(_mentions_masks, inner.values()))
    return isinstance(part, (list, tuple)) and any(map(_mentions_masks, part))


def _listed(given: str | Sequence[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)
