"""The backbone's weight file: all of it, into the backbone alone, or a message that says what the file is instead.

mmengine's ``init_cfg=dict(type='Pretrained')`` loads what fits and logs the rest. Here every entry of the backbone must be
filled and nothing of the file left over but a classifier.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmengine.logging import print_log
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hgkd.engine.weights import read_checkpoint, tensors_of
from hgkd.errors import WeightsError
from hgkd.export.importing import ImportReport, import_weights
from hgkd.export.model import check_finite
from hgkd.openmmlab.backbone import TimmBackbone

_EXPORTED = ("backbone.pth", "model.safetensors")  # as tools/export.py --to mmdet, mmseg, timm, torchvision name them
_CLASSIFIER = ("fc.", "head.norm.")
_STUDENT = "student."  # of hgkd.FeatureDistiller
_RESNETS: dict[tuple[bool, tuple[int, ...]], str] = {
    (False, (2, 2, 2, 2)): "ResNet-18",
    (False, (3, 4, 6, 3)): "ResNet-34",
    (True, (3, 4, 6, 3)): "ResNet-50",
    (True, (3, 4, 23, 3)): "ResNet-101",
    (True, (3, 8, 36, 3)): "ResNet-152",
}
_ASIDE = re.compile(r"^(?:module\.)?(?:neck|rpn_head|roi_head|bbox_head|mask_head|decode_head|auxiliary_head)\.")


def load_backbone_file(backbone: nn.Module, path: str | os.PathLike[str]) -> ImportReport:
    """Load a backbone's weights, all or nothing, and log the report.

    Args:
        backbone: ``TimmBackbone``, or mmdet's or mmseg's own ResNet or ResNeXt.
        path: a folder that ``tools/export.py --to timm|mmdet|mmseg|torchvision`` wrote, or a weight file whose names are the
            backbone's without any prefix, in one of the styles of :mod:`hgkd.export.naming`. A classifier is left aside.

    Raises:
        FileNotFoundError: no such file.
        WeightsError: a training checkpoint, names with a prefix, another architecture, values that are not finite, or anything
            missing or left over; the backbone is unchanged then.
    """
    file = _weight_file(Path(path).expanduser())
    network: nn.Module = backbone.network if isinstance(backbone, TimmBackbone) else backbone
    weights = _plain_weights(file, network)
    check_finite(Path(path), {key: value for key, value in weights.items() if not key.startswith(_CLASSIFIER)})
    try:
        return import_weights(network, file, prefix="", allow=_CLASSIFIER)
    except WeightsError as error:
        needs = describe(network.state_dict()) or type(network).__name__
        holds = _exported_name(file) or describe(weights) or "another network"
        reason = error.__cause__ or error  # without the remedy of import_weights, for which a training has no option
        if {"stem.0.weight", "layer1.0.conv1.weight"} <= network.state_dict().keys() and "conv1.weight" in weights:
            raise WeightsError(
                f"backbone={path} holds {holds} with one convolution as stem, and this config's backbone, {needs}, has three "
                "(mmseg's ResNetV1c). Set model.backbone.type=ResNet (in a distillation model.student.backbone.type=ResNet) "
                f"or give weights of a ResNetV1c. {reason}"
            ) from error
        if holds == needs:
            raise WeightsError(f"backbone={path} holds {holds} as this config needs it, but not all fits. {reason}") from error
        raise WeightsError(f"backbone={path} holds {holds}, and this config's backbone is {needs}. {reason}") from error


def check_start(backbone: nn.Module) -> None:
    """Say that a backbone without a file starts from random weights, unless its config names a local one.

    Raises:
        ValueError: parts of it would stay random, because the config freezes them or holds the norms' statistics.
    """
    start = getattr(backbone, "init_cfg", None)
    if isinstance(start, Mapping) and start.get("type") == "Pretrained":
        return
    fixed = [] if next(backbone.parameters()).requires_grad else ["its first layers are frozen (frozen_stages)"]
    if getattr(backbone, "norm_eval", False) and any(isinstance(layer, _BatchNorm) for layer in backbone.modules()):
        fixed.append("its norms never take statistics (norm_eval)")
    if fixed:
        raise ValueError(
            f"backbone=None: the backbone starts from random weights, and {' and '.join(fixed)}. Set backbone=FILE to weights "
            "for it, or train all of it: frozen_stages=-1 (hgkd.TimmBackbone: 0) and norm_eval=False in model.backbone "
            "(a distillation: model.student.backbone)"
        )
    print_log(
        "backbone=None: the backbone starts from random weights; backbone=FILE loads an export", "current", logging.WARNING
    )


def student_weights(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The student's part of a distillation's weights, under its own names; any other weights as they are."""
    part = {key.removeprefix(_STUDENT): value for key, value in state.items() if key.startswith(_STUDENT)}
    return part or state


