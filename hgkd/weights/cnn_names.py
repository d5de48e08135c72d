"""How other libraries name the weights of the networks that timm calls ResNet and ConvNeXt.

Every style is a translation of timm's names into its own; the other direction, for reading, follows from it for a given
network by enumeration, so each fact stands here once. torchvision's ResNet, OpenMMLab's (mmdet, mmseg, mmpretrain) and SparK's
have timm's names as they are. Read off the sources, no code taken:

- official ConvNeXt (facebookresearch/ConvNeXt, ConvNeXt-V2; arXiv 2201.03545, 2301.00808), which SparK's ConvNeXt follows;
- mmpretrain 1.2 (``models/backbones/convnext.py``; its SparK's ``sparse_convnext.py`` has the same without a last norm);
- torchvision (``models/convnext.py``); transformers (``models/resnet``, ``models/convnext``, ``models/convnextv2``,
  ``models/dinov3_convnext``). DINOv3's and EUPE's own ConvNeXt files (facebookresearch/dinov3, facebookresearch/eupe) have the
  official names, with norms of features (``norms.N``) and distillation's ``projectors`` beside them.

What stays different are shapes of equal content: a linear layer for a 1x1 convolution, (1, 1, 1, C) or (C, 1, 1) for (C,).
:func:`fitted` bridges those and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from timm.models.convnext import ConvNeXt
from timm.models.resnet import ResNet
from torch import Tensor, nn

from hgkd.weights.files import shortest_places

Replacement = str | Callable[[re.Match[str]], str]


@dataclass(frozen=True)
class KeyStyle:
    """A way to name a network's weights.

    Attributes:
        name: for reports.
        serves: the timm class whose members have this style.
        rules: (pattern, replacement) pairs, applied to timm's name one after another.
        own_classifier: beginnings of the names of a classifier in this style; empty where timm's own name serves.
    """

    name: str
    serves: type[nn.Module]
    rules: tuple[tuple[str, Replacement], ...] = ()
    own_classifier: tuple[str, ...] = ()

    def rename(self, key: str) -> str:
        """timm's name of a weight -> its name in this style."""
        for pattern, replacement in self.rules:
            key = re.sub(pattern, replacement, key)
        return key

    def classifier(self, network: nn.Module) -> tuple[str, ...]:
        """Beginnings of the names of a classifier in this style, for which an encoder has no place."""
        named = (getattr(network, "pretrained_cfg", None) or {}).get("classifier") or ()
        return self.own_classifier or tuple(f"{name}." for name in ([named] if isinstance(named, str) else named))


