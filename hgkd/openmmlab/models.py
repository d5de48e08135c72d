"""Detectors and segmentors out of their configs, with weights, for use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from mmengine import registry as roots
from mmengine.model import BaseModel
from torch import Tensor

from hgkd.config.reading import without_scope
from hgkd.openmmlab.config import drop_downloads, model_config
from hgkd.weights.loading import load_strict


def build_model(config: str | Mapping[str, Any], scope: str, state: Mapping[str, Tensor], source: str) -> BaseModel:
    """A model of mmdet or mmseg in eval mode, every weight of it loaded and nothing downloaded; ``scope`` is the default one.

    Args:
        config: the model's, see :func:`hgkd.openmmlab.config.model_config`.
        source: where the weights are from, for messages.

    Raises:
        WeightsError: the weights are not the model's.
    """
    described = without_scope(model_config(config), scope)
    drop_downloads(described)
    model = roots.MODELS.build(described)
    load_strict(model, state, source=source)
    return cast(BaseModel, model.eval())
