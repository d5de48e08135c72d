"""transformers: a folder for ``AutoModel.from_pretrained``, with its ResNet, ConvNext or ConvNextV2.

Written without transformers (``config.json`` and ``model.safetensors`` are plain files); read back with it where it is
installed, else by hgkd's own reading, and the report says so. Facts from transformers 5.24, ``models/resnet``, ``convnext``,
``convnextv2``. ``preprocessor_config.json`` is for ``AutoImageProcessor``: images are brought to (H, W), without a crop, and
normalised.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from hgkd.differences import largest_difference
from hgkd.export.card import write_json
from hgkd.export.job import ExportError, Job, Target, Written, count_parameters, optional
from hgkd.export.plans import ConvNeXtPlan, ResNetPlan, UnsupportedLayerError, plan_of
from hgkd.networks.backbones import build_backbone
from hgkd.pixels import pixel_statistics, to_unit_range
from hgkd.weights.cnn_names import TRANSFORMERS_CONVNEXT, TRANSFORMERS_RESNET, KeyStyle, renamed
from hgkd.weights.export_folder import CONFIG_FILE, WEIGHTS_FILE
from hgkd.weights.importing import import_weights


def write(job: Job) -> Written:
    """Write the export that the module's header describes."""
    plan = plan_of(job.network, "transformers")
    style, config = _convnext(plan) if isinstance(plan, ConvNeXtPlan) else _resnet(plan)
    weights = {key: _shaped(key, value) for key, value in renamed(job.network, style).items()}
    save_file(weights, job.folder / WEIGHTS_FILE, metadata={"format": "pt"})
    write_json(config, job.folder / CONFIG_FILE)
    mean, std = pixel_statistics(job.network)
    height, width = job.image_size
    size = {"height": height, "width": width}
    # the processor that the model's type stands for (ConvNext's, of ResNets, too) wants its size as a shortest edge
    facts = {"image_processor_type": "ViTImageProcessor", "image_mean": list(mean), "image_std": list(std), "size": size}
    write_json({"do_resize": True, "do_rescale": True, "do_normalize": True, **facts}, job.folder / "preprocessor_config.json")

    transformers, version = optional("transformers")
    network: nn.Module
    if transformers is None:
        network = build_backbone(job.source.spec)
        import_weights(network, job.folder / WEIGHTS_FILE)
    else:
        network = _load(transformers, job)
        _check_processor(transformers, job)

    def again(images: Tensor) -> Tensor:
        inputs = job.normalise(images)
        if transformers is None:
            return cast(Callable[[Tensor], Tensor], network.forward_features)(inputs)
        out: Tensor = network(inputs).last_hidden_state
        return out

    absent = f"{version}, so it has not read this export itself; export again where it is installed"
    return Written(
        load_with=f"transformers.AutoModel.from_pretrained('{job.out}')",
        proven_with=version if transformers is not None else f"hgkd.export.import_weights ({version})",
        reloaded=again,
        tensors=len(weights),
        parameters=count_parameters(job.network),
        notes=[] if transformers is not None else [absent],
    )


def _shaped(key: str, value: Tensor) -> Tensor:
    """transformers keeps 1x1 convolutions as linear layers and the parameters of GRN with four axes."""
    if ".pwconv" in key and value.dim() == 4:
        return value.flatten(1)
    return value.view(1, 1, 1, -1) if ".grn." in key else value


def _resnet(plan: ResNetPlan) -> tuple[KeyStyle, dict[str, Any]]:
    if plan.groups != 1 or plan.base_width != 64:
        raise UnsupportedLayerError(
            "groups-not-in-library",
            f"transformers' ResNet has no groups and no wide bottlenecks; this student's layer1.0.conv2 has {plan.groups} "
            f"groups of base width {plan.base_width}; export it to timm",
        )
    return TRANSFORMERS_RESNET, {
        "architectures": ["ResNetModel"],
        "model_type": "resnet",
        "num_channels": 3,
        "embedding_size": plan.stem,
        "hidden_sizes": list(plan.widths),
        "depths": list(plan.depths),
        "layer_type": plan.block,
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
    }


def _convnext(plan: ConvNeXtPlan) -> tuple[KeyStyle, dict[str, Any]]:
    kind = "ConvNextV2" if plan.grn else "ConvNext"
    return TRANSFORMERS_CONVNEXT, {
        "architectures": [f"{kind}Model"],
        "model_type": kind.lower(),
        "num_channels": 3,
        "patch_size": 4,
        "num_stages": len(plan.depths),
        "hidden_sizes": list(plan.widths),
        "depths": list(plan.depths),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        **({} if plan.grn else {"layer_scale_init_value": 1e-6}),
    }


def _load(transformers: ModuleType, job: Job) -> nn.Module:
    """The library's own network; every key of the file used, every entry of the network filled.

    Raises:
        ExportError: something is missing, left over or of another shape.
    """
    model, found = transformers.AutoModel.from_pretrained(
        str(job.folder), output_loading_info=True, local_files_only=True, dtype=torch.float32
    )
    wrong = {what: sorted(map(str, keys))[:5] for what, keys in found.items() if keys}
    if wrong:
        raise ExportError("library-refuses-weights", f"transformers does not take the weights: {wrong}")
    return cast(nn.Module, model).eval()


def _check_processor(transformers: ModuleType, job: Job) -> None:
    """Let the library prepare a picture of the network's size, which needs no resizing.

    Raises:
        ExportError: its pixels are not those that hgkd gives the network.
    """
    processor = transformers.AutoImageProcessor.from_pretrained(str(job.folder), local_files_only=True)
    pixels = torch.randint(0, 256, (1, 3, *job.image_size), dtype=torch.uint8)
    found = processor(Image.fromarray(pixels[0].permute(1, 2, 0).numpy()), return_tensors="pt")["pixel_values"]
    difference = largest_difference(found, job.normalise(to_unit_range(pixels)))
    if not difference <= 1e-5:
        raise ExportError(
            "library-prepares-other-pixels",
            f"transformers' {type(processor).__name__} gives {tuple(found.shape)} of a picture of {tuple(pixels.shape)}, whose "
            f"values differ by {difference:.2e} from those that the student was trained with",
        )


TARGETS = (
    Target(
        "transformers", "a folder for transformers.AutoModel: ResNet, ConvNext, ConvNextV2", write, hub_library="transformers"
    ),
)
