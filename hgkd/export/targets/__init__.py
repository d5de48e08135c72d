"""The table of targets: a module a family, nothing else to edit for a further one."""

from hgkd.export.job import Target
from hgkd.export.targets import graphs, openmmlab, sparse, timm, torchvision, transformers

_FAMILIES = (timm, torchvision, openmmlab, transformers, graphs, sparse)
TARGETS: dict[str, Target] = {target.name: target for family in _FAMILIES for target in family.TARGETS}
