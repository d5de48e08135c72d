"""The registries of hgkd, children of mmengine's roots, so that configs of both can be mixed.

Classes are registered under their own name; a second registration of a name is an error.
``MODELS`` holds students, teachers, mask generators and distillers; ``MASKED_OBJECTIVES`` and ``FINETUNING_OBJECTIVES`` the two
kinds of objective; ``DATASETS``, ``DATA_SAMPLERS``, ``HOOKS``, ``METRICS`` and ``RUNNERS`` what their names say;
``MODEL_WRITERS`` what writes whole detectors and segmentors, by export target.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from mmengine import registry as _roots
from mmengine.registry import DefaultScope, Registry

from hgkd.errors import unknown_name_message

if TYPE_CHECKING:
    from mmengine.config import Config
    from mmengine.runner import Runner

_MODEL_LOCATIONS = ["hgkd.masking", "hgkd.students", "hgkd.teachers", "hgkd.distillers"]

MODELS = Registry("model", parent=_roots.MODELS, scope="hgkd", locations=_MODEL_LOCATIONS)
# roots of their own: nothing of mmengine's, mmdet's or mmseg's serves as an objective
MASKED_OBJECTIVES = Registry("masked objective", scope="hgkd", locations=["hgkd.objectives"])
FINETUNING_OBJECTIVES = Registry("fine-tuning objective", scope="hgkd", locations=["hgkd.objectives"])
DATASETS = Registry("dataset", parent=_roots.DATASETS, scope="hgkd", locations=["hgkd.data"])
DATA_SAMPLERS = Registry("data sampler", parent=_roots.DATA_SAMPLERS, scope="hgkd", locations=["hgkd.data"])
HOOKS = Registry("hook", parent=_roots.HOOKS, scope="hgkd", locations=["hgkd.training"])
METRICS = Registry("metric", parent=_roots.METRICS, scope="hgkd", locations=["hgkd.evaluation"])
RUNNERS = Registry("runner", parent=_roots.RUNNERS, scope="hgkd", locations=["hgkd.training"])
MODEL_WRITERS = Registry("writer of whole models", scope="hgkd", locations=["hgkd.openmmlab.deployment"])
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    "optim wrapper constructor",
    parent=_roots.OPTIM_WRAPPER_CONSTRUCTORS,
    scope="hgkd",
    locations=["hgkd.training"],
)


def build_runner(cfg: Config) -> Runner:
    """The runner of a config, whatever was trained in this program before: mmengine looks a name up where the last one did."""
    # not overwrite_default_scope, which at its end would also take back the scope that the runner sets for itself
    DefaultScope.get_instance(f"before a runner {time.time()}", scope_name=RUNNERS.scope)
    runner: Runner = RUNNERS.build(cfg)
    return runner


def unknown_objective_message(registry: Registry, name: str) -> str:
    """Message for a name that one of the two registries of objectives does not hold; says when the other one does."""
    registry.import_from_location()
    other = FINETUNING_OBJECTIVES if registry is MASKED_OBJECTIVES else MASKED_OBJECTIVES
    if name in other.module_dict:
        serve = ", ".join(sorted(registry.module_dict))
        return f"{name} is a {other.name} and cannot be a {registry.name}; those that serve: {serve}"
    return unknown_name_message(registry.name, name, registry.module_dict)
