"""``--what classifier``: a fine-tuned CNN with its head, from a checkpoint of fine-tuning (docs/finetuning.md).

A second head on the same pooled feature (G2SD's, for hard labels) counts in the mean of both heads' logits; the mean of two
linear layers is one, so it is folded into the first, exactly, and the result is a plain classifier of timm's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch

from hgkd.classifiers.network import load_classifier
from hgkd.engine.weights import read_checkpoint
from hgkd.errors import WeightsError
from hgkd.export.source import EncoderSpec, Source, run_metrics


def read_classifier(path: str | os.PathLike[str]) -> Source:
    """The whole network of a fine-tuned CNN, with ``classes``.

    Raises:
        FileNotFoundError, WeightsError: see :func:`hgkd.classifiers.network.load_classifier`; or it is a ViT.
    """
    path = Path(path).expanduser()
    model = load_classifier(path)
    spec = model.spec
    if model.is_vit:
        raise WeightsError(f"{path} holds a {spec.name!r}; CNN classifiers are exported, a ViT stays with load_classifier")
    network = cast(Any, model.network)
    if model.distillation_head is not None:
        head, second = network.get_classifier(), model.distillation_head
        with torch.no_grad():
            head.weight.add_(second.weight).div_(2)
            head.bias.add_(second.bias).div_(2)
    network.pretrained_cfg = {**network.pretrained_cfg, "mean": spec.mean, "std": spec.deviation}
    checkpoint = read_checkpoint(path) if path.is_file() else {}
    meta = checkpoint.get("meta") or {}
    encoder = EncoderSpec(spec.name, spec.stem, dict(spec.kwargs))
    return Source(
        path,
        encoder,
        network.eval(),
        meta=dict(meta) if isinstance(meta, Mapping) else {},
        metrics=run_metrics(checkpoint),
        classes=spec.classes,
    )
