"""The registries of hgkd, children of mmengine's roots, so that configs of both can be mixed.

Classes are registered under their own name; a second registration of a name is an error.
``MODELS`` holds students, teachers, mask generators, objectives and distillers; ``DATASETS``, ``DATA_SAMPLERS``, ``HOOKS``,
``METRICS`` and ``RUNNERS`` what their names say.
"""

from mmengine import registry as _roots
from mmengine.registry import Registry

_MODEL_LOCATIONS = ["hgkd.masking", "hgkd.students", "hgkd.teachers", "hgkd.objectives", "hgkd.distillers"]

MODELS = Registry("model", parent=_roots.MODELS, scope="hgkd", locations=_MODEL_LOCATIONS)
DATASETS = Registry("dataset", parent=_roots.DATASETS, scope="hgkd", locations=["hgkd.data"])
DATA_SAMPLERS = Registry("data sampler", parent=_roots.DATA_SAMPLERS, scope="hgkd", locations=["hgkd.data"])
HOOKS = Registry("hook", parent=_roots.HOOKS, scope="hgkd", locations=["hgkd.training"])
METRICS = Registry("metric", parent=_roots.METRICS, scope="hgkd", locations=["hgkd.evaluation"])
RUNNERS = Registry("runner", parent=_roots.RUNNERS, scope="hgkd", locations=["hgkd.training"])
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    "optim wrapper constructor",
    parent=_roots.OPTIM_WRAPPER_CONSTRUCTORS,
    scope="hgkd",
    locations=["hgkd.training"],
)
