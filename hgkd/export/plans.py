"""The plain ResNet and ConvNeXt inside a timm network: what another library needs to build the same one.

timm's ResNet and ConvNeXt are families with many options (deep stems, attention, other norms). Other libraries have the plain
network; a student with more is refused here by the name of the layer that they lack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import timm.layers
from timm.layers.grn import GlobalResponseNorm
from timm.models import convnext, resnet
from torch import nn

from hgkd.errors import WeightsError
from hgkd.networks.libraries import home_of
from hgkd.networks.taps import Tapped

_PLAIN = (nn.Conv2d, nn.Identity, nn.Sequential, nn.Flatten, nn.Dropout, timm.layers.DropPath, timm.layers.SelectAdaptivePool2d)
_RESNET = (*_PLAIN, resnet.ResNet, resnet.BasicBlock, resnet.Bottleneck, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d)
_CONVNEXT = (
    *_PLAIN,
    convnext.ConvNeXt,
    convnext.ConvNeXtStage,
    convnext.ConvNeXtBlock,
    nn.Linear,
    nn.GELU,
    timm.layers.GELU,
    nn.LayerNorm,
    timm.layers.LayerNorm,
    timm.layers.LayerNorm2d,
    timm.layers.Mlp,
    GlobalResponseNorm,
    timm.layers.GlobalResponseNormMlp,
    timm.layers.NormMlpClassifierHead,
)
_REMEDY = "export it to timm, onnx, program or sparse, which take any student"


class UnsupportedLayerError(WeightsError):
    """A target's library has no such layer."""


@dataclass(frozen=True)
class ResNetPlan:
    """A plain ResNet (arXiv 1512.03385) or ResNeXt.

    Attributes:
        block: 'basic' or 'bottleneck'.
        depths: blocks a stage.
        stem: channels after the 7x7 convolution.
        widths: output channels of the stages.
        groups, base_width: of the 3x3 convolutions of a bottleneck, as torchvision counts them.
    """

    block: str
    depths: tuple[int, ...]
    stem: int
    widths: tuple[int, ...]
    groups: int
    base_width: int

    @property
    def standard_widths(self) -> bool:
        """Whether channels are those of the paper."""
        expansion = 4 if self.block == "bottleneck" else 1
        return self.stem == 64 and self.widths == tuple(expansion * 64 * 2**stage for stage in range(4))


@dataclass(frozen=True)
class ConvNeXtPlan:
    """A plain ConvNeXt (arXiv 2201.03545) or ConvNeXt V2 (2301.00808).

    Attributes:
        depths, widths: blocks and channels of the stages.
        grn: V2, with global response norm and without layer scale.
        linear: 1x1 convolutions are kept as linear layers.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    grn: bool
    linear: bool


def plan_of(network: nn.Module, library: str) -> ResNetPlan | ConvNeXtPlan:
    """Describe a plain ResNet or ConvNeXt of timm.

    Args:
        network: the dense encoder.
        library: whose layers must suffice, for messages.

    Raises:
        UnsupportedLayerError: the network is neither, or has a layer that ``library`` lacks; it is named.
    """
    for kind, describe in _FAMILIES.items():
        if isinstance(network, kind):
            return describe(network, library)
    if isinstance(network, Tapped):
        name = str(network.pretrained_cfg["architecture"])
        raise UnsupportedLayerError(f"{library} has no {name}; {home_of(name)}")
    known = " and ".join(kind.__name__ for kind in _FAMILIES)
    raise UnsupportedLayerError(
        f"for {library}, hgkd writes {known}, and this student is a {type(network).__name__}; {_REMEDY}"
    )


def _resnet_plan(network: nn.Module, library: str) -> ResNetPlan:
    _refuse_foreign(network, _RESNET, library)
    net = cast(Any, network)
    stem = net.conv1
    if not isinstance(stem, nn.Conv2d) or (stem.kernel_size, stem.stride) != ((7, 7), (2, 2)):
        raise UnsupportedLayerError(
            f"{library} has no other ResNet stem than a 7x7 convolution of stride 2, as in conv1; {_REMEDY}"
        )
    if not isinstance(net.maxpool, nn.MaxPool2d):
        raise UnsupportedLayerError(f"{library} has no ResNet whose maxpool is a {type(net.maxpool).__name__}; {_REMEDY}")
    stages = [net.layer1, net.layer2, net.layer3, net.layer4]
    first = stages[0][0]
    bottleneck = isinstance(first, resnet.Bottleneck)
    widths = tuple((stage[-1].conv3 if bottleneck else stage[-1].conv2).out_channels for stage in stages)
    groups = first.conv2.groups
    planes = widths[0] // 4
    base_width = first.conv2.out_channels // groups * 64 // planes if bottleneck else 64
    depths = tuple(len(stage) for stage in stages)
    return ResNetPlan("bottleneck" if bottleneck else "basic", depths, stem.out_channels, widths, groups, base_width)


def _convnext_plan(network: nn.Module, library: str) -> ConvNeXtPlan:
    _refuse_foreign(network, _CONVNEXT, library)
    net = cast(Any, network)
    patch = net.stem[0]
    if len(net.stem) != 2 or (patch.kernel_size, patch.stride) != ((4, 4), (4, 4)):
        raise UnsupportedLayerError(
            f"{library} has no other ConvNeXt stem than a 4x4 convolution of stride 4, as in stem; {_REMEDY}"
        )
    if not isinstance(net.norm_pre, nn.Identity) or isinstance(net.head.norm, nn.Identity):
        raise UnsupportedLayerError(
            f"{library} has no ConvNeXt with norm_pre, that is with its last norm before pooling; {_REMEDY}"
        )
    block = net.stages[0].blocks[0]
    grn = isinstance(block.mlp, timm.layers.GlobalResponseNormMlp)
    if grn != (getattr(block, "gamma", None) is None):
        raise UnsupportedLayerError(f"{library} has no ConvNeXt with mlp.grn and gamma both, or with neither; {_REMEDY}")
    depths = tuple(len(stage.blocks) for stage in net.stages)
    widths = tuple(stage.blocks[0].conv_dw.out_channels for stage in net.stages)
    return ConvNeXtPlan(depths, widths, grn, isinstance(block.mlp.fc1, nn.Linear))


def _refuse_foreign(network: nn.Module, known: tuple[type[nn.Module], ...], library: str) -> None:
    foreign = [(path, type(layer).__name__) for path, layer in network.named_modules() if type(layer) not in known]
    if foreign:
        path, kind = foreign[0]
        more = f" (and {len(foreign) - 1} further such layers)" if len(foreign) > 1 else ""
        raise UnsupportedLayerError(f"{library}'s {type(network).__name__} has no layer for {path}, a {kind}{more}; {_REMEDY}")


_FAMILIES: dict[type[nn.Module], Callable[[nn.Module, str], ResNetPlan | ConvNeXtPlan]] = {
    resnet.ResNet: _resnet_plan,
    convnext.ConvNeXt: _convnext_plan,
}
