"""Which small CNN: networks are measured in a runtime on this machine, and those that hgkd can train sparse are told.

Each candidate is built as a training builds its student (:class:`hgkd.students.SparseUNet`, whose dry run masks an image), is
exported by the runtime's own target, compared with torch, and timed. A process of its own each: one that crashes costs its row.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.utils import reparameterize_model
from torch.utils.flop_counter import FlopCounterMode

from hgkd.api.benchmark import in_own_process, measure_times, sparse_speedup
from hgkd.api.student_table import StudentRow, check_table_name, read_table, this_machine, with_known_speedups, write_table
from hgkd.differences import largest_difference
from hgkd.errors import InvalidValueError, Refusal, check_counts, first_line, unknown_name_message
from hgkd.export import TARGETS, EncoderSpec, ExportError, Job, MissingLibraryError, Source
from hgkd.export.exporter import TOLERANCE
from hgkd.export.job import need, use_at
from hgkd.networks.encoder import build_encoder
from hgkd.networks.libraries import library_of
from hgkd.students import SparseUNet

DEFAULT_NAMES = (
    *("mobilenetv4_conv_[sml]*", "mobilenetv3_*[05]", "mobilenetv2_*[05]", "mobileone_s[0-2]", "repvit_m?_?", "fastvit_t*"),
    *("starnet_s[1-4]", "efficientnet_lite?", "efficientnet_b[0-3]", "hgnetv2_b[0-3]", "regnety_00?", "resnet[135][048]"),
    *("convnext_*o", "lcnet_*"),
)
"""Families by timm's names; the largest within the budget of each is measured first."""
YARDSTICK = "resnet18"
"""Measured first: its plain 3x3 convolutions reach about as many multiplications a second as a CPU gives."""
_SLACK = 1.5  # a network is passed over when at the yardstick's rate it would take so many times the budget
_WARM_UP = 3


@dataclass(frozen=True)
class Choice:
    """Result of :func:`choose_students`; rows by falling latency.

    Attributes:
        fits: students within the budget.
        slow: students beyond it.
        failed: networks that cannot be such students, each with its reason.
        passed_over: names that were not measured, and why.
        notes: what a user should know.
    """

    fits: list[StudentRow]
    slow: list[StudentRow]
    failed: list[StudentRow]
    passed_over: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def choose_students(
    budget_ms: float,
    runtime: str = "openvino",
    *,
    threads: int = 1,
    size: int = 224,
    names: Sequence[str] = DEFAULT_NAMES,
    limit: int | None = 16,
    repeats: int = 30,
    speedup: bool = True,
    tables: Sequence[str | Path] = (),
    measure: bool = True,
    out: str | Path | None = None,
    machine: str | None = None,
    told: Callable[[str], None] = lambda line: None,
) -> Choice:
    """Measure networks in a runtime on this machine and list those that are fast enough and can be trained sparse.

    Args:
        budget_ms: largest median time of one image.
        runtime: export target whose runtime is asked, e.g. 'openvino', 'onnx', 'ncnn'.
        threads: CPU threads of one image.
        size: side of the square images in pixels.
        names: timm's names or patterns of them (``mobilenetv4_conv_*``), or names of other libraries.
        limit: measure so many at most; None: all.
        repeats: images that the median is of.
        speedup: measure the step of the sparse encoder against the dense one, which takes most of the time; False: it is
            taken from ``tables`` where they have it.
        tables: files of other machines, whose rows of this runtime, threads and size are listed, too.
        measure: False: list ``tables`` alone.
        out: .json or .csv file. It is written after every network, and a later call measures what it lacks.
        machine: name of this machine in the table; None: its processor's.
        told: is given a line a network as the work goes on.

    Raises:
        ValueError: an unknown runtime, a pattern without a network, a number out of range.
        MissingLibraryError: the runtime is not installed.
        FileNotFoundError, DataError: a table is absent or damaged.
    """
    _check(
        budget_ms, runtime, measure, threads=threads, size=size, repeats=repeats, **({} if limit is None else {"limit": limit})
    )
    others = [row for table in tables for row in read_table(table)]
    machine = machine or this_machine()
    known = read_table(out) if out is not None and check_table_name(out).exists() else []
    rows = {row.key: row for row in known}
    chosen: dict[str, int | None] = {}
    passed_over: dict[str, str] = {}
    if measure:

        def add(name: str, macs: int | None) -> StudentRow:
            asked = StudentRow(name, machine, runtime, threads, size, macs=macs)
            before = rows.get(asked.key)
            row = _measured(asked, repeats) if before is None else before
            if speedup and row.speedup is None and not row.failed:
                row = _with_speedup(row)
            if row != before:
                rows[asked.key] = row
                told(_line(row))
                if out is not None:
                    write_table(rows.values(), out)
            return row

        families = candidates(names)
        counted = {name: count_macs(name, size) for name in {YARDSTICK, *(n for family in families for n in family)}}
        yardstick = add(YARDSTICK, counted[YARDSTICK])
        passed_over = _too_large(counted, yardstick, budget_ms)
        order = _in_turn([[name for name in family if name not in passed_over] for family in families], counted)
        chosen = {name: counted[name] for name in order[:limit]}
        passed_over |= dict.fromkeys(order[limit:] if limit is not None else (), f"limit of {limit} networks")
        for name, macs in chosen.items():
            add(name, macs)
    asked = (runtime, threads, size)
    own = [row for row in rows.values() if (row.runtime, row.threads, row.size) == asked]
    mine = own if not measure else [row for row in own if row.student in chosen or row.machine != machine]
    foreign = [row for row in others if (row.runtime, row.threads, row.size) == asked and row.key not in rows]
    listed = with_known_speedups([*mine, *foreign], [*others, *own])
    return _sorted_out(listed, budget_ms, passed_over, _notes(others, foreign, tables, asked))


