"""What timm's networks are made of, as far as more than one part of hgkd asks."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn


def is_plain_vit(network: nn.Module) -> bool:
    """Whether a timm network is a plain ViT: patches, then a row of blocks of equal tokens."""
    return all(hasattr(network, part) for part in ("patch_embed", "blocks", "num_prefix_tokens"))


def is_vit(name: str) -> bool:
    """Whether timm's model of that name is a plain ViT."""
    with torch.device("meta"):
        return is_plain_vit(timm.create_model(name, pretrained=False, num_classes=0))


def classifier_heads(network: nn.Module) -> tuple[nn.Module, ...]:
    """A timm network's classifier: one module, or DeiT's two (class token's, distillation token's)."""
    found: Any = network.get_classifier()  # type: ignore[operator]
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)
