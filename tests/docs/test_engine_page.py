"""docs/background/engine.md: its code runs, and prints what the page says."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/background/engine.md"


def test_the_code_prints_what_its_comments_say(capsys) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    comments = re.findall(r"^print\(.*\)  # (.*)$", "".join(blocks), re.MULTILINE)
    assert len(printed) == len(comments) > 0
    for found, comment in zip(printed, comments, strict=True):
        assert comment.rpartition(": ")[2] == found, comment
    assert names["dense"].shape == (1, 3, 128, 128)
