"""The backbone's weight file: all of it, into the backbone alone, or a message that says what the file is instead.

mmengine's ``init_cfg=dict(type='Pretrained')`` loads what fits and logs the rest. Here every entry of the backbone must be
filled and nothing of the file left over but a classifier.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.logging import print_log
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hgkd.errors import InvalidValueError, MissingFileError, WeightsError
from hgkd.networks.encoder import build_encoder
from hgkd.networks.libraries import LIBRARIES, build_library_network, library_of
from hgkd.openmmlab.backbone import TimmBackbone
from hgkd.pixels import near, pixel_statistics
from hgkd.weights.identify import WeightFile, identify
from hgkd.weights.importing import ImportReport, import_weights
from hgkd.weights.loading import check_finite, load_strict

_EXPORTED = ("backbone.pth", "model.safetensors")  # as hgkd export --to mmdet, mmseg, timm, torchvision name them
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
        path: a folder that ``hgkd export --to timm|mmdet|mmseg|torchvision`` wrote, or a weight file whose names are the
            backbone's without any prefix, in one of the styles of :mod:`hgkd.weights.cnn_names`. A classifier is left aside.

    Raises:
        FileNotFoundError: no such file.
        WeightsError: a training checkpoint, names with a prefix, another architecture, values that are not finite, or anything
            missing or left over; the backbone is unchanged then.
    """
    file = identify(_weight_file(Path(path).expanduser()))
    network: nn.Module = backbone.network if isinstance(backbone, TimmBackbone) else backbone
    weights = _plain_weights(file, network)
    _refuse_other_channels(network, weights, path)
    check_finite(Path(path), {key: value for key, value in weights.items() if not key.startswith(_CLASSIFIER)})
    _check_norms(network, file.path, str(path))
    exported = _exported_network(backbone, file.path) if isinstance(backbone, TimmBackbone) else None
    before = {} if exported is None else {name: entry.clone() for name, entry in network.state_dict().items()}
    try:
        report = import_weights(network, file, prefix="", allow=_CLASSIFIER)
    except WeightsError as error:
        needs = describe(network.state_dict()) or type(network).__name__
        holds = _exported_name(file.path) or describe(weights) or "another network"
        reason = error.__cause__ or error  # without the remedy of import_weights, for which a training has no option
        if {"stem.0.weight", "layer1.0.conv1.weight"} <= network.state_dict().keys() and "conv1.weight" in weights:
            raise WeightsError(
                "stem-of-resnetv1c",
                f"backbone={path} holds {holds} with one convolution as stem, and this config's backbone, {needs}, has three "
                "(mmseg's ResNetV1c). Set model.backbone.type=ResNet (in a distillation model.student.backbone.type=ResNet) "
                f"or give weights of a ResNetV1c. {reason}",
            ) from error
        if holds == needs:
            raise WeightsError(
                "weights-do-not-fit", f"backbone={path} holds {holds} as this config needs it, but not all fits. {reason}"
            ) from error
        raise WeightsError(
            "backbone-of-another-network", f"backbone={path} holds {holds}, and this config's backbone is {needs}. {reason}"
        ) from error
    if isinstance(backbone, TimmBackbone) and exported is not None:
        load_strict(exported, network.state_dict(), source=str(path))
        if not backbone.computes_as(exported):
            network.load_state_dict(before)
            name = _card(file.path)["name"]
            raise WeightsError(
                "backbone-computes-otherwise",
                f"backbone={path} was exported from {_with_arguments(name, _card(file.path).get('kwargs'))}, and this config's "
                f"backbone is {_with_arguments(backbone.name, backbone.timm_kwargs)}: all weights fit, but its features are "
                f"others, by other paddings, norms or activations. Set model.backbone.name={name} and the same arguments "
                "(distillation: model.student.backbone)",
            )
    return report


