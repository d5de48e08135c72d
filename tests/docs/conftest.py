"""For the tests of pages."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder with a short name: tables break their lines by the length of the paths in them, and a reader's path is short."""
    with tempfile.TemporaryDirectory(prefix="page") as folder:
        yield Path(folder).resolve()
