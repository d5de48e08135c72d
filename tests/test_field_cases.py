"""docs/background/field_cases.md: every case has its columns, and the test files that it names exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROWS = [
    line for line in (ROOT / "docs/background/field_cases.md").read_text(encoding="utf-8").splitlines() if line.startswith("| ")
]


def test_every_row_has_five_columns() -> None:
    assert len(ROWS) > 200
    assert {len(re.split(r"(?<!\\)\|", row)) for row in ROWS} == {7}


def test_the_files_that_are_named_exist() -> None:
    named = {name for row in ROWS for name in re.findall(r"[\w/]*\btest_\w+\.py", row)}
    assert len(named) > 40
    assert [name for name in sorted(named) if not (ROOT / "tests" / name).is_file()] == []


def test_the_searched_reports_have_links() -> None:
    links = {link for row in ROWS for link in re.findall(r"\((https://github\.com/[^)]+)\)", row)}
    assert len(links) >= 30
