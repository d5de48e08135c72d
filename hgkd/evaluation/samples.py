"""What a model's ``predict`` mode hands to the metrics: one pooled feature an image."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class FeatureSample:
    """The whole-image feature of one image.

    Attributes:
        features: pooled encoder feature (C,), any float dtype, any device.
        label: class index of the image (-1: none known).
        index: place of the image in its data set.
        split: which part of an evaluation the image belongs to, 'bank' (neighbours are sought here) or 'query'.
    """

    features: Tensor
    label: int
    index: int
    split: str


@dataclass
class ClassSample:
    """What a classifier says about one image.

    Attributes:
        scores: one number a class (K,), the highest is its answer; any float dtype, any device.
        label: index of the right class.
        index: place of the image in its data set; twice the same index is an image in place of an unreadable one.
    """

    scores: Tensor
    label: int
    index: int