def _exported_network(backbone: TimmBackbone, file: Path) -> nn.Module | None:
    """The network of timm that an export is from, with random weights; None for other files, and where the backbone is it.

    Equal names and shapes of weights are no equal networks: timm's ``tf_efficientnet_b0`` and ``efficientnet_b0`` differ in
    padding and eps.
    """
    encoder = _card(file)
    dilated = {key: value for key, value in backbone.timm_kwargs.items() if key == "output_stride"}  # the same weights
    kwargs = {**(encoder.get("kwargs") or {}), **dilated}
    name, stem = str(encoder.get("name")), str(encoder.get("stem") or "default")
    foreign = not encoder or library_of(name) in LIBRARIES  # of the latter _check_norms
    same = (name, stem, kwargs) == (backbone.name, "default", backbone.timm_kwargs)
    return None if foreign or same else build_encoder(name, stem=stem, **kwargs)


def _with_arguments(name: object, kwargs: Mapping[str, Any] | None) -> str:
    return ", ".join([str(name), *(f"{key}={value!r}" for key, value in (kwargs or {}).items())])


def _check_norms(network: nn.Module, file: Path, path: str) -> None:
    """Compare eps of the norms, which no weight file holds, with those of an exported network that is not timm's.

    Raises:
        WeightsError: they differ: mmdet's configs give its backbones other norms than their classes have by default.
    """
    encoder = _card(file)
    if not encoder or library_of(str(encoder["name"])) not in LIBRARIES:
        return
    trained = build_library_network(str(encoder["name"]), **(encoder.get("kwargs") or {}))
    norms = {name: layer.eps for name, layer in network.named_modules() if isinstance(layer, _BatchNorm)}
    for name, layer in trained.named_modules():
        if isinstance(layer, _BatchNorm) and norms.get(name, layer.eps) != layer.eps:
            raise WeightsError(
                "backbone-norms-differ",
                f"backbone={path} was trained with eps={layer.eps:g} in its norms, this config's backbone has "
                f"eps={norms[name]:g}: its features would be others. Set --cfg-options model.backbone.norm_cfg.eps="
                f"{layer.eps:g} model.backbone.norm_cfg.momentum={layer.momentum:g} (distillation: model.student.backbone)",
            )


