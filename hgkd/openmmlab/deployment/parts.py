"""What of a detector or segmentor goes into a graph, and the refusal, by name, of what cannot.

A part is taken when the methods that it is used by are the ones that :mod:`hgkd.openmmlab.deployment.graphs` has as tensor
operations; a class that overrides one of them would do something else, and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import nn

from hgkd.errors import InvalidValueError
from hgkd.openmmlab.weights import Pixels, prepared_pixels


@dataclass(frozen=True)
class NMSRule:
    """What of a head's candidates is kept, from its ``test_cfg``.

    Attributes:
        score: least score; ``inclusive``: it may be equal.
        iou: boxes of one class that overlap more are one object.
        before: candidates of a level before the NMS; not positive: all.
        most: boxes after it; not positive: all.
        least_side: boxes must be larger than this, in pixels; None: any.
        class_agnostic: boxes of different classes count as one object, too.
    """

    score: float
    iou: float
    before: int
    most: int
    least_side: float | None = None
    inclusive: bool = False
    class_agnostic: bool = False


@dataclass(frozen=True)
class DetectorParts:
    """A detector that can leave.

    Attributes:
        model: mmdet's, in eval mode.
        kind: 'dense', 'yolox' or 'two-stage'.
        pixels: mean, std and order of its channels.
        divisor, pad_value: of its padding, in normalised values.
        rule: of its results.
        proposals: of a first stage.
    """

    model: nn.Module
    kind: str
    pixels: Pixels
    divisor: int
    pad_value: float
    rule: NMSRule
    proposals: NMSRule | None = None


@dataclass(frozen=True)
class SegmentorParts:
    """A segmentor that can leave: mmseg's model in eval mode, its pixels, and the threshold of a head of one class."""

    model: nn.Module
    pixels: Pixels
    threshold: float | None


def detector_parts(model: Any, pipeline: Any) -> DetectorParts:
    """Check a detector of mmdet's.

    Args:
        model: in eval mode.
        pipeline: of its test pictures, as config.

    Raises:
        ValueError: something of it has no graph; the message names it.
    """
    from mmdet.models import data_preprocessors, dense_heads, detectors, roi_heads
    from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
    from mmdet.models.roi_heads.bbox_heads import BBoxHead
    from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor

    preprocessor = model.data_preprocessor
    _same(preprocessor, data_preprocessors.DetDataPreprocessor, "forward")
    pixels = _pixels(preprocessor, preprocessor._channel_conversion, preprocessor._enable_normalize, pipeline)
    padding = int(preprocessor.pad_size_divisor), float(preprocessor.pad_value)
    if isinstance(model, detectors.TwoStageDetector):
        _same(model, detectors.TwoStageDetector, "predict", "extract_feat")
        first, second = model.rpn_head, model.roi_head
        if first is None:
            _refuse(model, "has no RPN")
        _same(first, dense_heads.RPNHead, "_predict_by_feat_single", "_bbox_post_process")
        _same(first, BaseDenseHead, "predict", "predict_by_feat")
        if getattr(second, "with_mask", False):
            _refuse(second.mask_head, "gives masks, which no graph here has")
        _same(second, roi_heads.StandardRoIHead, "predict", "predict_bbox", "_bbox_forward")
        _same(second.bbox_head, BBoxHead, "predict_by_feat", "_predict_by_feat_single")
        if second.bbox_head.custom_cls_channels or not second.bbox_head.with_reg or not second.bbox_head.with_cls:
            _refuse(second.bbox_head, "has an activation of its own, or no boxes or classes")
        _same(second.bbox_roi_extractor, SingleRoIExtractor, "forward", "map_roi_levels")
        for layer in second.bbox_roi_extractor.roi_layers:
            if type(layer).__name__ != "RoIAlign" or layer.pool_mode != "avg":
                _refuse(layer, "is another pooling of regions than the mean of RoIAlign")
        rule = replace(_rule(second.bbox_head, second.test_cfg), least_side=None)  # a box head asks for none
        return DetectorParts(model, "two-stage", pixels, *padding, rule, proposals=_rule(first, first.test_cfg, -1.0))
    _same(model, detectors.SingleStageDetector, "predict", "extract_feat")
    head = model.bbox_head
    if isinstance(head, dense_heads.YOLOXHead):
        _same(head, dense_heads.YOLOXHead, "predict_by_feat", "_bbox_post_process", "_bbox_decode", "forward")
        return DetectorParts(model, "yolox", pixels, *padding, _rule(head, head.test_cfg, inclusive=True, cut=False))
    _same(head, BaseDenseHead, "predict", "predict_by_feat", "_predict_by_feat_single", "_bbox_post_process")
    if not hasattr(head, "loss_cls"):  # SSD's
        _refuse(head, "has no loss_cls, without which mmdet's own inference fails, and a graph is compared with that")
    if getattr(head.loss_cls, "custom_cls_channels", False):
        _refuse(head, "has an activation of its own")
    if _maps_of_a_level(model) != 2:
        _refuse(head, "multiplies its scores by a third map (a centre-ness or an IoU), which no graph here has")
    return DetectorParts(model, "dense", pixels, *padding, _rule(head, head.test_cfg))


