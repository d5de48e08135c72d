"""docs/background/reliability.md: every fault of the table names a test that exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/background/reliability.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if re.match(r"\| \d+ \|", line)]


def files_of_letters() -> dict[str, Path]:
    """`R` = `tests/training/test_resume.py`, ...: a name without folder lies in tests/training."""
    key = PAGE.partition("## Faults")[2].partition("| # |")[0]
    named = dict(re.findall(r"`([A-Z])` = `([\w/]+\.py)`", key))
    return {letter: ROOT / name if "/" in name else ROOT / "tests/training" / name for letter, name in named.items()}


def test_every_fault_has_a_number_an_outcome_and_a_test_that_exists() -> None:
    files = files_of_letters()
    assert [int(row[0]) for row in ROWS] == list(range(1, len(ROWS) + 1))
    assert len(ROWS) >= 40
    for number, fault, outcome, named in ROWS:
        assert all((fault, outcome)), number
        tests = re.findall(r"`(tests/[\w/]+\.py)`", named)
        assert all((ROOT / path).is_file() for path in tests), (number, named)
        for letter, part in re.findall(r"\b([A-Z]) (\w+)", named):
            names = re.findall(r"^def (test_\w+)", files[letter].read_text(encoding="utf-8"), re.MULTILINE)
            assert [name for name in names if part in name], (number, letter, part)
            tests.append(part)
        assert tests, number
