"""What timm's networks are made of, as far as more than one part of hgkd asks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn

from hgkd.errors import InvalidValueError, unknown_name_message


def check_timm_name(what: str, name: str) -> None:
    """Raise ValueError unless timm has a model of that name, and of that tag where the name has one ('resnet18.a1_in1k').

    Args:
        what: the model is to be, for the message.
    """
    plain = name.removeprefix("hf-hub:").removeprefix("hf_hub:").removeprefix("timm/")  # as the hub writes timm's names
    architecture, dot, tag = plain.partition(".")
    if not timm.is_model(architecture):
        raise InvalidValueError("timm-name-unknown", unknown_name_message(what, plain, timm.list_models()))
    if plain != name:
        raise InvalidValueError(
            "timm-name-is-an-address",
            f"unknown {what} {name!r}; did you mean {plain!r}? Nothing is fetched from a hub by its address",
        )
    tags = timm.models.get_arch_pretrained_cfgs(architecture) if dot else {}
    if dot and name not in tags:
        known = ", ".join(repr(tag) for tag in tags) or "none"
        raise InvalidValueError(
            "timm-tag-unknown",
            f"timm's {architecture!r} has no weights tagged {tag!r}; leave the tag out, or name one that it has: {known}",
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


def check_attention_is_read(block: nn.Module) -> None:
    """Refuse a ViT's block whose attention :func:`patch_attention` would compute wrongly.

    Raises:
        ValueError: another kind of block, or of attention in it; it is named.
    """
    attn = getattr(block, "attn", None)
    known_block = type(block).forward in (Block.forward, ResPostBlock.forward)
    if not known_block or type(attn).forward is not Attention.forward:  # type: ignore[union-attr]
        kind = " with ".join(f"{type(part).__module__}.{type(part).__name__}" for part in (block, attn) if part is not None)
        raise InvalidValueError(
            "attention-not-read",
            f"the attention of blocks of the kind {kind} is not read, so it can neither guide a mask nor be shown; "
            "use RandomMask or BlockMask, or a ViT of timm's ordinary blocks",
        )


def head_names(network: nn.Module) -> tuple[str, ...]:
    """Beginnings of the entries of a timm network that belong to its classifier, also where it was built without one."""
    heads = {id(head) for head in classifier_heads(network)}
    return tuple(f"{name}." for name, module in network.named_modules() if id(module) in heads)


def patch_attention(block: nn.Module, tokens: Tensor, prefix: int, has_class_token: bool) -> Tensor:
    """How much the class token attends to each patch in a ViT's block, mean over heads; without one, how much all tokens do.

    Args:
        block: timm's.
        tokens: that enter it, (B, prefix + N, D).
        prefix: how many of them are no patches.
        has_class_token: the first of them is the class token.

    Returns:
        (B, N), fp32.

    Raises:
        ValueError: see :func:`check_attention_is_read`.
    """
    check_attention_is_read(block)
    layer: Any = block
    attn: Any = layer.attn
    # a post-norm block normalises what its attention gives, not what it gets
    inputs = tokens if type(block).forward is ResPostBlock.forward else layer.norm1(tokens)
    qkv = attn.qkv(inputs).unflatten(2, (3, attn.num_heads, -1))
    query, key, _ = qkv.permute(2, 0, 3, 1, 4)
    query = attn.q_norm(query[:, :, :1] if has_class_token else query)
    weights: Tensor = (query @ attn.k_norm(key).transpose(-2, -1) * attn.scale).float().softmax(-1)
    return weights[..., prefix:].mean((1, 2))


@contextmanager
def watch_nonfinite(model: nn.Module) -> Iterator[list[tuple[str, str]]]:
    """Context that lists (name, 'NaN' or 'inf') of the modules whose output is not finite, in the order of their returns."""
    seen: list[tuple[str, str]] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not is_finite(output):
                seen.append((name, "NaN" if bool(output.detach().as_subclass(Tensor).isnan().any()) else "inf"))

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def is_finite(values: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor inf."""
    # sparse tensors refuse operations that mix places; finiteness is asked of the numbers alone
    return bool(torch.isfinite(values.detach().as_subclass(Tensor)).all())
