"""The families of timm whose members are students, and those that are refused: one list for tests and documentation.

timm is huggingface/pytorch-image-models (Apache-2.0). ``tools/students_table.py`` makes ``docs/reference/students.md`` from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import timm
from timm.models.cspnet import model_cfgs as _csp
from torch import nn


@dataclass(frozen=True)
class Family:
    """A family of timm networks.

    Attributes:
        name: for the table.
        member: timm name of its smallest member, or a small one.
        shorter: arguments for ``timm.create_model`` that leave one block a stage, or fewer channels, where it is large.
    """

    name: str
    member: str
    shorter: Mapping[str, Any] = field(default_factory=dict)

    def build(self, *, short: bool) -> nn.Module:
        """The member without classifier and pooling; its backbone is ``forward_features``."""
        return timm.create_model(self.member, num_classes=0, global_pool="", **(self.shorter if short else {}))


_ONE_BLOCK = {"layers": (1, 1, 1, 1)}


def _one_csp_block(name: str) -> dict[str, Any]:
    stages = _csp[name].stages
    return {"stages": replace(stages, depth=(1,) * len(stages.depth), out_chs=tuple(c // 4 for c in stages.out_chs))}


FAMILIES = (
    Family("ResNet, basic blocks", "resnet18"),
    Family("ResNet, bottlenecks", "resnet50", _ONE_BLOCK),
    Family("ResNet-D", "resnet18d"),
    Family("ResNet, anti-aliased by blur", "resnetblur18"),
    Family("ResNeXt", "resnext50_32x4d", _ONE_BLOCK),
    Family("ResNeXt, byob", "resnext26ts"),
    Family("Wide ResNet", "wide_resnet50_2", {**_ONE_BLOCK, "channels": (16, 32, 64, 128)}),
    Family("SE-ResNet", "seresnet18"),
    Family("ECA-ResNet", "ecaresnet26t"),
    Family("GC-ResNeXt", "gcresnext26ts"),
    Family("ResNeSt", "resnest14d"),
    Family("SK-ResNet", "skresnet18"),
    Family("ResNet v2", "resnetv2_18"),
    Family("Res2Net", "res2net50_14w_8s", _ONE_BLOCK),
    Family("ConvNeXt", "convnext_atto"),
    Family("ConvNeXt V2", "convnextv2_atto"),
    Family("RegNet X", "regnetx_002"),
    Family("RegNet Y", "regnety_002"),
    Family("EfficientNet", "efficientnet_b0"),
    Family("EfficientNet, 'same' padding", "tf_efficientnet_b0"),
    Family("EfficientNet-Lite", "efficientnet_lite0"),
    Family("EfficientNetV2", "tf_efficientnetv2_b0"),
    Family("MixNet, 'same' padding", "tf_mixnet_s"),
    Family("MobileNet v1", "mobilenetv1_100"),
    Family("MobileNet v2", "mobilenetv2_035"),
    Family("MobileNet v3", "mobilenetv3_small_050"),
    Family("MobileNet v3, 'same' padding", "tf_mobilenetv3_small_minimal_100"),
    Family("MobileNet v4, convolutional", "mobilenetv4_conv_small_035"),
    Family("MNASNet", "mnasnet_small"),
    Family("SemNASNet", "semnasnet_050"),
    Family("VGG, BatchNorm", "vgg11_bn", {"mlp_ratio": 1 / 512}),
    Family("DenseNet", "densenet121", {"block_config": (2, 2, 2, 2), "growth_rate": 8}),
    Family("CSP-ResNet", "cspresnet50", _one_csp_block("cspresnet50")),
    Family("CSP-DarkNet", "cspdarknet53", _one_csp_block("cspdarknet53")),
    Family("DarkNet", "darknet53", _one_csp_block("darknet53")),
    Family("RepVGG", "repvgg_a0"),
    Family("ReXNet", "rexnet_100"),
    Family("GhostNet", "ghostnet_050"),
    Family("HRNet", "hrnet_w18_small"),
    Family("DLA", "dla46_c"),
    Family("MobileOne", "mobileone_s0"),
    Family("FastViT, convolutional", "fastvit_t8"),
    Family("RepViT", "repvit_m0_9"),
    Family("StarNet", "starnet_s050"),
    Family("HGNetV2", "hgnetv2_b0"),
    Family("VoVNet", "ese_vovnet19b_slim"),
)

# member -> (the layer that the message names, why); not complete: whatever mixes positions without a rule is refused
REFUSED = {
    "edgenext_xx_small": ("SplitTransposeBlock", "attention between channels over all positions"),
    "fastvit_sa12": ("Attention", "attention between positions in the last stage; the members t8 and t12 have none"),
    "mobilenetv4_hybrid_medium": ("MultiQueryAttention2d", "attention between positions; the 'conv' members have none"),
    "mobilevit_xxs": ("MobileVitBlock", "attention between positions"),
    "tiny_vit_5m_224": ("TinyVitBlock", "attention between positions in windows"),
    "efficientformer_l1": ("Flat", "attention between positions in the last stage"),
    "ghostnetv2_100": ("GhostModuleV2", "its gates are halved and resized to the size of a whole image"),
}
