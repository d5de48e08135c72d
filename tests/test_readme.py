"""The Python examples of the README run as they stand."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["dense"].shape == (2, 512, 4, 4)
    assert type(names["same"]) is torch.Tensor
    hidden = ~names["visible"][:, None].expand_as(names["dense"])
    assert not names["dense"][hidden].any()
    assert type(names["again_features"]) is type(names["features"])
