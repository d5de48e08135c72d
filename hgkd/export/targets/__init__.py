"""The table of targets, a module a family. An option that only one target has also needs a line in hgkd/cli/export.py."""

from hgkd.export.job import Target
from hgkd.export.targets import graphs, openmmlab, sparse, timm, torchvision, transformers

_FAMILIES = (timm, torchvision, openmmlab, transformers, graphs, sparse)
TARGETS: dict[str, Target] = {target.name: target for family in _FAMILIES for target in family.TARGETS}
