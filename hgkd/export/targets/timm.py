"""timm: a folder that ``timm.create_model('local-dir:FOLDER', pretrained=True)`` opens, ready for a hub.

``model.safetensors`` and a ``config.json`` with the fields of ``timm.models.save_for_hf`` (timm 1.0.20 and later;
huggingface/pytorch-image-models, timm/models/_hub.py), plus our own section ``hgkd``.

A stem of ours (``stem='cifar'``) is nothing that timm can build from a config. Such a folder carries an architecture
name that timm refuses, rather than one it would build another network for, and is read by ``load_backbone`` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import timm
import torch
from safetensors.torch import save_file
from torch import nn

from hgkd.errors import WeightsError
from hgkd.export.card import write_json
from hgkd.export.job import ExportError, Job, Target, Written, count_parameters
from hgkd.export.plans import UnsupportedLayerError
from hgkd.networks.backbones import load_backbone
from hgkd.networks.libraries import home_of, library_of
from hgkd.weights.cnn_names import TIMM, renamed
from hgkd.weights.export_folder import CONFIG_FILE, WEIGHTS_FILE
from hgkd.weights.run_file import FORMAT, EncoderSpec

# Facts of the network itself; names, licences and addresses of timm's own weights are not facts of ours
_KEPT_CFG = (
    "input_size",
    "min_input_size",
    "fixed_input_size",
    "interpolation",
    "crop_pct",
    "crop_mode",
    "mean",
    "std",
    "pool_size",
    "first_conv",
    "classifier",
)


def write(job: Job) -> Written:
    """See the module's header."""
    spec = job.source.spec
    if library_of(spec.name) is not None:
        raise UnsupportedLayerError(f"timm has no {spec.name}; {home_of(spec.name)}")
    if job.what == "classifier" and spec.stem != "default":
        raise WeightsError(f"timm cannot build the {spec.stem} stem from a config; export this classifier to onnx or program")
    weights = renamed(job.network, TIMM)
    save_file(weights, job.folder / WEIGHTS_FILE, metadata={"format": "pt"})
    write_json(_config(spec, job.network, job.source.classes), job.folder / CONFIG_FILE)
    if spec.stem == "default":
        load_with = f"timm.create_model('local-dir:{job.out}', pretrained=True)"
        proven_with = f"timm {timm.__version__}"
        again = timm.create_model(f"local-dir:{job.folder}", pretrained=True).eval()
        gives = "logits" if job.what == "classifier" else "the feature map, pooled as its architecture does"
        notes = [f"forward_features gives the feature map; calling the model gives {gives}"]
    else:
        load_with = f"hgkd.export.load_backbone('{job.out}')"
        proven_with = "hgkd.export.load_backbone"
        again = load_backbone(job.folder)
        notes = [
            f"timm cannot build the {spec.stem} stem from a config and refuses this folder; read it with "
            "hgkd.export.load_backbone, which loads strictly; the proof was made with it"
        ]
    same_weights(job.network, again)
    return Written(
        load_with=load_with,
        proven_with=proven_with,
        again=lambda images: job.run(again, job.normalise(images)),
        tensors=len(weights),
        parameters=count_parameters(job.network),
        notes=notes,
    )


def same_weights(source: nn.Module, again: nn.Module) -> None:
    """Check that a re-read network of timm's has the source's weights, bit for bit.

    Raises:
        ExportError: keys or values differ.
    """
    before, after = source.state_dict(), again.state_dict()
    missing, added = sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())
    if missing or added:
        raise ExportError(f"the re-read network lacks the weights {missing[:5]} and has {added[:5]} beyond the source's")
    changed = [name for name, value in before.items() if not torch.equal(value.cpu(), after[name].cpu())]
    if changed:
        raise ExportError(f"{len(changed)} tensors changed on the way to disk and back, e.g. {changed[:3]}")


def _config(spec: EncoderSpec, source: nn.Module, classes: Sequence[str]) -> dict[str, Any]:
    architecture = spec.name.partition(".")[0]  # what follows the dot names weights of timm's
    known = cast(Mapping[str, Any], source.pretrained_cfg)
    cfg = {key: known[key] for key in _KEPT_CFG if known.get(key) is not None or key == "classifier"}
    return {
        "architecture": architecture if spec.stem == "default" else f"{architecture} with hgkd's {spec.stem} stem",
        "num_classes": source.num_classes,
        **({"label_names": list(classes)} if classes else {}),
        "num_features": source.num_features,
        "model_args": spec.kwargs,
        "pretrained_cfg": {**cfg, "num_classes": source.num_classes, "custom_load": False},
        "hgkd": {"format": FORMAT, "encoder": spec.to_dict()},
    }


TARGETS = (
    Target(
        "timm",
        "a folder for timm.create_model('local-dir:...'), ready for the Hugging Face hub",
        write,
        ("backbone", "classifier"),
        hub_library="timm",
    ),
)