def candidates(names: Sequence[str]) -> list[list[str]]:
    """The networks of each pattern, none twice.

    Raises:
        ValueError: a name or pattern that nothing has.
    """
    known = timm.list_models()
    taken: set[str] = set()
    families = []
    for name in names:
        found = [name] if library_of(name) is not None else [n for n in known if fnmatchcase(n, name.partition(".")[0])]
        if not found:
            raise InvalidValueError("student-unknown", unknown_name_message("student", name, known))
        families.append([member for member in found if member not in taken])
        taken |= set(found)
    return families


def count_macs(name: str, size: int) -> int | None:
    """Multiplications of an encoder's forward with one image, fused for inference; None where that takes a real run.

    No weights are made: the network is built on the meta device.
    """
    try:
        with torch.device("meta"), torch.no_grad():
            foreign = library_of(name) is not None
            network = build_encoder(name) if foreign else timm.create_model(name, num_classes=0, global_pool="")
            network = reparameterize_model(network.eval())
            with FlopCounterMode(display=False) as counter:
                cast(Any, network).forward_features(torch.zeros(1, 3, size, size))
        return counter.get_total_flops() // 2
    except Exception:  # what cannot be a student, or not on this device; the measurement says which and why
        return None


def measure_latency(asked: StudentRow, repeats: int) -> StudentRow:
    """``asked`` with everything but the speed-up; run in a process of its own.

    Raises:
        MissingLibraryError: the runtime is not installed.
    """
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    try:
        student = SparseUNet(asked.student)
        student.prepare(asked.size)
        measured = _run(asked, repeats)
    except MissingLibraryError:
        raise
    except Exception as error:  # of torch's exporters any
        return replace(asked, failed=_reason(error))
    return replace(asked, **measured)


