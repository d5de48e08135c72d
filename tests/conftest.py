"""Shared test set-up: a fixed seed before every test, mmengine's scope put back after it."""

import importlib
import os
import types
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch
from mmengine.registry import DefaultScope

from hgkd.mmcv_ops import register_ops

# kernels by rule, in the processes that tests start as well: what is measured differs from machine to machine
os.environ.setdefault("HGKD_KERNELS", "rule")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _scope() -> Iterator[None]:
    """A run of mmdet's or mmseg's leaves their scope behind, in which later tests would look for hgkd's parts."""
    before = dict(DefaultScope._instance_dict)
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(before)


@pytest.fixture(scope="session")
def ops() -> types.ModuleType:
    """``mmcv.ops`` over the operators of hgkd; a test that asks for it is skipped where mmcv is absent or compiled."""
    pytest.importorskip("mmcv")
    if register_ops() == "compiled":
        pytest.skip("mmcv is installed with compiled operators")
    return importlib.import_module("mmcv.ops")


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Lets reports name files that are not UTF-8: the processes of pytest-xdist exchange UTF-8 alone."""
    return _printable((yield))


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {key: _printable(item) for key, item in value.items()}
    return type(value)(map(_printable, value)) if isinstance(value, (list, tuple)) else value
