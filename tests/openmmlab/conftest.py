"""mmcv's Python layers over the operators of hgkd; every test that asks for them is skipped where mmcv is not installed."""

import importlib
import types

import pytest

from hgkd.openmmlab import register_ops


@pytest.fixture(scope="session")
def ops() -> types.ModuleType:
    """``mmcv.ops``."""
    pytest.importorskip("mmcv")
    if register_ops() == "compiled":
        pytest.skip("mmcv is installed with compiled operators")
    return importlib.import_module("mmcv.ops")
