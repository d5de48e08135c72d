"""The table of targets, a module a family. An option that only one target has also needs a line in hgkd/cli/export.py."""

from hgkd.errors import InvalidValueError
from hgkd.export.job import Target
from hgkd.export.targets import (
    coreml,
    edge,
    executorch,
    graphs,
    litert,
    openmmlab,
    own,
    sparse,
    timm,
    torchvision,
    transformers,
)

_FAMILIES = (timm, torchvision, openmmlab, transformers, graphs, edge, executorch, litert, coreml, sparse, own)
#: Name -> target, of all libraries and runtimes that a student can be exported for; :func:`register_target` adds one.
TARGETS: dict[str, Target] = {target.name: target for family in _FAMILIES for target in family.TARGETS}


def register_target(target: Target) -> Target:
    """Add a target of your own, from a module outside this package.

    Raises:
        ValueError: there is one of that name.
    """
    if target.name in TARGETS:
        raise InvalidValueError(
            "target-name-taken", f"there is an export target {target.name!r} already; give yours another name"
        )
    TARGETS[target.name] = target
    return target
