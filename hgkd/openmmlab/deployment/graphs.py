"""Whole detectors and segmentors as one function of a picture, in a form that ``torch.export`` follows at free sides.

Network, anchors and decoding of boxes are mmdet's and mmseg's own modules and functions. What they write with loops and
branches over data (thresholds, top k, NMS, choice of a pyramid level) stands here once more, in tensor operations, and every
export is compared with their own inference. NMS and RoIAlign are torchvision's operators, which ONNX has as NonMaxSuppression
and RoiAlign; one NMS serves all classes, as in mmcv's ``batched_nms``: boxes of different classes are moved apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import nms, roi_align

from hgkd.openmmlab.deployment.parts import DetectorParts, NMSRule, SegmentorParts


class Picture(nn.Module):
    """An RGB picture, uint8 (1, 3, H, W) -> what the model's network takes: normalised, padded at its right and lower side."""

    mean: Tensor
    std: Tensor

    def __init__(self, pixels: Any, divisor: int, value: float) -> None:
        super().__init__()
        self.turned, self.divisor, self.value = pixels.order == "BGR", divisor, value
        self.normalised = pixels.mean is not None
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(pixels, name) or (0.0,)).view(-1, 1, 1))

    def forward(self, picture: Tensor) -> Tensor:
        x = picture.flip(1) if self.turned else picture
        x = x.float()
        if self.normalised:
            x = (x - self.mean) / self.std
        if self.divisor > 1:
            height, width = picture.shape[-2:]
            x = functional.pad(x, (0, -width % self.divisor, 0, -height % self.divisor), value=self.value)
        return x


class DetectorNetwork(nn.Module):
    """The first half of a detector: a picture, uint8 RGB (1, 3, H, W), to maps.

    Returns:
        of each level of the head (of a first stage, its RPN) one map (1, C, h, w) of all that it gives; of two stages also the
        features of each level that regions are pooled from; and (4,) W, H, W, H of the picture, float.
    """

    def __init__(self, parts: DetectorParts) -> None:
        super().__init__()
        self.picture = Picture(parts.pixels, parts.divisor, parts.pad_value)
        self.model, self.two_stages = parts.model, parts.proposals is not None

    def forward(self, picture: Tensor) -> tuple[Tensor, ...]:
        model, size = cast(Any, self.model), picture.shape[-2:]
        features = model.extract_feat(self.picture(picture))
        given = (model.rpn_head if self.two_stages else model.bbox_head)(features)
        maps = [torch.cat(level, 1) for level in zip(*given, strict=True)]
        pooled = features[: model.roi_head.bbox_roi_extractor.num_inputs] if self.two_stages else ()
        border = torch.stack([torch.full((), side, dtype=torch.float32) for side in (size[1], size[0])] * 2)
        return (*maps, *pooled, border)


