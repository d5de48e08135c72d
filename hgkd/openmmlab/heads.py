"""The heads of a detector's or segmentor's config whose classes are the data set's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hgkd.openmmlab.measures import type_name

_HEADS = {"bbox_head", "mask_head", "decode_head", "auxiliary_head"}
# but for those that match texts, and STDC's boundaries
_OTHER_HEADS = {"ATSSVLFusionHead", "GroundingDINOHead", "SideAdapterCLIPHead", "STDCHead"}


def class_heads(part: object, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The parts below ``path`` that say ``num_classes`` of a head, by their paths."""
    if isinstance(part, Mapping):
        if _is_other_head(part):
            return
        if isinstance(part.get("num_classes"), int) and _HEADS & set(path.split(".")):
            yield path, part
        for key, value in part.items():
            yield from class_heads(value, f"{path}.{key}")
    elif isinstance(part, (list, tuple)):
        for index, item in enumerate(part):
            yield from class_heads(item, f"{path}.{index}")


def pixel_heads(model: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The heads of a segmentor that classify places, by their paths."""
    for name in ("decode_head", "auxiliary_head"):
        heads = model.get(name) or {}
        several = isinstance(heads, (list, tuple))
        for index, head in enumerate(heads if several else [heads]):
            if head and not _is_other_head(head):
                yield (f"model.{name}.{index}" if several else f"model.{name}"), head


def _is_other_head(head: Mapping[str, Any]) -> bool:
    return type_name(head) in _OTHER_HEADS or "boundary_threshold" in head
