"""torch: the weights of a network that is not timm's under its own names, and what builds it again.

``model.safetensors`` and ``config.json``: any network of :mod:`hgkd.networks.libraries`, a user's own module before all. Who
has the class loads the file with ``load_state_dict``; hgkd reads the folder back.
"""

from __future__ import annotations

from safetensors.torch import load_file, save_file

from hgkd.export.card import write_json
from hgkd.export.foreign import level_reader, same_norms
from hgkd.export.job import Job, Target, Written, count_parameters, load_all
from hgkd.export.plans import UnsupportedLayerError
from hgkd.networks.backbones import build_backbone
from hgkd.networks.libraries import library_of
from hgkd.weights.cnn_names import TIMM, renamed
from hgkd.weights.export_folder import CONFIG_FILE, WEIGHTS_FILE
from hgkd.weights.run_file import FORMAT


def write(job: Job) -> Written:
    """See the module's header."""
    spec = job.source.spec
    if library_of(spec.name) is None:
        raise UnsupportedLayerError(
            "torch-target-for-timm", f"--to torch is for networks that are not timm's, and {spec.name} is; export it to timm"
        )
    weights = renamed(job.network, TIMM)
    save_file(weights, job.folder / WEIGHTS_FILE, metadata={"format": "pt"})
    write_json({"hgkd": {"format": FORMAT, "encoder": spec.to_dict()}}, job.folder / CONFIG_FILE)
    again = load_all(build_backbone(spec), load_file(job.folder / WEIGHTS_FILE), spec.name)
    same_norms(job.network, again)
    found, expected = level_reader(job, again), level_reader(job, job.network)
    return Written(
        load_with=f"network.load_state_dict(safetensors.torch.load_file('{job.out / WEIGHTS_FILE}'))",
        proven_with=f"{spec.name}, built anew",
        reloaded=found,
        expected=expected,
        tensors=len(weights),
        parameters=count_parameters(job.network),
        notes=[f"arguments of {spec.name} are in {CONFIG_FILE}; all levels were compared"],
    )


TARGETS = (Target("torch", "weights under its own names of a network that is not timm's, e.g. your own module", write),)