def describe(weights: Mapping[str, Any]) -> str:
    """The architecture that names of weights tell, e.g. 'a ResNet-50'; empty when they tell none."""
    blocks = [match for key in weights if (match := re.match(r"layer(\d)\.(\d+)\.", key))]
    if blocks:
        depths = _depths(blocks)
        bottleneck = any(".conv3." in key for key in weights)
        return f"a {_RESNETS.get((bottleneck, depths), 'ResNet')} (blocks {'-'.join(map(str, depths))})"
    blocks = [match for key in weights if (match := re.match(r"stages\.(\d)\.(?:blocks\.)?(\d+)\.", key))]
    if blocks:
        stem = next((weights[key] for key in ("stem.0.weight", "downsample_layers.0.0.weight") if key in weights), None)
        width = f", {len(stem)} channels in the stem" if isinstance(stem, Tensor) else ""
        return f"a ConvNeXt or kin (blocks {'-'.join(map(str, _depths(blocks)))}{width})"
    return ""


def _depths(blocks: Iterable[re.Match[str]]) -> tuple[int, ...]:
    depths: dict[str, int] = {}
    for match in blocks:
        depths[match[1]] = max(depths.get(match[1], 0), int(match[2]) + 1)
    return tuple(depths[stage] for stage in sorted(depths))


def _weight_file(path: Path) -> Path:
    if path.is_dir():
        found = [path / name for name in _EXPORTED if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(
                f"backbone={path} is a folder without {' or '.join(_EXPORTED)}; give one that tools/export.py wrote, or a file"
            )
        return found[0]
    if not path.is_file():
        raise FileNotFoundError(
            f"backbone={path} does not exist; give a folder that 'tools/export.py CHECKPOINT --to timm --out FOLDER' wrote, or "
            "a weight file"
        )
    return path


def _plain_weights(file: Path, network: nn.Module) -> dict[str, Tensor]:
    """The file's weights, when their names carry no prefix; else the error that says what to do."""
    content = read_checkpoint(file)
    if isinstance(content, Mapping) and isinstance(content.get("meta"), Mapping) and "hgkd" in content["meta"]:
        raise WeightsError(
            f"backbone={file} is a training checkpoint of hgkd (student, decoder and optimiser). Export the student first: "
            f"python tools/export.py {file} --to timm --out FOLDER, then backbone=FOLDER"
        )
    inside = next(
        (
            content[key]
            for key in ("state_dict", "model")
            if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)
        ),
        content,
    )
    names = [str(key) for key in inside] if isinstance(inside, Mapping) else []
    if any(_ASIDE.match(name) for name in names):
        raise WeightsError(
            f"backbone={file} is the checkpoint of a whole detector or segmentor, not of a backbone. To continue from it, use "
            "load_from=FILE; for its backbone alone: python tools/export.py FILE --encoder NAME --to timm --out FOLDER"
        )
    own = list(network.state_dict())
    there = set(names)
    prefixes = {name.removesuffix(own[0]) for name in names if name.endswith("." + own[0])}
    # most of the backbone stands under a prefix; a block of another ResNet has a conv1.weight, too
    prefixes = {prefix for prefix in prefixes if sum(prefix + key in there for key in own) > len(own) / 2}
    if own[0] not in there and prefixes:
        prefix = min(prefixes, key=len)
        raise WeightsError(
            f"backbone={file} has the prefix {prefix!r} before its names ({prefix + own[0]}), which could be another part of "
            f"a model. Bring it to plain names: python tools/export.py {file} --encoder NAME --to timm --out FOLDER"
        )
    return tensors_of(content, source=str(file))


def _exported_name(file: Path) -> str:
    """What the card beside an export says of its network."""
    for name in ("config.json", "run_card.json"):
        card = file.parent / name
        if card.is_file() and file.name in _EXPORTED:
            content = json.loads(card.read_text(encoding="utf-8"))
            encoder = (content.get("hgkd") or content).get("encoder") if isinstance(content, dict) else None
            if isinstance(encoder, dict) and "name" in encoder:
                return f"an exported {encoder['name']}"
    return ""