_OFFICIAL_CONVNEXT: tuple[tuple[str, Replacement], ...] = (
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
    (r"^(stages\.\d+)\.blocks\.", r"\1."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.mlp\.fc", ".pwconv"),
    (r"\.mlp\.grn\.weight$", ".grn.gamma"),
    (r"\.mlp\.grn\.bias$", ".grn.beta"),
    (r"^head\.norm\.", "norm."),
)

TIMM = KeyStyle("timm", nn.Module)
OFFICIAL_CONVNEXT = KeyStyle("official ConvNeXt", ConvNeXt, _OFFICIAL_CONVNEXT, ("head.", "fc."))
MMPRETRAIN_CONVNEXT = KeyStyle(
    "mmpretrain ConvNeXt",
    ConvNeXt,
    (
        *_OFFICIAL_CONVNEXT,
        (r"\.dwconv\.", ".depthwise_conv."),
        (r"\.pwconv", ".pointwise_conv"),
        (r"^norm\.", "norm3."),
    ),
)
TORCHVISION_CONVNEXT = KeyStyle(
    "torchvision ConvNeXt",
    ConvNeXt,
    (
        (r"^stem\.", "features.0."),
        (r"^stages\.(\d+)\.downsample\.", lambda m: f"features.{2 * int(m[1])}."),
        (r"^stages\.(\d+)\.blocks\.(\d+)\.", lambda m: f"features.{2 * int(m[1]) + 1}.{m[2]}."),
        (r"\.conv_dw\.", ".block.0."),
        (r"(features.*)\.norm\.", r"\1.block.2."),
        (r"\.mlp\.fc1\.", ".block.3."),
        (r"\.mlp\.fc2\.", ".block.5."),
        (r"\.gamma$", ".layer_scale"),
        (r"^head\.norm\.", "classifier.0."),
    ),
    ("classifier.2.",),
)
TRANSFORMERS_CONVNEXT = KeyStyle(
    "transformers ConvNeXt",
    ConvNeXt,
    (
        (r"^stem\.0\.", "embeddings.patch_embeddings."),
        (r"^stem\.1\.", "embeddings.layernorm."),
        (r"^stages\.(\d+)\.downsample\.", r"encoder.stages.\1.downsampling_layer."),
        (r"^stages\.(\d+)\.blocks\.", r"encoder.stages.\1.layers."),
        (r"\.conv_dw\.", ".dwconv."),
        (r"(encoder.*)\.norm\.", r"\1.layernorm."),
        (r"\.mlp\.fc", ".pwconv"),
        (r"\.mlp\.grn\.", ".grn."),
        (r"\.gamma$", ".layer_scale_parameter"),
        (r"^head\.norm\.", "layernorm."),
    ),
)
TRANSFORMERS_DINOV3_CONVNEXT = KeyStyle(
    "transformers DINOv3 ConvNeXt",
    ConvNeXt,
    (
        (r"^stem\.", "stages.0.downsample_layers."),
        (r"^(stages\.\d+)\.downsample\.", r"\1.downsample_layers."),
        (r"^(stages\.\d+)\.blocks\.", r"\1.layers."),
        (r"\.conv_dw\.", ".depthwise_conv."),
        (r"(layers\.\d+)\.norm\.", r"\1.layer_norm."),
        (r"\.mlp\.fc", ".pointwise_conv"),
        (r"^head\.norm\.", "layer_norm."),
    ),
)
TRANSFORMERS_RESNET = KeyStyle(
    "transformers ResNet",
    ResNet,
    (
        (r"^conv1\.", "embedder.embedder.convolution."),
        (r"^bn1\.", "embedder.embedder.normalization."),
        (r"^layer(\d)\.(\d+)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}."),
        (r"\.conv(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.convolution."),
        (r"\.bn(\d)\.", lambda m: f".layer.{int(m[1]) - 1}.normalization."),
        (r"\.downsample\.0\.", ".shortcut.convolution."),
        (r"\.downsample\.1\.", ".shortcut.normalization."),
    ),
)

STYLES = (
    TIMM,
    OFFICIAL_CONVNEXT,
    MMPRETRAIN_CONVNEXT,
    TORCHVISION_CONVNEXT,
    TRANSFORMERS_CONVNEXT,
    TRANSFORMERS_DINOV3_CONVNEXT,
    TRANSFORMERS_RESNET,
)


# a weight that each network of the kind has under timm's names -> what it is
_SAMPLES = (
    ("stages.0.blocks.0.conv_dw.weight", ConvNeXt, "a ConvNeXt"),
    ("layer1.0.conv1.weight", ResNet, "a ResNet (timm's, torchvision's and OpenMMLab's have the same names)"),
)


def find_cnn(weights: Mapping[str, Tensor]) -> tuple[KeyStyle, list[str], str] | None:
    """The style of a CNN's weight names, what stands before them, and which network it is; None: no CNN that is known.

    Several places: as :func:`hgkd.weights.vit_names.find_naming` gives them.
    """
    for sample, network, what in _SAMPLES:
        for style in (style for style in STYLES if issubclass(network, style.serves)):
            places = shortest_places(weights, style.rename(sample))
            if places:
                return style, places, what if style is TIMM else what.partition(" (")[0]
    return None


def styles_for(network: nn.Module) -> list[KeyStyle]:
    """The styles in which weights of this timm network may be named."""
    return [style for style in STYLES if isinstance(network, style.serves)]


def renamed(network: nn.Module, style: KeyStyle) -> dict[str, Tensor]:
    """The network's weights under the names of a style, on the CPU, shapes as timm has them."""
    return {style.rename(key): value.detach().cpu().contiguous().clone() for key, value in network.state_dict().items()}


def fitted(state: Mapping[str, Tensor], shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in the shapes of a network whose entries are ``shapes``, where they differ by axes of length 1 only."""
    return {key: _fit(value, shapes[key]) if key in shapes else value for key, value in state.items()}


def _fit(value: Tensor, place: Tensor) -> Tensor:
    def without_ones(tensor: Tensor) -> list[int]:
        return [side for side in tensor.shape if side != 1]

    same = value.shape != place.shape and without_ones(value) == without_ones(place)
    return value.reshape(place.shape) if same else value
