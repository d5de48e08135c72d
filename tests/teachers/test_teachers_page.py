"""docs/reference/teachers.md: its table has every name and what each can be asked for today, and the script that fills it."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from tools import teachers_table  # noqa: E402

PAGE = (ROOT / "docs/reference/teachers.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| ([^|]+?) \| `([^`]+)`(?:, `level=(-?\d+)`)? \| \d+ x \d+ \| (\S+) \| (.+) \|$", re.MULTILINE)


def test_the_table_has_every_name_and_its_capabilities() -> None:
    table = PAGE[PAGE.index(teachers_table.BEGIN) : PAGE.index(teachers_table.END)]
    rows = ROW.findall(table)
    assert len(rows) == table.count("\n| ") - 1 >= 40  # all rows but the head
    members = teachers_table.MEMBERS
    assert [(family, name, level) for family, name, level, _, _ in rows] == [
        (member.family, member.name, "" if member.level is None else str(member.level)) for member in members
    ]
    assert all(float(error) < 1e-5 for _, _, _, error, _ in rows)
    for member, (_, _, _, _, cells) in zip(members, rows, strict=True):
        assert teachers_table.facts(member) == cells, member.name


def test_a_row() -> None:
    member = teachers_table.Member("ROPE", "vit_small_patch16_rope_mixed_224", kwargs={"img_size": 32, "depth": 1})
    expected = "| ROPE | `vit_small_patch16_rope_mixed_224` | 2 x 2 | 0 | first 1 x 384 | 16 px | yes | yes | 0 | yes |"
    assert teachers_table.row(member) == expected
