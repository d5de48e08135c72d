"""docs/reference/students.md: its code runs, its table has every family, and the script that fills it."""

import re
import sys
from pathlib import Path

from hgkd.networks.members import LIBRARY_FAMILIES, LIBRARY_REFUSED
from hgkd.sparse.families import FAMILIES, REFUSED

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from tools import students_table  # noqa: E402

PAGE = (ROOT / "docs/reference/students.md").read_text()


def test_the_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "docs/reference/students.md", "exec"), {})


def test_the_table_has_every_family() -> None:
    table = PAGE[PAGE.index(students_table.BEGIN) : PAGE.index(students_table.END)]
    rows = re.findall(r"^\| (.+?) \| `(.+?)` \| (\S+) \| (\S+x|dense crashes) \|$", table, re.MULTILINE)
    assert [(name, member) for name, member, _, _ in rows] == [(f.name, f.member) for f in (*FAMILIES, *LIBRARY_FAMILIES)]
    assert all(float(error) < 1e-9 for _, _, error, _ in rows)
    assert students_table.refused_table() in table
    assert students_table.refused_table().count("\n") == 2 + len(REFUSED) + len(LIBRARY_REFUSED)


def test_a_row(monkeypatch, capsys) -> None:
    monkeypatch.setattr(students_table, "speedup", lambda family, repeats: 1.234)
    monkeypatch.setattr(students_table, "in_own_process", lambda function, *args: function(*args))
    family = next(f for f in FAMILIES if f.member == "mobilenetv3_small_050")
    table = students_table.families_table([family], 1)
    assert re.search(r"^\| MobileNet v3 \| `mobilenetv3_small_050` \| \de-1\d \| 1.23x \|$", table, re.MULTILINE)
