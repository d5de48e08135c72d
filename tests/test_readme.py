"""The Python examples of the README run as they stand."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def test_examples_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["dense"].shape == (2, 512, 4, 4)
    assert type(names["same"]) is torch.Tensor
    hidden = ~names["visible"][:, None].expand_as(names["dense"])
    assert not names["dense"][hidden].any()
