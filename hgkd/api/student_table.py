"""Tables of measured students: written by one machine, read by others, as JSON or CSV.

A row stands for itself: it says the machine, the runtime, threads and image size that it was measured with. So one file may
hold rows of several runs, and a run that was stopped goes on from its file.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from hgkd.errors import DataError, InvalidValueError, MissingFileError
from hgkd.sparse.hardware import cpu_model
from hgkd.writing import write_text, writing

FORMATS = (".json", ".csv")
_FORMAT = 1  # of the JSON file


@dataclass(frozen=True)
class StudentRow:
    """One network on one machine.

    Attributes:
        student: its name.
        machine: the processor, see :func:`this_machine`.
        runtime, threads, size: the export target whose runtime ran it, CPU threads, side of its square images in pixels.
        latency_ms: median time of one image; None: it failed.
        file_mb: size of the exported weights and graph.
        parameters: of the encoder, as it is exported.
        macs: multiplications of one image; None: not counted.
        speedup: ordinary dense training step over the sparse one, with a quarter of the cells visible; None: not measured.
        speedup_of: the machine of ``speedup``.
        version: the runtime's.
        failed: why it cannot be such a student, ends with the error's code; empty when it can.
    """

    student: str
    machine: str
    runtime: str
    threads: int
    size: int
    latency_ms: float | None = None
    file_mb: float | None = None
    parameters: int | None = None
    macs: int | None = None
    speedup: float | None = None
    speedup_of: str = ""
    version: str = ""
    failed: str = ""

    @property
    def key(self) -> tuple[str, str, str, int, int]:
        """Machine, student, runtime, threads and size, which name a measurement."""
        return self.machine, self.student, self.runtime, self.threads, self.size


_TYPES: dict[str, type] = {
    **dict.fromkeys(("threads", "size", "parameters", "macs"), int),
    **dict.fromkeys(("latency_ms", "file_mb", "speedup"), float),
}
_NAMES = tuple(field.name for field in fields(StudentRow))
_NEEDED = ("student", "machine", "runtime", "threads", "size")


def this_machine() -> str:
    """The board or processor and its number of cores, as tables name a machine."""
    board = ""
    with suppress(OSError):
        board = Path("/proc/device-tree/model").read_text(encoding="utf-8", errors="replace").replace("\0", "").strip()
    return f"{board or cpu_model()}, {os.cpu_count()} cores"


def check_table_name(path: str | os.PathLike[str]) -> Path:
    """Raise ValueError unless a path has the ending of a table."""
    path = Path(path).expanduser()
    if path.suffix.lower() not in FORMATS:
        raise InvalidValueError("table-format-unknown", f"{path} must end in {' or '.join(FORMATS)}")
    return path


def read_table(path: str | os.PathLike[str]) -> list[StudentRow]:
    """The rows of a file that :func:`write_table` wrote, here or on another machine.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another ending than .json or .csv.
        DataError: it holds no such table.
    """
    path = check_table_name(path)
    if not path.is_file():
        raise MissingFileError("student-table-missing", f"table {path} does not exist; hgkd doctor students --out writes one")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)["rows"] if path.suffix.lower() == ".json" else list(csv.DictReader(io.StringIO(text)))
        return [_row(values) for values in content]
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise DataError(
            "student-table-damaged",
            f"{path} is no table of hgkd doctor students ({type(error).__name__}: {error}); measure anew with --out",
        ) from error


def write_table(rows: Iterable[StudentRow], path: str | os.PathLike[str]) -> None:
    """Write rows as JSON or CSV, whole or not at all.

    Raises:
        ValueError: another ending.
        WriteError: the disk does not take it.
    """
    path = check_table_name(path)
    content = [asdict(row) for row in rows]
    if path.suffix.lower() == ".json":
        text = json.dumps({"format": _FORMAT, "rows": content}, indent=1) + "\n"
    else:
        stream = io.StringIO()
        writer = csv.DictWriter(stream, _NAMES, lineterminator="\n")
        writer.writeheader()
        writer.writerows(content)
        text = stream.getvalue()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)


def with_known_speedups(rows: Sequence[StudentRow], known: Iterable[StudentRow]) -> list[StudentRow]:
    """Rows whose speed-up was not measured with the one of another machine, which is named."""
    found = {row.student: row for row in known if row.speedup is not None}
    return [
        replace(row, speedup=other.speedup, speedup_of=other.speedup_of or other.machine)
        if row.speedup is None and not row.failed and (other := found.get(row.student)) is not None
        else row
        for row in rows
    ]


def _row(values: Mapping[str, Any]) -> StudentRow:
    typed = {name: _typed(name, values[name]) for name in _NAMES if name in _NEEDED or values.get(name) is not None}
    return StudentRow(**{name: value for name, value in typed.items() if value is not None})


def _typed(name: str, value: Any) -> Any:
    kind = _TYPES.get(name, str)
    return None if value == "" and kind is not str and name not in _NEEDED else kind(value)
