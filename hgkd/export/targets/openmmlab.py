"""mmdet, mmseg and mmpretrain: a checkpoint for ``init_cfg`` and the config lines of the backbone around it.

Their own ResNets name weights as torchvision does, without ``fc`` (mmdet 3.3 ``models/backbones/resnet.py``; mmseg 1.2 and
mmpretrain 1.2 the same); ConvNeXt is mmpretrain's in all three (mmdet and mmseg take it as ``mmpretrain.ConvNeXt``, as in
mmdet's ``configs/convnext``). Any other student goes into mmpretrain through its wrapper ``TIMMBackbone``, whose names are
timm's after ``timm_model.``.

None of the libraries is needed for writing. The proof is made with the library itself where it imports; else by hgkd's own
reading (:mod:`hgkd.weights.importing`) into timm's network, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pprint import pformat
from types import ModuleType
from typing import Any, cast

import torch
from mmengine.model import BaseModel
from mmengine.runner.checkpoint import load_checkpoint
from torch import Tensor, nn

from hgkd.export.foreign import level_reader, same_norms
from hgkd.export.job import ExportError, Job, Target, Written, count_parameters, optional
from hgkd.export.plans import ConvNeXtPlan, UnsupportedLayerError, plan_of
from hgkd.networks.backbones import build_backbone
from hgkd.networks.libraries import OPENMMLAB, defaults_of, library_of
from hgkd.pixels import pixel_statistics
from hgkd.weights.cnn_names import MMPRETRAIN_CONVNEXT, TIMM, KeyStyle, renamed
from hgkd.weights.importing import import_weights

WEIGHTS_FILE, CONFIG_PAGE = "backbone.pth", "backbone_config.py"
_WRAPPED = KeyStyle("mmpretrain's TIMMBackbone", nn.Module, ((r"^", "timm_model."),))
_DEPTHS: dict[tuple[str, tuple[int, ...]], int] = {
    ("basic", (2, 2, 2, 2)): 18,
    ("basic", (3, 4, 6, 3)): 34,
    ("bottleneck", (3, 4, 6, 3)): 50,
    ("bottleneck", (3, 4, 23, 3)): 101,
    ("bottleneck", (3, 8, 36, 3)): 152,
}
_GROUP_WIDTH = {"mmdet": "base_width", "mmseg": "base_width", "mmpretrain": "width_per_group"}


def write(library: str, job: Job) -> Written:
    """``backbone.pth`` (mmengine's layout, no prefix) and ``backbone_config.py``.

    Args:
        library: 'mmdet', 'mmseg' or 'mmpretrain'.
    """
    if library_of(job.source.spec.name) in OPENMMLAB:
        return _write_own(library, job)
    style, backbone, notes = _backbone(library, job)
    weights = renamed(job.network, style)
    file = job.folder / WEIGHTS_FILE
    torch.save({"meta": {}, "state_dict": weights}, file)
    (job.folder / CONFIG_PAGE).write_text(_config_page(library, job, backbone), encoding="utf-8")

    owner, _, kind = backbone["type"].partition(".")
    module, version = optional(f"{owner}.models")
    last = _LAST.get(kind, _features)
    network: nn.Module
    if module is None:
        network = build_backbone(job.source.spec)
        import_weights(network, file)
        proven_with = f"hgkd.export.import_weights ({version})"
        notes.append(f"{version}, so {owner} itself has not read this export; export again where {owner} imports")
    else:
        network = _load(module, kind, backbone, str(file))
        proven_with = version

    def again(images: Tensor) -> Tensor:
        inputs = job.normalise(images)
        out: Tensor = last(network, inputs) if module is None else network(inputs)[-1]
        return out

    return Written(
        load_with=f"# copy model.backbone and data_preprocessor from\n# {job.out / CONFIG_PAGE}",
        proven_with=proven_with,
        reloaded=again,
        expected=lambda images: last(job.network, job.normalise(images)),
        tensors=len(weights),
        parameters=count_parameters(job.network),
        notes=notes,
    )


def _write_own(library: str, job: Job) -> Written:
    """The same of a student that is a backbone of one of the libraries by name, with its settings in full."""
    name, taps = job.source.spec.name, cast(Any, job.network).taps
    owner, _, kind = name.partition(".")
    module, version = optional(f"{owner}.models")
    if module is None:
        raise ExportError("library-not-importable", f"{version}, and its {kind} cannot be written without it")
    arguments = {key: value for key, value in job.source.spec.kwargs.items() if key != "taps"}
    defaults = defaults_of(getattr(module, kind))
    # eps and momentum of the norms are in no weight file, and the libraries' configs have others than their classes
    arguments |= {key: defaults[key] for key in ("norm_cfg",) if key in defaults and key not in arguments}
    backbone = {"type": name, **arguments}
    weights = renamed(job.network, TIMM)
    file = job.folder / WEIGHTS_FILE
    torch.save({"meta": {}, "state_dict": weights}, file)
    (job.folder / CONFIG_PAGE).write_text(_config_page(library, job, backbone), encoding="utf-8")
    network = _load(module, kind, backbone, str(file))
    same_norms(job.network, network)
    notes = ["all levels were compared; eps and momentum of the norms are those of the student"]
    notes += [f"its levels in training were the outputs of {', '.join(taps)}"] if taps else []
    return Written(
        load_with=f"# copy model.backbone and data_preprocessor from\n# {job.out / CONFIG_PAGE}",
        proven_with=version,
        reloaded=level_reader(job, network),
        expected=level_reader(job, job.network),
        tensors=len(weights),
        parameters=count_parameters(job.network),
        notes=notes,
    )


def _features(network: BaseModel, inputs: Tensor) -> Tensor:
    out: Tensor = network.forward_features(inputs)
    return out


# what the libraries' networks give last, said with timm's: their ConvNeXt ends with the norm that timm has in its head
_LAST: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "ConvNeXt": lambda network, inputs: network.head.norm(network.forward_features(inputs)),
    "TIMMBackbone": lambda network, inputs: network(inputs),
}


def _backbone(library: str, job: Job) -> tuple[KeyStyle, dict[str, Any], list[str]]:
    """Key style, the config that builds the network, and notes."""
    spec = job.source.spec
    try:
        return _native(library, job)
    except UnsupportedLayerError:
        if library != "mmpretrain" or spec.stem != "default":
            raise
    name = spec.name.partition(".")[0]
    wrapped = {"type": "mmpretrain.TIMMBackbone", "model_name": name, "features_only": False, **spec.kwargs}
    return _WRAPPED, wrapped, ["mmpretrain has no such network of its own; it takes timm's through TIMMBackbone"]


def _native(library: str, job: Job) -> tuple[KeyStyle, dict[str, Any], list[str]]:
    plan = plan_of(job.network, library)
    if isinstance(plan, ConvNeXtPlan):
        config = {
            "type": "mmpretrain.ConvNeXt",
            "arch": {"depths": list(plan.depths), "channels": list(plan.widths)},
            "use_grn": plan.grn,
            "layer_scale_init_value": 0.0 if plan.grn else 1.0,
            "linear_pw_conv": plan.linear,
            "out_indices": [0, 1, 2, 3],
            "gap_before_final_norm": False,
        }
        note = "norm0 to norm2 of mmpretrain.ConvNeXt are not in the file and start fresh, as with mmpretrain's own weights"
        return MMPRETRAIN_CONVNEXT, config, [note]
    depth = _DEPTHS.get((plan.block, plan.depths))
    if depth is None or not plan.standard_widths or (plan.groups == 1 and plan.base_width != 64):
        raise UnsupportedLayerError(
            "resnet-sizes-not-in-library",
            f"{library}'s ResNet has the depths 18, 34, 50, 101 and 152 at the paper's widths; this student has {plan.block} "
            f"blocks {plan.depths}, stages of {plan.widths} channels and base width {plan.base_width}; export it to timm",
        )
    grouped = {} if plan.groups == 1 else {"groups": plan.groups, _GROUP_WIDTH[library]: plan.base_width}
    kind = "ResNeXt" if grouped else "ResNet"
    return TIMM, {"type": f"{library}.{kind}", "depth": depth, "out_indices": (0, 1, 2, 3), "style": "pytorch", **grouped}, []


def _load(library: ModuleType, kind: str, backbone: dict[str, Any], file: str) -> nn.Module:
    """The library's own network with the weights, by its own reader, strictly."""
    arguments = {key: value for key, value in backbone.items() if key != "type"}
    if kind == "ConvNeXt":
        arguments["out_indices"] = [3]  # norm0 to norm2 are no weights of ours
    model: nn.Module = getattr(library, kind)(**arguments)
    try:
        load_checkpoint(model, file, map_location="cpu", strict=True)
    except RuntimeError as error:
        raise ExportError(
            "library-refuses-weights", f"{library.__name__}'s {kind} does not take the weights: {error}"
        ) from error
    model.eval()  # returns nothing in these libraries
    return model


def _config_page(library: str, job: Job, backbone: dict[str, Any]) -> str:
    mean, std = ([round(255 * value, 3) for value in values] for values in pixel_statistics(job.network))
    to_rgb = "to_rgb" if library == "mmpretrain" else "bgr_to_rgb"
    preprocessor = f"dict(mean={mean}, std={std}, {to_rgb}=True)"
    # mmengine writes the place of the config file in here, so that the folder may be moved
    pretrained = {"type": "Pretrained", "checkpoint": f"{{{{ fileDirname }}}}/{WEIGHTS_FILE}"}
    foreign = not backbone["type"].startswith(f"{library}.")
    lines = [
        f"# lines for a config of {library}; with a _base_ of another backbone, add _delete_=True to this one. The path in",
        "# init_cfg is right where this file lies; copied to another config, it must name the folder of this export",
    ]
    owner = backbone["type"].partition(".")[0]
    lines += [f"custom_imports = dict(imports=['{owner}.models'], allow_failed_imports=False)"] if foreign else []
    lines.append(f"backbone = {pformat({**backbone, 'init_cfg': pretrained}, sort_dicts=False)}")
    lines.append(
        f"data_preprocessor = {preprocessor}" if library == "mmpretrain" else f"# in data_preprocessor: {preprocessor}"
    )
    return "\n".join([*lines, "model = dict(backbone=backbone)", ""])


TARGETS = tuple(
    Target(
        library,
        f"a checkpoint and config lines for {library}: ResNet, ResNeXt, ConvNeXt, students named {library}.*; --part model: a "
        "whole model",
        partial(write, library),
        ("backbone", "model"),
    )
    for library in ("mmdet", "mmseg", "mmpretrain")
)
