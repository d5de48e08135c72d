"""The table of targets: a module a family, and what users register."""

from hgkd.export.job import Target
from hgkd.export.targets import graphs, openmmlab, sparse, timm, torchvision, transformers

_FAMILIES = (timm, torchvision, openmmlab, transformers, graphs, sparse)
TARGETS: dict[str, Target] = {target.name: target for family in _FAMILIES for target in family.TARGETS}


def register_target(target: Target) -> Target:
    """Add a target of your own, from a module outside this package.

    Raises:
        ValueError: there is one of that name.
    """
    if target.name in TARGETS:
        raise ValueError(f"there is an export target {target.name!r} already; give yours another name")
    TARGETS[target.name] = target
    return target
