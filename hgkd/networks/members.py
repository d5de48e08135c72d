"""Networks of other libraries that are shown to serve as students, and some that are refused: one list for tests and docs.

What :mod:`hgkd.sparse.families` is for timm. ``tools/students_table.py`` puts both into ``docs/reference/students.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hgkd.networks.encoder import build_encoder


@dataclass(frozen=True)
class Member:
    """A network of mmdet, mmseg or torchvision.

    Attributes:
        name: for the table.
        member: as in ``SparseUNet(encoder=...)``.
        options: its ``encoder_kwargs``.
        shorter: those that make it thin, where it is large.
    """

    name: str
    member: str
    options: Mapping[str, Any] = field(default_factory=dict)
    shorter: Mapping[str, Any] = field(default_factory=dict)

    def build(self, *, short: bool) -> nn.Module:
        """The encoder."""
        return build_encoder(self.member, **{**self.options, **(self.shorter if short else {})})


_STDC = {
    "stdc_type": "STDCNet1",
    "in_channels": 3,
    "channels": (32, 64, 256, 512, 1024),
    "bottleneck_type": "cat",
    "num_convs": 4,
    "norm_cfg": {"type": "BN"},
    "act_cfg": {"type": "ReLU"},
}
_THIN = {"base_channels": 16}

LIBRARY_FAMILIES = (
    Member("CSPNeXt (RTMDet)", "mmdet.CSPNeXt", {"deepen_factor": 0.167, "widen_factor": 0.375}, {"widen_factor": 0.125}),
    Member("CSPDarknet (YOLOX)", "mmdet.CSPDarknet", {"deepen_factor": 0.33, "widen_factor": 0.375}, {"widen_factor": 0.125}),
    Member("mmdet's ResNet", "mmdet.ResNet", {"depth": 50}, _THIN),
    Member("mmdet's RegNet", "mmdet.RegNet", {"arch": "regnetx_400mf"}),
    Member("mmseg's ResNetV1c", "mmseg.ResNetV1c", {"depth": 18}, _THIN),
    Member("mmseg's STDCNet", "mmseg.STDCNet", _STDC, {"channels": (8, 16, 32, 64, 128)}),
    Member("torchvision's ResNet", "torchvision.resnet18"),
    Member("torchvision's RegNet", "torchvision.regnet_y_400mf"),
    Member("torchvision's EfficientNet", "torchvision.efficientnet_b0"),
    Member("torchvision's MobileNet v3", "torchvision.mobilenet_v3_small"),
)

# member -> (its options, the layer that the message names, why)
LIBRARY_REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "mmdet.ResNet": (
        {"depth": 50, "base_channels": 16, "dcn": {"type": "DCNv2"}, "stage_with_dcn": (False, False, False, True)},
        "ModulatedDeformConv2dPack",
        "deformable convolution (`dcn`): it reads where the image leads it",
    ),
    "mmdet.ResNeSt": ({"depth": 50, "base_channels": 16}, "SplitAttentionConv2d", "no rule yet; timm's `resnest14d` has one"),
    "mmseg.MixVisionTransformer": ({"embed_dims": 8}, "MultiheadAttention", "attention between positions"),
    "torchvision.shufflenet_v2_x0_5": ({}, "InvertedResidual", "no rule yet for its shuffle of channels"),
}
