"""The sizes of a network as its weights tell them, for messages: people compare numbers better than lists of names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

# the part of a weight's name that counts blocks: of a stage, or of the whole network
_BLOCK = re.compile(r"^(?:(stages|layers|layer)\.?(\d+)\.(?:blocks\.|layers\.)?|(blocks)\.)(\d+)\.")


@dataclass(frozen=True)
class Sizes:
    """What the weights of a network say of it, under timm's names.

    Attributes:
        width: channels out of the first layer.
        channels: of the images.
        patch: side of the first layer's kernel in pixels.
        blocks: how many blocks each stage has; one number for a network without stages.
    """

    width: int
    channels: int
    patch: int
    blocks: tuple[int, ...]

    def __str__(self) -> str:
        stages = f"{len(self.blocks)} stages of {', '.join(map(str, self.blocks))} blocks"
        blocks = stages if len(self.blocks) > 1 else f"{self.blocks[0] if self.blocks else 'no'} blocks"
        return f"{blocks}, width {self.width}, {self.patch}-pixel patches of {self.channels} channels"


def sizes_of(weights: Mapping[str, Tensor]) -> Sizes | None:
    """The sizes that weights under timm's names tell; None: they have no layer of two-dimensional kernels."""
    first = weights.get("patch_embed.proj.weight")
    if first is None or first.ndim != 4:
        first = next((value for value in weights.values() if value.ndim == 4), None)
    if first is None:
        return None
    stages: dict[str, set[int]] = {}
    for key in weights:
        found = _BLOCK.match(key)
        if found is not None:
            stages.setdefault(found[2] or "", set()).add(int(found[4]))
    blocks = tuple(len(stages[stage]) for stage in sorted(stages, key=lambda name: int(name or 0)))
    return Sizes(first.shape[0], first.shape[1], first.shape[-1], blocks)


def other_sizes(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """In what sizes a file's weights are of another network than the one expected; None: in none that is known.

    >>> import torch
    >>> small, large = ({"p": torch.ones(width, 3, 4, 4), "blocks.0.a": torch.ones(1)} for width in (8, 16))
    >>> other_sizes(small, large)
    'it has 1 blocks, width 8, 4-pixel patches of 3 channels, the network 1 blocks, width 16, 4-pixel patches of 3 channels'
    """
    there, here = sizes_of(found), sizes_of(expected)
    if there is None or here is None or there == here or bool(there.blocks) != bool(here.blocks):
        return None
    if len(there.blocks) != len(here.blocks):  # entries of something else are left over
        return None
    return f"it has {there}, the network {here}"