def _refuse_other_channels(network: nn.Module, weights: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Raise WeightsError for weights of images with other channels than mmdet's and mmseg's loaders read."""
    name, first = next(((name, part) for name, part in network.named_modules() if isinstance(part, nn.Conv2d)), ("", None))
    stem = weights.get(f"{name}.weight")
    if first is None or not isinstance(stem, Tensor) or stem.ndim != 4 or stem.shape[1] == first.in_channels:
        return
    raise WeightsError(
        "channels-differ",
        f"backbone={path} takes images of {stem.shape[1]} channels, this config's backbone {first.in_channels}: mmdet and "
        "mmseg read images as 8-bit BGR. Train the student on RGB images, or give the config a loader, a data_preprocessor "
        "and a backbone of your own for as many channels",
    )


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
        raise InvalidValueError(
            "random-weights-frozen",
            f"backbone=None: the backbone starts from random weights, and {' and '.join(fixed)}. Set backbone=FILE to "
            "weights for it, or train all of it: frozen_stages=-1 (hgkd.TimmBackbone: 0) and norm_eval=False in "
            "model.backbone (a distillation: model.student.backbone)",
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
    for sample, kind in (("stem.conv.conv.weight", "CSPDarknet"), ("stem.2.conv.weight", "CSPNeXt")):
        if isinstance(weights.get(sample), Tensor) and any(key.startswith("stage1.0.") for key in weights):
            return f"a {kind} ({weights[sample].shape[0]} channels in the stem)"
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
            raise MissingFileError(
                "folder-without-weights",
                f"backbone={path} is a folder without {' or '.join(_EXPORTED)}; give one that hgkd export wrote, or a file",
            )
        return found[0]
    if not path.is_file():
        raise MissingFileError(
            "weight-file-missing",
            f"backbone={path} does not exist; give a folder that 'hgkd export CHECKPOINT --to timm --out FOLDER' wrote, or "
            "a weight file",
        )
    return path


def _plain_weights(file: WeightFile, network: nn.Module) -> dict[str, Tensor]:
    """The file's weights, when their names carry no prefix; else the error that says what to do."""
    content = file.content
    if "hgkd" in file.meta:
        raise WeightsError(
            "checkpoint-where-export-needed",
            f"backbone={file} is a training checkpoint of hgkd (student, decoder and optimiser). Export the student first: "
            f"hgkd export {file} --to timm --out FOLDER, then backbone=FOLDER",
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
            "whole-model-where-backbone-needed",
            f"backbone={file} is the checkpoint of a whole detector or segmentor, not of a backbone. To continue from it, use "
            "load_from=FILE; for its backbone alone: hgkd export FILE --encoder NAME --to timm --out FOLDER",
        )
    own = list(network.state_dict())
    there = set(names)
    prefixes = {name.removesuffix(own[0]) for name in names if name.endswith("." + own[0])}
    # most of the backbone stands under a prefix; a block of another ResNet has a conv1.weight, too
    prefixes = {prefix for prefix in prefixes if sum(prefix + key in there for key in own) > len(own) / 2}
    if own[0] not in there and prefixes:
        prefix = min(prefixes, key=len)
        raise WeightsError(
            "weights-with-prefix",
            f"backbone={file} has the prefix {prefix!r} before its names ({prefix + own[0]}), which could be another part of "
            f"a model. Bring it to plain names: hgkd export {file} --encoder NAME --to timm --out FOLDER",
        )
    return file.tensors()


def _exported_name(file: Path) -> str:
    """Description of an export's network, from the card in its folder."""
    name = _card(file).get("name")
    return f"an exported {name}" if name else ""


def _card(file: Path) -> dict[str, Any]:
    """Description of an export's encoder (``name``, ``pixels`` and more) from its card; empty for other files."""
    for name in ("config.json", "run_card.json"):
        card = file.parent / name
        if not card.is_file() or file.name not in _EXPORTED:
            continue
        content = json.loads(card.read_text(encoding="utf-8"))
        content = content if isinstance(content, dict) else {}
        encoder = (content.get("hgkd") or content).get("encoder") or content.get("network")
        if isinstance(encoder, dict) and "name" in encoder:
            timm_cfg = content.get("pretrained_cfg") or {}
            pixels = {"pixels": [timm_cfg["mean"], timm_cfg["std"]]} if {"mean", "std"} <= timm_cfg.keys() else {}
            return {**encoder, **pixels}
    return {}


@dataclass(frozen=True)
class Pixels:
    """How images reach a network.

    Attributes:
        mean, std: of pixels in 0 .. 255, in the order of the channels; None: not normalised.
        order: 'RGB' or 'BGR'; of other than three channels it says nothing.
    """

    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    order: str

    def agrees(self, other: Pixels) -> bool:
        """Whether a network takes the one for the other, see :func:`hgkd.pixels.near`."""
        if self.mean is None or other.mean is None or self.std is None or other.std is None:
            return self == other
        if self.has_order and self.order != other.order:
            return False
        if not len(self.mean) == len(other.mean) == len(self.std) == len(other.std):
            return False
        return near((self.mean, self.std), (other.mean, other.std), unit=1.0)

    @property
    def has_order(self) -> bool:
        """Whether the channels are those of colours; of grey images and those of 4 channels, none can be turned."""
        return self.mean is None or len(self.mean) == 3

    def __str__(self) -> str:
        if self.mean is None:
            return f"{self.order}, pixels from 0 to 255 as they are"
        order = f"{self.order}, " if self.has_order else ""
        return f"{order}mean {_listed(self.mean)}, std {_listed(self.std or ())}"


def prepared_pixels(preprocessor: Mapping[str, Any], pipeline: Sequence[Mapping[str, Any]] = ()) -> Pixels | None:
    """How a config of mmdet or mmseg prepares images; None: by a step of its own, ``Normalize``.

    Args:
        preprocessor: its model's ``data_preprocessor``.
        pipeline: of its training images.
    """
    kinds = {str(step.get("type")).rpartition(".")[2]: step for step in pipeline}
    if "Normalize" in kinds:
        return None
    reading = next((step for kind, step in kinds.items() if kind in ("LoadImageFromFile", "LoadReadableImage")), {})
    order = str(reading.get("channel_order", "bgr")).upper()
    inside = preprocessor.get("data_preprocessor")  # of MultiBranchDataPreprocessor
    preprocessor = inside if isinstance(inside, Mapping) else preprocessor
    turned = bool(preprocessor.get("bgr_to_rgb") or preprocessor.get("rgb_to_bgr"))
    mean, std = preprocessor.get("mean"), preprocessor.get("std")
    if turned:
        order = "RGB" if order == "BGR" else "BGR"
    return Pixels(None if mean is None else tuple(mean), None if std is None else tuple(std), order)


def check_pixels(
    backbone: nn.Module, path: str | os.PathLike[str], given: Pixels | None, where: str = "model", refuse: bool = True
) -> None:
    """Compare how a config prepares its images with what the backbone's weights were trained on.

    Of an export its card says it. Of other files ImageNet's usual numbers are taken (timm's for the network of a
    ``TimmBackbone``), and a difference is a line of the log: weights of caffe's ResNets, for one, want BGR and no std.

    Args:
        backbone: see :func:`load_backbone_file`.
        path: the file or folder of the weights.
        given: how this config prepares images; None is not compared.
        where: the place of the detector or segmentor in the config, for the message.
        refuse: False: the log has a line of exports, too.

    Raises:
        ValueError: an export, and other images.
    """
    card = _card(_weight_file(Path(path).expanduser()))
    wanted = _trained_on(card, backbone)
    set_to, differs = [], []
    if given is not None and not given.agrees(wanted):
        differs.append(f"images prepared as {wanted}; this config prepares them as {given}")
        place = f"{where}.data_preprocessor"
        set_to += [f"{place}.mean={_listed(wanted.mean or ())}", f"{place}.std={_listed(wanted.std or ())}"]
        set_to += [f"{place}.bgr_to_rgb=True"] if wanted.has_order and given.order == "BGR" else []
    if getattr(backbone, "style", None) == "caffe" and "layer1.0.conv3.weight" in backbone.state_dict():
        differs.append("blocks whose second convolution has the stride; with style='caffe' the first has it")
        set_to.append(f"{where}.backbone.style=pytorch")
    if not differs:
        return
    known = "was trained with" if card else "is taken to want what ImageNet's usual weights do:"
    told = f"backbone={path} {known} {', and '.join(differs)}. Features of other images are far worse, and nothing fails. "
    told += f"Set --cfg-options {' '.join(set_to)}"
    if where != "model":
        told += ", and the same for model.teacher (a distillation whose student or teacher is a file: in that file)"
    if card and refuse:
        raise InvalidValueError("pixels-differ", told)
    told += "" if card else "; leave it where the weights are of that kind, e.g. caffe's (BGR, std 1, style='caffe')"
    print_log(told, "current", logging.WARNING)


def _trained_on(card: Mapping[str, Any], backbone: nn.Module) -> Pixels:
    if card.get("pixels"):
        mean, std = card["pixels"]
    elif isinstance(backbone, TimmBackbone):
        mean, std = pixel_statistics(backbone.network)
    else:
        known = get_pretrained_cfg(str(card["name"]), allow_unregistered=True) if card else None
        mean, std = (known.mean, known.std) if known is not None else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    mean, std = (tuple(round(255 * value, 3) for value in values) for values in (mean, std))
    return Pixels(mean, std, "RGB")


def _listed(values: Sequence[float]) -> str:
    return f"[{','.join(f'{value:g}' for value in values)}]"