class DetectorResults(nn.Module):
    """The second half: what :class:`DetectorNetwork` gives, to boxes (1, N, 4), x1 y1 x2 y2 in pixels of the picture, scores
    and labels (1, N), best first.

    Args:
        levels: number of maps; what follows are features.
    """

    def __init__(self, parts: DetectorParts, levels: int) -> None:
        super().__init__()
        model = cast(Any, parts.model)
        self.head = Coded(model.rpn_head if parts.proposals else model.bbox_head)
        self.roi_head = model.roi_head if parts.proposals else None
        self.parts_of = parts.kind, parts.rule, parts.proposals
        self.levels = levels

    def forward(self, *given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kind, rule, proposals = self.parts_of
        maps, features, border = given[: self.levels], given[self.levels : -1], given[-1]
        if kind == "yolox":
            found = self.head.of_every_place(maps)
        elif proposals is None:
            found = self.head.of_every_class(maps, rule.before, border)
        else:
            regions = _best(*self.head.of_every_level(maps, proposals.before, border), proposals)[0]
            found = self._second_stage(features, regions, border)
        boxes, scores, labels = _best(*found, rule)
        return boxes[None], scores[None], labels[None]

    def _second_stage(self, maps: Sequence[Tensor], proposals: Tensor, border: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Candidates of the box head: ``StandardRoIHead.predict_bbox`` and ``BBoxHead._predict_by_feat_single``."""
        stage = cast(Any, self.roi_head)
        head = stage.bbox_head
        # a region more of every level, dropped below, so that none is without one
        spare = proposals.new_tensor(_spares(stage.bbox_roi_extractor))
        regions = torch.cat([spare, proposals])
        features = _pooled(stage.bbox_roi_extractor, maps, regions)
        if stage.with_shared_head:
            features = stage.shared_head(features)
        logits, deltas = head(features)
        classes = head.num_classes
        each = 1 if head.reg_class_agnostic else classes
        rows = regions[:, None].expand(-1, each, 4).reshape(-1, 4)
        boxes = _decoded(head.bbox_coder, rows, deltas.reshape(-1, head.bbox_coder.encode_size), border)
        boxes = boxes.view(-1, each, 4).expand(-1, classes, 4)[len(spare) :]
        scores = logits.softmax(-1)[len(spare) :, :-1]
        labels = torch.arange(classes, device=scores.device).expand_as(scores)
        return boxes.reshape(-1, 4), scores.reshape(-1), labels.reshape(-1)


class Coded:
    """How the maps of a one-stage head, or of an RPN, become candidates: boxes (n, 4), scores, and labels or levels (n,)."""

    def __init__(self, head: Any) -> None:
        self.head = (head,)  # not as a module, whose weights are not used here
        self.classes: int = head.cls_out_channels

    def of_every_class(self, maps: Sequence[Tensor], most: int, border: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best of each level: ``BaseDenseHead._predict_by_feat_single``."""
        found = []
        for scores, deltas, priors in self._levels(maps):
            classes = scores.shape[1]
            best, places = _top(scores.flatten(), most)
            rows = places // classes
            found.append((priors[rows], deltas[rows], best, places % classes))
        return self._joined(found, border)

    def of_every_level(self, maps: Sequence[Tensor], most: int, border: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same with levels in the place of labels: ``RPNHead._predict_by_feat_single``."""
        found = []
        for level, (scores, deltas, priors) in enumerate(self._levels(maps)):
            best, rows = _top(scores[:, 0], most)
            found.append((priors[rows], deltas[rows], best, torch.full_like(rows, level)))
        return self._joined(found, border)

    def of_every_place(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """One a place: ``YOLOXHead.predict_by_feat``."""
        (head,) = self.head
        priors = head.prior_generator.grid_priors([m.shape[-2:] for m in maps], device=maps[0].device, with_stride=True)
        rows = torch.cat([_rows(m, self.classes + 5) for m in maps])
        scores, labels = rows[:, : self.classes].sigmoid().max(1)
        scores = scores * rows[:, -1].sigmoid()
        return head._bbox_decode(torch.cat(priors), rows[:, self.classes : -1]), scores, labels

    def _levels(self, maps: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of every level: scores (n, K), deltas (n, 4) and priors (n, 4 or 2)."""
        (head,) = self.head
        priors = head.prior_generator.grid_priors([m.shape[-2:] for m in maps], dtype=maps[0].dtype, device=maps[0].device)
        each = head.num_base_priors
        found = []
        for level, prior in zip(maps, priors, strict=True):
            logits, deltas = level.split([each * self.classes, each * head.bbox_coder.encode_size], 1)
            rows = _rows(logits, self.classes)
            scores = rows.sigmoid() if head.use_sigmoid_cls else rows.softmax(-1)[:, :-1]
            found.append((scores, _rows(deltas, head.bbox_coder.encode_size), prior))
        return found

    def _joined(self, found: Sequence[tuple[Tensor, ...]], border: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        priors, deltas, scores, labels = (torch.cat(part) for part in zip(*found, strict=True))
        return _decoded(self.head[0].bbox_coder, priors, deltas, border), scores, labels


def _rows(maps: Tensor, channels: int) -> Tensor:
    """(1, n * channels, h, w) -> (h * w * n, channels)."""
    return maps.permute(0, 2, 3, 1).reshape(-1, channels)


def _top(scores: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The ``most`` best of (n,) and their places; all of them, in their order, when it is not positive."""
    if most <= 0:
        return scores, torch.arange(scores.shape[0], device=scores.device)
    return torch.topk(scores, torch.sym_min(most, scores.shape[0]))


def _decoded(coder: Any, priors: Tensor, deltas: Tensor, border: Tensor) -> Tensor:
    """Boxes (n, 4) by a head's own coder, cut at the picture's border where it does so."""
    boxes: Tensor = coder.decode(priors, deltas, max_shape=None)
    return torch.minimum(boxes.clamp(min=0), border) if coder.clip_border else boxes


def _best(boxes: Tensor, scores: Tensor, labels: Tensor, rule: NMSRule) -> tuple[Tensor, Tensor, Tensor]:
    """What thresholds and NMS leave, best first."""
    kept = scores >= rule.score if rule.inclusive else scores > rule.score
    if rule.least_side is not None:
        kept = kept & ((boxes[:, 2:] - boxes[:, :2]) > rule.least_side).all(1)
    places = kept.nonzero()[:, 0]
    boxes, scores, labels = boxes[places], scores[places], labels[places]
    apart = boxes
    if not rule.class_agnostic:
        # mmcv's numbers, so that rounding is the same; the zero stands in where nothing was found
        step = torch.cat([boxes.reshape(-1), boxes.new_zeros(1)]).max() + 1
        apart = boxes + (labels.to(boxes) * step)[:, None]
    chosen = nms(apart, scores, rule.iou)
    if rule.most > 0:
        chosen = chosen[: rule.most]
    return boxes[chosen], scores[chosen], labels[chosen]


def _spares(extractor: Any) -> list[list[float]]:
    """A square box of every level's scale, so that no level is without a region."""
    sides = [extractor.finest_scale * 1.5 * 2.0**level for level in range(len(extractor.featmap_strides))]
    return [[0.0, 0.0, side, side] for side in sides]


def _pooled(extractor: Any, maps: Sequence[Tensor], regions: Tensor) -> Tensor:
    """Features (R, C, h, w) of regions, each from the level of its scale: ``SingleRoIExtractor.forward``."""
    rois = torch.cat([torch.zeros_like(regions[:, :1]), regions], 1)
    layers = extractor.roi_layers
    if len(layers) == 1:
        return _aligned(layers[0], maps[0], rois)
    levels = extractor.map_roi_levels(rois, len(layers))
    places = [(levels == level).nonzero()[:, 0] for level in range(len(layers))]
    pooled = torch.cat([_aligned(layer, m, rois[p]) for layer, m, p in zip(layers, maps, places, strict=False)])
    order = torch.cat(places)
    back = torch.zeros_like(levels).index_put((order,), torch.arange(order.shape[0], device=order.device))
    return pooled[back]


def _aligned(layer: Any, features: Tensor, rois: Tensor) -> Tensor:
    return roi_align(features, rois, layer.output_size, layer.spatial_scale, layer.sampling_ratio, layer.aligned)


class Detector(nn.Module):
    """Both halves: a picture, uint8 RGB (1, 3, H, W), to boxes, scores and labels."""

    def __init__(self, parts: DetectorParts) -> None:
        super().__init__()
        self.network = DetectorNetwork(parts)
        head = cast(Any, parts.model).rpn_head if parts.proposals else cast(Any, parts.model).bbox_head
        self.results = DetectorResults(parts, len(head.prior_generator.strides))

    def forward(self, picture: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = self.results(*self.network(picture))
        return found


class Segmentor(nn.Module):
    """A picture, uint8 RGB (1, 3, H, W) -> the class of every pixel, (1, H, W) uint8."""

    def __init__(self, parts: SegmentorParts) -> None:
        super().__init__()
        self.picture = Picture(parts.pixels, 1, 0.0)
        self.model, self.threshold = parts.model, parts.threshold

    def forward(self, picture: Tensor) -> Tensor:
        model = cast(Any, self.model)
        logits = model.decode_head.forward(model.extract_feat(self.picture(picture)))
        logits = functional.interpolate(logits, picture.shape[-2:], mode="bilinear", align_corners=model.align_corners)
        if self.threshold is not None:
            return (logits[:, 0].sigmoid() > self.threshold).to(torch.uint8)
        return logits.argmax(1).to(torch.uint8)


class AnySizePool(nn.Module):
    """``nn.AdaptiveAvgPool2d`` to (h, w) places as two products of matrices, which graphs have at free sides.

    Bin i of s over a side n holds the pixels from floor(i n / s) to ceil((i + 1) n / s).
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (self._means(bins, side, x) for bins, side in zip(self.size, x.shape[-2:], strict=True))
        return rows @ x @ columns.T

    @staticmethod
    def _means(bins: int, side: int, like: Tensor) -> Tensor:
        """(bins, side): how much of each pixel is in each bin's mean."""
        number = torch.arange(bins, device=like.device)[:, None]
        pixel = torch.arange(side, device=like.device)
        inside = (pixel >= number * side // bins) & (pixel * bins < (number + 1) * side)
        inside = inside.to(like.dtype)
        return inside / inside.sum(1, keepdim=True)
