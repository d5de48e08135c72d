"""Shared test set-up: a fixed seed before every test, mmengine's scope put back after it."""

from collections.abc import Iterator

import pytest
import torch
from mmengine.registry import DefaultScope


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
