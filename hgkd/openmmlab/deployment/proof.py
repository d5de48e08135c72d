"""Whether a graph says about pictures what mmdet's or mmseg's own inference says.

Runtimes add up in another order, so numbers differ in their last digits, and where two boxes nearly tie, NMS may keep the other
one. A detection counts as the same when label, score and all four sides agree within the tolerances. What has no partner, on
either side, is counted, and more than one in a hundred is a failure. A pixel of a label map may differ only where the library's
own logits of the two classes nearly tie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hgkd.export.job import ExportError

BOX_TOLERANCE, SCORE_TOLERANCE, TIE = 0.05, 1e-3, 1e-3
MISMATCHED = 0.01


@dataclass(frozen=True)
class Agreement:
    """How far a graph and a library agree.

    Attributes:
        pictures: compared.
        things: detections of the library, or pixels.
        mismatched: those without a partner, of both sides; pixels of another class.
        difference: the largest of boxes that are partners, in pixels; of logits at mismatched pixels, of the largest logit.
        score: the largest difference of their scores; 0 of pixels.
    """

    pictures: int
    things: int
    mismatched: int
    difference: float
    score: float

    def to_dict(self) -> dict[str, float]:
        return dict(vars(self))


def compare_detections(own: Sequence[tuple[Tensor, ...]], found: Sequence[tuple[Tensor, ...]], reader: str) -> Agreement:
    """Compare boxes, scores and labels of pictures.

    Args:
        own: of the library.
        found: of the graph.
        reader: what ran it, for messages.

    Raises:
        ExportError: values are not finite, nothing was detected, or too much has no partner.
    """
    things = mismatched = 0
    box = score = 0.0
    for expected, result in zip(own, found, strict=True):
        _require_finite(expected[:2], "the library's own inference")
        _require_finite(result[:2], reader)
        pairs, gaps = _partners(expected, result)
        things += len(expected[1])
        mismatched += len(expected[1]) + len(result[1]) - 2 * pairs
        box, score = max(box, gaps[0]), max(score, gaps[1])
    if not things:
        raise ExportError(
            "proof-without-detections",
            f"the detector finds nothing in these {len(own)} pictures, so nothing can be compared; give --images with pictures "
            "in which it finds something, or train it for longer",
        )
    if not mismatched <= MISMATCHED * things:
        raise ExportError(
            "detections-differ",
            f"{mismatched} of {things} detections have no partner after reading back with {reader}; {MISMATCHED:.0%} may",
        )
    return Agreement(len(own), things, mismatched, box, score)


def _partners(own: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> tuple[int, tuple[float, float]]:
    """Number of pairs, each detection in one, and the largest differences of their boxes and scores."""
    box = (own[0][:, None] - found[0][None]).abs().amax(-1)  # (N, M)
    score = (own[1][:, None] - found[1][None]).abs()
    same = (box <= BOX_TOLERANCE) & (score <= SCORE_TOLERANCE) & (own[2][:, None] == found[2][None])
    pairs, gaps = 0, (0.0, 0.0)
    for row in range(len(same)):
        free = same[row].nonzero()[:, 0]
        if not len(free):
            continue
        column = free[box[row, free].argmin()]
        same[:, column] = False
        pairs, gaps = pairs + 1, (max(gaps[0], float(box[row, column])), max(gaps[1], float(score[row, column])))
    return pairs, gaps


def compare_label_maps(own: Sequence[tuple[Tensor, ...]], found: Sequence[Tensor], reader: str) -> Agreement:
    """Compare label maps (1, H, W) pixel by pixel; arguments as :func:`compare_detections`, ``own`` with logits (K, H, W).

    Raises:
        ExportError: logits are not finite, shapes differ, or a pixel differs where the library's logits do not tie.
    """
    things = mismatched = 0
    widest = 0.0
    for (classes, logits), result in zip(own, found, strict=True):
        _require_finite((logits,), "the library's own inference")
        if classes.shape != result.shape:
            raise ExportError(
                "export-shape-differs",
                f"the label map is {tuple(result.shape)} after reading back with {reader}, {tuple(classes.shape)} before",
            )
        differs = classes[0] != result[0]
        things += differs.numel()
        mismatched += int(differs.sum())
        if differs.any():
            widest = max(widest, _gap(logits, classes[0], result[0], differs))
    if not widest <= TIE:
        raise ExportError(
            "label-maps-differ",
            f"{mismatched} of {things} pixels have another class after reading back with {reader}, and the library's logits of "
            f"the two differ by up to {widest:.1e} of the largest; at most {TIE} is a tie",
        )
    return Agreement(len(own), things, mismatched, widest, 0.0)


def _gap(logits: Tensor, own: Tensor, found: Tensor, differs: Tensor) -> float:
    """How far the logits of two classes lie apart where they differ, relative to the largest logit; of one class, its
    probability from the threshold."""
    if len(logits) == 1:
        return float("inf") if differs.float().mean() > TIE else 0.0
    if int(found.max()) >= len(logits):
        return float("inf")
    picked = [logits.gather(0, classes.long()[None])[0][differs] for classes in (own, found)]
    return float((picked[0] - picked[1]).abs().max() / logits.abs().max())


def _require_finite(values: Sequence[Tensor], who: str) -> None:
    if not all(torch.isfinite(value).all() for value in values):
        raise ExportError("export-outputs-not-finite", f"{who} gives NaN or infinite values; export an earlier checkpoint")
