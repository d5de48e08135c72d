"""Structure of timm's networks, for the parts of hgkd that ask about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn

from hgkd.errors import InvalidValueError, unknown_name_message

_ROTARY = (EvaAttention.forward, AttentionRope.forward)
_POST_NORM = (ResPostBlock.forward, EvaBlockPostNorm.forward)  # they normalise what their attention gives, not what it gets
_READ = {
    *((block.forward, Attention.forward) for block in (Block, ResPostBlock)),
    *((block.forward, attention) for block in (EvaBlock, EvaBlockPostNorm) for attention in _ROTARY),
}


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
    if (type(block).forward, getattr(type(attn), "forward", None)) not in _READ:
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


def patch_attention(
    block: nn.Module, tokens: Tensor, prefix: int, has_class_token: bool, rotary: Tensor | None = None
) -> Tensor:
    """How much the class token attends to each patch in a ViT's block, mean over heads; without one, how much all tokens do.

    Args:
        block: timm's.
        tokens: that enter it, (B, prefix + N, D).
        prefix: how many of them are no patches.
        has_class_token: the first of them is the class token.
        rotary: sine and cosine of every patch's place, (N, 2 * channels of a head), or of every head;
            None: no rotary positions.

    Returns:
        (B, N), fp32.

    Raises:
        ValueError: see :func:`check_attention_is_read`.
    """
    check_attention_is_read(block)
    layer: Any = block
    attn: Any = layer.attn
    inputs = tokens if type(block).forward in _POST_NORM else layer.norm1(tokens)
    if type(attn).forward in _ROTARY:
        query, key = _rotary_query_key(attn, inputs, rotary)
        query = query[:, :, :1] if has_class_token else query
    else:
        qkv = attn.qkv(inputs).unflatten(2, (3, attn.num_heads, -1))
        query, key, _ = qkv.permute(2, 0, 3, 1, 4)
        query = attn.q_norm(query[:, :, :1] if has_class_token else query)
        key = attn.k_norm(key)
    weights: Tensor = (query @ key.transpose(-2, -1) * attn.scale).float().softmax(-1)
    return weights[..., prefix:].mean((1, 2))


def _rotary_query_key(attn: Any, inputs: Tensor, rotary: Tensor | None) -> tuple[Tensor, Tensor]:
    """Query and key (B, heads, prefix + N, c) of timm's attentions with rotary positions, as their products see them."""
    if attn.qkv is not None:
        fused = attn.qkv(inputs)
        if getattr(attn, "q_bias", None) is not None:
            fused = fused + torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        query, key, _ = fused.unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    else:
        query, key = (layer(inputs).unflatten(2, (-1, attn.head_dim)).transpose(1, 2) for layer in (attn.q_proj, attn.k_proj))
    query, key = attn.q_norm(query), attn.k_norm(key)
    if rotary is not None:
        prefix, half = attn.num_prefix_tokens, attn.rotate_half
        query, key = (
            torch.cat([part[:, :, :prefix], apply_rot_embed_cat(part[:, :, prefix:], rotary, half=half)], 2).type_as(part)
            for part in (query, key)
        )
    if query.shape[1] != key.shape[1]:  # several heads of queries share one of keys
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return query, key


@contextmanager
def watch_nonfinite(model: nn.Module) -> Iterator[list[tuple[str, str]]]:
    """Context that lists (name, 'NaN' or 'inf') of the modules whose output is not finite, in the order of their returns."""
    seen: list[tuple[str, str]] = []

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
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
