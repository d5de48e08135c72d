"""The OneDL forks: OpenMMLab's import names under other distribution names (onedl-mmsegmentation installs ``mmseg``).

mmengine looks for the files behind ``_base_ = 'mmseg::...'`` by distribution name, which a table says is ``mmsegmentation``,
and so refuses them on the fork (onedl-mmengine 0.10.12); mmdet's two names are the same, and the fork is found by them.
"""

from importlib.metadata import PackageNotFoundError, distribution


def find_fork_configs() -> None:
    """Let mmengine find the configs of an installed onedl-mmsegmentation; without it nothing is imported or changed."""
    try:
        distribution("onedl-mmsegmentation")
    except PackageNotFoundError:
        return
    from mmengine.config.utils import MODULE2PACKAGE

    MODULE2PACKAGE["mmseg"] = "mmseg"
