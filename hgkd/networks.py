"""What timm's networks are made of, as far as more than one part of hgkd asks."""

from __future__ import annotations

from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from hgkd.errors import unknown_name_message


def check_timm_name(what: str, name: str) -> None:
    """Raise ValueError unless timm has a model of that name, and of that tag where the name has one ('resnet18.a1_in1k').

    Args:
        what: the model is to be, for the message.
    """
    plain = name.removeprefix("hf-hub:").removeprefix("hf_hub:").removeprefix("timm/")  # as the hub writes timm's names
    architecture, dot, tag = plain.partition(".")
    if not timm.is_model(architecture):
        raise ValueError(unknown_name_message(what, plain, timm.list_models()))
    if plain != name:
        raise ValueError(f"unknown {what} {name!r}; did you mean {plain!r}? Nothing is fetched from a hub by its address")
    tags = timm.models.get_arch_pretrained_cfgs(architecture) if dot else {}
    if dot and name not in tags:
        known = ", ".join(repr(tag) for tag in tags) or "none"
        raise ValueError(
            f"timm's {architecture!r} has no weights tagged {tag!r}; leave the tag out, or name one that it has: {known}"
        )


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


def patch_attention(block: nn.Module, tokens: Tensor, prefix: int, has_class_token: bool) -> Tensor:
    """How much the class token attends to each patch in a ViT's block, mean over heads; without one, how much all tokens do.

    Args:
        block: timm's.
        tokens: that enter it, (B, prefix + N, D).
        prefix: how many of them are no patches.
        has_class_token: the first of them is the class token.

    Returns:
        (B, N), fp32.
    """
    attn: Any = block.attn
    qkv = attn.qkv(cast(Any, block).norm1(tokens)).unflatten(2, (3, attn.num_heads, -1))
    query, key, _ = qkv.permute(2, 0, 3, 1, 4)
    query = attn.q_norm(query[:, :, :1] if has_class_token else query)
    weights: Tensor = (query @ attn.k_norm(key).transpose(-2, -1) * attn.scale).float().softmax(-1)
    return weights[..., prefix:].mean((1, 2))
