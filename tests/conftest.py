"""Shared test set-up: two threads, fixed seeds, no network."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
