"""torchvision: a state dict for its ResNet or ConvNeXt class.

torchvision has no config files; ``build.py`` next to the weights makes the network in a few lines.
"""

from __future__ import annotations

import runpy
from typing import Any, cast

import torchvision
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import convnext, resnet

from hgkd.export.foreign import level_reader, same_norms
from hgkd.export.job import Job, Target, Written, count_parameters, load_all
from hgkd.export.plans import ConvNeXtPlan, ResNetPlan, UnsupportedLayerError, plan_of
from hgkd.networks.libraries import library_of
from hgkd.weights.cnn_names import TIMM, TORCHVISION_CONVNEXT, fitted, renamed
from hgkd.weights.export_folder import WEIGHTS_FILE
from hgkd.weights.run_file import EncoderSpec

BUILD_FILE = "build.py"


def write(job: Job) -> Written:
    """``model.safetensors`` in torchvision's naming, without classifier, and ``build.py`` that makes the network."""
    recipe = recipe_of(job.network, job.source.spec)
    (job.folder / BUILD_FILE).write_text(recipe, encoding="utf-8")
    model: nn.Module = runpy.run_path(str(job.folder / BUILD_FILE))["model"]  # what is proven is what the user is given
    if library_of(job.source.spec.name) == "torchvision":
        return _write_own(job, model)
    resnet_like = isinstance(plan_of(job.network, "torchvision"), ResNetPlan)
    weights = renamed(job.network, TIMM if resnet_like else TORCHVISION_CONVNEXT)
    save_file(fitted(weights, model.state_dict()), job.folder / WEIGHTS_FILE, metadata={"format": "pt"})
    load_all(model, load_file(job.folder / WEIGHTS_FILE), "torchvision")
    last = "layer4" if resnet_like else "features"
    body = torchvision.models.feature_extraction.create_feature_extractor(model, {last: "features"}).eval()
    return Written(
        load_with=f"from build import model  # {job.out}/build.py\n"
        f"model.load_state_dict(safetensors.torch.load_file('{job.out / WEIGHTS_FILE}'))",
        proven_with=f"torchvision {torchvision.__version__}",
        reloaded=lambda images: body(job.normalise(images))["features"],
        tensors=len(weights),
        parameters=count_parameters(job.network),
        notes=["the classifier is replaced by nn.Identity(); calling the model gives pooled features"],
    )


def recipe_of(network: nn.Module, spec: EncoderSpec) -> str:
    """The text of ``build.py``.

    Raises:
        UnsupportedLayerError: torchvision has no such network.
    """
    if library_of(spec.name) == "torchvision":
        return _own_recipe(network, spec)
    plan = plan_of(network, "torchvision")
    return _resnet_recipe(plan) if isinstance(plan, ResNetPlan) else _convnext_recipe(plan)


def _own_recipe(network: nn.Module, spec: EncoderSpec) -> str:
    """Of a student that is a model of torchvision by name."""
    kwargs = {key: value for key, value in spec.kwargs.items() if key != "taps"}
    heads = [head for head in cast(Any, network).pretrained_cfg["classifier"] if hasattr(network, head)]
    lines = ["from torch import nn", "from torchvision.models import get_model", ""]
    lines.append(f"model = get_model({spec.name.partition('.')[2]!r}, weights=None, **{kwargs!r})")
    lines += [f"model.{head} = nn.Identity()" for head in heads]
    return "\n".join([*lines, ""])


def _write_own(job: Job, model: nn.Module) -> Written:
    """The rest of :func:`write` for a student that is a model of torchvision by name."""
    weights = renamed(job.network, TIMM)
    save_file(weights, job.folder / WEIGHTS_FILE, metadata={"format": "pt"})
    load_all(model, load_file(job.folder / WEIGHTS_FILE), "torchvision")
    same_norms(job.network, model)
    return Written(
        load_with=f"from build import model  # {job.out}/build.py\n"
        f"model.load_state_dict(safetensors.torch.load_file('{job.out / WEIGHTS_FILE}'))",
        proven_with=f"torchvision {torchvision.__version__}",
        reloaded=level_reader(job, model),
        expected=level_reader(job, job.network),
        tensors=len(weights),
        parameters=count_parameters(job.network),
        notes=["the classifier is replaced by nn.Identity(); all levels were compared"],
    )


def _resnet_recipe(plan: ResNetPlan) -> str:
    if not plan.standard_widths:
        raise UnsupportedLayerError(
            "resnet-sizes-not-in-library",
            f"torchvision's ResNet has 64 channels in its stem and stages of 64-128-256-512 (times 4 for bottlenecks), this "
            f"student {plan.stem} and {'-'.join(map(str, plan.widths))}; export it to timm",
        )
    block = {"basic": resnet.BasicBlock, "bottleneck": resnet.Bottleneck}[plan.block].__name__
    return (
        "from torch import nn\nfrom torchvision.models import resnet\n\n"
        f"model = resnet.ResNet(resnet.{block}, {list(plan.depths)}, groups={plan.groups}, "
        f"width_per_group={plan.base_width})\nmodel.fc = nn.Identity()\n"
    )


def _convnext_recipe(plan: ConvNeXtPlan) -> str:
    if plan.grn:
        raise UnsupportedLayerError(
            "grn-not-in-library", "torchvision's ConvNeXt has no layer for stages.0.blocks.0.mlp.grn; export it to timm"
        )
    following = [*plan.widths[1:], None]
    settings = ", ".join(
        f"{convnext.CNBlockConfig.__name__}({width}, {after}, {depth})"
        for width, after, depth in zip(plan.widths, following, plan.depths, strict=True)
    )
    return (
        "from torch import nn\nfrom torchvision.models.convnext import CNBlockConfig, ConvNeXt\n\n"
        f"model = ConvNeXt([{settings}])\nmodel.classifier[2] = nn.Identity()\n"
    )


TARGETS = (Target("torchvision", "weights for torchvision's ResNet or ConvNeXt, or any student named torchvision.*", write),)