def segmentor_parts(model: Any, pipeline: Any) -> SegmentorParts:
    """Check a segmentor of mmseg's; arguments and errors as :func:`detector_parts`."""
    from mmseg.models import EncoderDecoder, SegDataPreProcessor
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead

    _same(
        model, EncoderDecoder, "predict", "extract_feat", "encode_decode", "whole_inference", "inference", "postprocess_result"
    )
    preprocessor = model.data_preprocessor
    _same(preprocessor, SegDataPreProcessor, "forward")
    if preprocessor.test_cfg:
        _refuse(preprocessor, f"pads test pictures (test_cfg={dict(preprocessor.test_cfg)})")
    if model.test_cfg.get("mode", "whole") != "whole":
        _refuse(model, f"looks at a picture in windows (test_cfg.mode={model.test_cfg.mode!r}), and a graph sees it whole")
    head = model.decode_head
    if isinstance(head, nn.ModuleList):
        _refuse(model, "has decode heads in a cascade")
    _same(head, BaseDecodeHead, "predict", "predict_by_feat")
    if model.out_channels > 256:
        _refuse(head, f"knows {model.out_channels} classes, and a label map holds 256")
    pixels = _pixels(preprocessor, preprocessor.channel_conversion, preprocessor._enable_normalize, pipeline)
    return SegmentorParts(model, pixels, float(head.threshold) if model.out_channels == 1 else None)


def _pixels(preprocessor: Any, turned: bool, normalised: bool, pipeline: Any) -> Pixels:
    described: Mapping[str, Any] = {"bgr_to_rgb": turned}
    if normalised:
        described |= {name: getattr(preprocessor, name).flatten().tolist() for name in ("mean", "std")}  # type: ignore[operator]
    pixels = prepared_pixels(described, pipeline)
    if pixels is None:
        raise InvalidValueError(
            "model-pixels-unknown",
            "the test pipeline normalises pictures by a step of its own (Normalize), which a graph does not hold; move "
            "mean and std into model.data_preprocessor",
        )
    return pixels


def _rule(head: nn.Module, cfg: Any, score: float | None = None, inclusive: bool = False, cut: bool = True) -> NMSRule:
    """A head's thresholds; ``score`` in place of its own, ``cut`` whether it keeps the best alone."""
    suppression = dict(cfg.nms)
    known = {"type", "iou_threshold", "class_agnostic", "split_thr"}  # split_thr saves memory and changes nothing
    if suppression.get("type", "nms") != "nms" or suppression.keys() - known:
        _refuse(head, f"keeps its boxes by {suppression}, and a graph has plain NMS by {', '.join(sorted(known))}")
    least = cfg.get("min_bbox_size", -1) if cut else -1
    return NMSRule(
        score=float(cfg.get("score_thr", 0)) if score is None else score,
        iou=float(suppression["iou_threshold"]),
        before=int(cfg.get("nms_pre", -1)),
        most=int(cfg.get("max_per_img", -1)) if cut else -1,
        least_side=float(least) if least >= 0 else None,
        inclusive=inclusive,
        class_agnostic=bool(suppression.get("class_agnostic", False)),
    )


@torch.no_grad()
def _maps_of_a_level(model: Any) -> int:
    """How many maps a one-stage head gives of each level; asked of the head, as RTMDet's inherits a centre-ness without use."""
    return len(model.bbox_head(model.extract_feat(torch.zeros(1, 3, 256, 256))))


def _same(part: Any, base: type, *methods: str) -> None:
    """Raise ValueError unless ``part`` is of ``base`` and has its very methods."""
    if not isinstance(part, base):
        _refuse(part, f"is no {base.__name__}")
    for method in methods:
        if getattr(type(part), method) is not getattr(base, method):
            _refuse(part, f"has a {method} of its own")


def _refuse(part: object, why: str) -> NoReturn:
    raise InvalidValueError(
        "model-part-without-graph",
        f"{type(part).__name__} {why}; it leaves as weights for its library (--to mmdet or mmseg). Graphs are there for "
        "one-stage detectors over anchors or points (RetinaNet, RTMDet), YOLOX, Faster R-CNN, and segmentors that see a "
        "picture whole",
    )
