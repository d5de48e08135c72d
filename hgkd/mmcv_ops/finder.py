"""Finding ``mmcv._ext``: the compiled module if one is installed, otherwise the table of this package.

The finder stands at the end of ``sys.meta_path``, so Python asks it only after everything else failed to find the module: a
compiled mmcv is preferred without any decision here, and the module is made when mmcv first asks for it, with an ordinary
``__spec__`` (mmengine looks for it by ``pkgutil.find_loader``, mmcv by ``importlib.import_module``).
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from hgkd.errors import MissingPackageError

_NAME = "mmcv._ext"
# what current torch says about lines of mmdet and mmseg, once a line and again in every epoch; a user can do nothing about it
_DEPRECATED = (
    (FutureWarning, r"`torch\.cuda\.amp\.\w+\(args\.\.\.\)` is deprecated", r"mm(det|seg)\."),
    (UserWarning, r"torch\.meshgrid: in an upcoming release", r"torch\.functional"),
)


class _TorchvisionLoader(Loader):
    """Fills ``mmcv._ext`` from the table and says so in the log, once a process."""

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        from mmengine.logging import print_log

        from hgkd.mmcv_ops.table import FUNCTIONS, refused

        def missing(name: str) -> Callable[..., Any]:
            if name.startswith("__"):
                raise AttributeError(name)
            return refused(name)

        vars(module).update(FUNCTIONS, __getattr__=missing)
        print_log(ops_notice(), "current")


class _LastResort(MetaPathFinder):
    """Answers for ``mmcv._ext`` alone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, _TorchvisionLoader(), origin="hgkd.mmcv_ops") if fullname == _NAME else None


_FINDER = _LastResort()


def ops_notice() -> str:
    """A line for the log: which operators mmcv works with."""
    if register_ops() == "compiled":
        return f"{_NAME}: mmcv's own compiled operators"
    import torchvision

    from hgkd.mmcv_ops.table import FUNCTIONS

    return (
        f"{_NAME}: no compiled module installed, using hgkd.mmcv_ops ({len(FUNCTIONS)} functions over torchvision "
        f"{torchvision.__version__}); any other raises NotImplementedError when called"
    )


def register_ops() -> str:
    """Make ``import mmdet`` and ``import mmseg`` work with or without compiled operators; call it before importing them.

    Calling it again changes nothing. It imports neither mmcv nor torch: that happens when mmcv asks for its operators, which is
    also when one log line says that the replacement is in use. A process started afresh (spawn) has to call it again. From then
    on torch's warnings about deprecated lines of mmdet and mmseg are silent.

    Returns:
        'compiled' when mmcv has a ``_ext`` of its own (which then stays in use), otherwise 'torchvision'.

    Raises:
        ModuleNotFoundError: mmcv is not installed.
    """
    for category, message, module in _DEPRECATED:
        warnings.filterwarnings("ignore", message, category, module)
    loaded = sys.modules.get(_NAME)
    if loaded is not None:
        ours = isinstance(getattr(loaded.__spec__, "loader", None), _TorchvisionLoader)
        return "torchvision" if ours else "compiled"
    package = importlib.util.find_spec("mmcv")
    if package is None:
        raise MissingPackageError(
            "mmcv-missing", "mmcv is not installed; pip install 'hgkd[downstream]' brings mmcv-lite, mmdet and mmseg"
        )
    if PathFinder.find_spec(_NAME, package.submodule_search_locations) is not None:
        return "compiled"
    if _FINDER not in sys.meta_path:
        sys.meta_path.append(_FINDER)
    return "torchvision"