def measure_speedup(name: str, size: int, threads: int) -> float:
    """:func:`hgkd.api.benchmark.sparse_speedup` of a student as a training has it; run in a process of its own."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    cell = SparseUNet(name).cell
    return sparse_speedup(build_encoder(name), size, cell)


@torch.no_grad()
def _run(asked: StudentRow, repeats: int) -> dict[str, Any]:
    """Export, compare, time."""
    target = TARGETS[asked.runtime]
    network = build_encoder(asked.student).eval()
    use_at(network, (asked.size, asked.size))
    image = torch.rand(1, 3, asked.size, asked.size)
    with tempfile.TemporaryDirectory(prefix="hgkd-student-") as name:
        folder = Path(name)
        job = Job(Source(folder, EncoderSpec(asked.student), network), folder, folder, "backbone")
        written = target.write(job, output="pooled")
        if target.runner is None or not written.table:
            raise ExportError("runtime-not-timed", f"target {asked.runtime} has no file that can be timed")
        row = written.table[0]
        run = target.runner(folder / row["file"], threads=asked.threads)
        expected = (written.expected or job.features)(image)
        difference = largest_difference(run(image), expected)
        tolerance = TOLERANCE if written.tolerance is None else written.tolerance
        if not difference <= tolerance:
            raise ExportError("export-outputs-differ", f"{asked.runtime} differs from torch by {difference:.1e}")
        steps = {"image": lambda: cast(None, run(image))}
        times, _ = measure_times(steps, repeats=repeats + _WARM_UP)
    return {
        "latency_ms": 1e3 * statistics.median(times["image"][_WARM_UP:]),
        "file_mb": row["bytes"] / 1e6,
        "parameters": written.parameters,
        "version": written.proven_with,
    }


def _measured(asked: StudentRow, repeats: int) -> StudentRow:
    row = in_own_process(measure_latency, asked, repeats)
    return replace(asked, failed="the process that measured it crashed") if row is None else row


def _with_speedup(row: StudentRow) -> StudentRow:
    """Apart from the latency: an ordinary dense step may crash."""
    found = in_own_process(measure_speedup, row.student, row.size, row.threads)
    return row if found is None else replace(row, speedup=found, speedup_of=row.machine)


def _reason(error: Exception) -> str:
    code = error.code if isinstance(error, Refusal) else None
    first = first_line(error)[:300]
    return f"{first} [{code}]" if code else f"{type(error).__name__}: {first}"


def _too_large(counted: dict[str, int | None], yardstick: StudentRow, budget_ms: float) -> dict[str, str]:
    """Names whose multiplications alone exceed the budget, at the rate of the yardstick."""
    if not yardstick.latency_ms or not yardstick.macs:
        return {}
    rate = yardstick.macs / yardstick.latency_ms
    return {
        name: f"{macs / 1e6:.0f} million multiplications, about {macs / rate:.0f} ms at the rate of {YARDSTICK}"
        for name, macs in counted.items()
        if macs is not None and macs > _SLACK * budget_ms * rate
    }


def _in_turn(families: Iterable[list[str]], counted: dict[str, int | None]) -> list[str]:
    """The largest of each family, then the next largest of each, and so on."""
    ordered = [sorted(family, key=lambda name: -(counted[name] or 0)) for family in families]
    turns = range(max(map(len, ordered), default=0))
    return [family[turn] for turn in turns for family in ordered if turn < len(family)]


def _check(budget_ms: float, runtime: str, measure: bool, **counts: int) -> None:
    timed = [name for name, target in TARGETS.items() if target.runner is not None]
    if runtime not in timed:
        raise InvalidValueError("runtime-unknown", unknown_name_message("runtime", runtime, timed))
    if not budget_ms > 0:
        raise InvalidValueError("budget-not-positive", f"budget_ms must be above 0 milliseconds, got {budget_ms}")
    check_counts(**counts)
    if measure and TARGETS[runtime].runtime:
        need(runtime, TARGETS[runtime].runtime)


def _line(row: StudentRow) -> str:
    if row.failed:
        return f"{row.student}: {row.failed}"
    speedup = "" if row.speedup is None else f", trains {row.speedup:.2f}x as fast sparse as dense"
    return f"{row.student}: {row.latency_ms:.1f} ms, {row.file_mb:.1f} MB{speedup}"


def _notes(
    others: Sequence[StudentRow], foreign: Sequence[StudentRow], tables: Sequence[str | Path], asked: tuple[str, int, int]
) -> list[str]:
    if not tables or foreign:
        return []
    settings = sorted({f"{row.runtime}, {row.threads} thread(s), {row.size} px" for row in others})
    what = f"{asked[0]}, {asked[1]} thread(s), {asked[2]} px"
    return [f"the tables have no row of {what}; they hold {'; '.join(settings) or 'none'}"]


def _sorted_out(rows: Sequence[StudentRow], budget_ms: float, passed_over: dict[str, str], notes: list[str]) -> Choice:
    ran = sorted((row for row in rows if row.latency_ms is not None), key=lambda row: -cast(float, row.latency_ms))
    return Choice(
        fits=[row for row in ran if cast(float, row.latency_ms) <= budget_ms],
        slow=[row for row in ran if cast(float, row.latency_ms) > budget_ms],
        failed=[row for row in rows if row.failed],
        passed_over=passed_over,
        notes=notes,
    )
