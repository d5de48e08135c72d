"""``--part classifier``: a fine-tuned CNN with its head, from a checkpoint of fine-tuning (docs/howto/finetuning.md).

A second head on the same pooled feature (G2SD's, for hard labels) counts in the mean of both heads' logits; the mean of two
linear layers is one, so it is folded into the first, exactly, and the result is a plain classifier of timm's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import torch

from hgkd.errors import WeightsError
from hgkd.networks.backbones import Source
from hgkd.networks.classifier import load_classifier
from hgkd.pixels import pixel_statistics
from hgkd.weights.identify import identify
from hgkd.weights.run_file import EncoderSpec, run_metrics


def read_classifier(path: str | os.PathLike[str]) -> Source:
    """The whole network of a fine-tuned CNN, with ``classes``.

    Raises:
        FileNotFoundError, WeightsError: see :func:`hgkd.networks.classifier.load_classifier`; or it is a ViT, or a folder.
    """
    if Path(path).expanduser().is_dir():
        raise WeightsError("checkpoint-is-a-folder", f"{path} is a folder; name one of its checkpoints")
    file = identify(path)
    model, path = load_classifier(file), file.path
    spec = model.spec
    if model.is_vit:
        raise WeightsError(
            "vit-not-exported", f"{path} holds a {spec.name!r}; CNN classifiers are exported, a ViT stays with load_classifier"
        )
    network = cast(Any, model.network)
    if model.distillation_head is not None:
        head, second = network.get_classifier(), model.distillation_head
        with torch.no_grad():
            head.weight.add_(second.weight).div_(2)
            head.bias.add_(second.bias).div_(2)
    pixels = (spec.mean, spec.std)
    known = pixel_statistics(network) if model.in_chans == 3 else None  # timm notes some for three channels alone
    trained_with = {"input_size": (model.in_chans, *spec.image_size), "mean": spec.mean, "std": spec.std}
    network.pretrained_cfg = {**network.pretrained_cfg, **trained_with}
    encoder = EncoderSpec(spec.name, spec.stem, dict(spec.kwargs), None if pixels == known else pixels)
    meta, metrics = dict(file.meta), run_metrics(file.content)
    return Source(path, encoder, network.eval(), meta=meta, metrics=metrics, classes=spec.classes)
