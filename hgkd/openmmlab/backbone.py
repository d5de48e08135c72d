"""Any convolutional network of timm as the backbone of a detector or segmentor.

ConvNeXt in mmdet and mmsegmentation needs mmpretrain; this wrapper needs timm alone, and takes every student that hgkd trains.
Weights carry timm's own names (``backbone.stages.0.blocks.0.conv_dw.weight``), so an export for timm loads as it is.

The norms of the outputs are those of the official ConvNeXt's dense tasks (arXiv 2201.03545, ``object_detection`` and
``semantic_segmentation`` of its repository): a LayerNorm over the channels of every output, trained from scratch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseModule
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hgkd.errors import InvalidValueError
from hgkd.networks.encoder import Level, build_encoder, encoder_features, encoder_levels, evaluating, freeze_unused
from hgkd.pixels import channels_of
from hgkd.registry import MODELS

_INNER = "network."


@MODELS.register_module()
class TimmBackbone(BaseModule):
    """Images (B, 3, H, W), normalised -> a tuple of maps (B, C, H/s, W/s), finest first.

    Use it as ``hgkd.TimmBackbone`` in configs of mmdet and mmseg alike.

    Args:
        name: timm's name of the network.
        out_indices: which levels are given; 0 is the finest, of stride 4 in most networks.
        frozen_stages: number of levels, from the finest, that are not trained and whose norms keep their statistics.
        norm_eval: batch normalisations keep their statistics in training.
        out_norm: a new LayerNorm on each output, as ConvNeXt's dense tasks have it.
        timm_kwargs: passed to ``timm.create_model``, e.g. ``drop_path_rate=0.4`` or ``output_stride=8``.

    Attributes:
        name, timm_kwargs: as above.
        channels: of the outputs.

    Raises:
        ValueError: unknown name, no such level, or more frozen stages than levels.
    """

    def __init__(
        self,
        name: str,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = 0,
        norm_eval: bool = False,
        out_norm: bool = False,
        **timm_kwargs: Any,
    ) -> None:
        super().__init__()
        # a dilated network has the same levels, but of equal strides, which would hide all but the last
        levels = encoder_levels(build_encoder(name, **{k: v for k, v in timm_kwargs.items() if k != "output_stride"}))
        self.network = build_encoder(name, **timm_kwargs)
        wrong = [index for index in out_indices if not 0 <= index < len(levels)]
        if wrong or not out_indices:
            raise InvalidValueError(
                "out-indices-absent",
                f"out_indices={tuple(out_indices)} of {name!r} must be among 0 .. {len(levels) - 1}: its levels have the "
                f"strides {', '.join(str(level.stride) for level in levels)}",
            )
        if not 0 <= frozen_stages <= len(levels):
            raise InvalidValueError(
                "frozen-stages-absent",
                f"frozen_stages={frozen_stages} of {name!r} must be in 0 .. {len(levels)}; 0 freezes nothing (mmdet's -1)",
            )
        self.name = name
        self.timm_kwargs = timm_kwargs
        self.norm_eval = norm_eval
        self._levels: list[Level] = [levels[index] for index in sorted(out_indices)]
        self.channels = tuple(level.channels for level in self._levels)
        self.out_norms = nn.ModuleList(LayerNorm2d(width) for width in self.channels) if out_norm else None
        freeze_unused(self.network, self._levels)  # a head's norm, for which data-parallel training would wait
        self._frozen = self._freeze(levels[:frozen_stages])
        self._register_state_dict_hook(_without_inner_name)
        self._register_load_state_dict_pre_hook(_with_inner_name, with_module=True)
        self.train()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Maps of the levels in ``out_indices``, finest first."""
        maps = encoder_features(self.network, images, self._levels)
        if self.out_norms is not None:
            maps = [norm(level) for norm, level in zip(self.out_norms, maps, strict=True)]
        return tuple(maps)

    @torch.no_grad()
    def computes_as(self, network: nn.Module) -> bool:
        """Whether another network of timm makes the same levels of an image; neither is changed."""
        image = torch.linspace(0.0, 9.0, 3 * 64 * 64).sin().view(1, 3, 64, 64)  # draws no random number
        levels = []
        for each in (self.network, network):
            with evaluating(each):
                levels.append(encoder_features(each, image, self._levels))
        pairs = list(zip(*levels, strict=True))
        return all(ours.shape == theirs.shape and torch.allclose(ours, theirs, 1e-3, 1e-4) for ours, theirs in pairs)

    def train(self, mode: bool = True) -> TimmBackbone:
        """Set the mode as torch does, except for norms that are frozen, or all with ``norm_eval``: they stay in eval mode."""
        super().train(mode)
        for layer in self._frozen_layers():
            layer.eval()
        return self

    def init_weights(self) -> None:
        """Nothing: timm has initialised its network, and a checkpoint must not be overwritten."""

    def _freeze(self, levels: Sequence[Level]) -> frozenset[str]:
        """Stop training what these levels depend on; the names of these parameters, in timm's naming."""
        if not levels:
            return frozenset()
        named = [(name, parameter) for name, parameter in self.network.named_parameters() if parameter.requires_grad]
        with evaluating(self.network), torch.enable_grad():
            image = torch.zeros(1, channels_of(self.network), 64, 64)
            total = torch.stack([m.sum() for m in encoder_features(self.network, image, levels)]).sum()
            gradients = torch.autograd.grad(total, [parameter for _, parameter in named], allow_unused=True)
        upstream = [name for (name, _), gradient in zip(named, gradients, strict=True) if gradient is not None]
        for name in upstream:
            self.network.get_parameter(name).requires_grad_(False)
        return frozenset(upstream)

    def _frozen_layers(self) -> list[nn.Module]:
        layers = [(name, layer) for name, layer in self.network.named_modules() if isinstance(layer, _BatchNorm)]
        return [layer for name, layer in layers if self.norm_eval or f"{name}.weight" in self._frozen]


def _without_inner_name(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    for key in [key for key in state if key.startswith(prefix + _INNER)]:
        state[prefix + key[len(prefix + _INNER) :]] = state.pop(key)


def _with_inner_name(module: nn.Module, state: dict[str, Any], prefix: str, *args: object) -> None:
    own = {
        key.removeprefix(_INNER) for key, _ in (*module.named_parameters(), *module.named_buffers()) if key.startswith(_INNER)
    }
    for key in [key for key in state if key.startswith(prefix) and key[len(prefix) :] in own]:
        state[prefix + _INNER + key[len(prefix) :]] = state.pop(key)
