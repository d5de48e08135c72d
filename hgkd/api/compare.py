"""Train and evaluate the rows and seeds of a plan, and tabulate them."""

from __future__ import annotations

import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from mmengine.config import Config

from hgkd.api.evaluate import check_finetune_options, check_methods, evaluate
from hgkd.config.kinds import words_of
from hgkd.config.options import option_text
from hgkd.errors import InvalidValueError, MissingFileError, StoppedError, unknown_name_message
from hgkd.evaluation.comparison import trained, value_of, write_csv
from hgkd.pictures.comparison import write_picture
from hgkd.recipes import find_recipe
from hgkd.training.loop import STOPPED
from hgkd.training.work_folder import results_in
from hgkd.weights.run_folder import logged_lines

ROW_KEYS = {"name", "config", "options", "seeds", "backbone", "checkpoint", "block", "after", "evaluate", "scores"}
PLAN_KEYS = {"rows", "options", "evaluate", "scores"}
STARTED = "started_with.json"  # in the folder of a run: config and options of its training
_RESULT = "result.json"  # in the folder of a run that is complete
_EVALUATE_NEEDS = ("methods", "train", "test")
# what the values of a plan's evaluate become; the last three are the command's alone
_EVALUATE_TYPES = {**get_type_hints(evaluate), "k": Sequence[int], "config": str, "csv": str}
_EVALUATE_KEYS = _EVALUATE_TYPES.keys() - {"return"}


@dataclass(frozen=True)
class Job:
    """One run: a row of the plan with one seed.

    Attributes:
        row: the row's name.
        folder: of the run, in the work directory.
        config: of the training; None: nothing is trained.
        options: config options.
        evaluate: arguments of ``evaluate``; empty: the run measures itself.
        scores: name -> key of the validations' log, or (key, factor).
        after: folders of the runs that must have ended before, of those that are done here.
    """

    row: str
    seed: int
    folder: Path
    config: str | None
    options: Mapping[str, Any]
    evaluate: Mapping[str, Any]
    scores: Mapping[str, str | Sequence[Any]]
    after: tuple[Path, ...] = ()

    @property
    def train_command(self) -> list[str]:
        """The command line that does a job, without the interpreter."""
        pairs = [f"{key}={option_text(key, value)}" for key, value in self.options.items()]
        return ["train", str(self.config), "--work-dir", str(self.folder), "--cfg-options", *pairs]


def read_plan(file: str | Path, values: Mapping[str, str]) -> dict[str, Any]:
    """A checked plan with ``values`` filled in.

    Raises:
        FileNotFoundError: no such file, or no such config of a row.
        ValueError: an unknown key, rows without or with equal names, a row that is neither trained nor a backbone, not exactly
            one of ``evaluate`` and ``scores`` for a row, an ``evaluate`` that ``hgkd evaluate`` would refuse, a row ``after``
            one that does not stand above it, or a ``{name}`` without a value.
    """
    file = find_recipe(file)
    content = Config.fromfile(str(file)).to_dict()
    plan: dict[str, Any] = _fill(
        {key: value for key, value in content.items() if not key.startswith("_")},
        {**values, "seed": "{seed}", "here": "{here}"},
    )
    unknown = sorted(set(plan) - PLAN_KEYS)
    if unknown:
        raise InvalidValueError(
            "plan-key-unknown", f"{file}: unknown key {unknown[0]!r}; a plan has {', '.join(sorted(PLAN_KEYS))}"
        )
    names = [row.get("name") for row in plan.get("rows", [])]
    if not names or None in names or len(set(names)) < len(names):
        raise InvalidValueError("plan-row-names", f"{file}: rows need a name each, all different, got {names}")
    for place, row in enumerate(plan["rows"]):
        _check_row(file, row, plan, names[:place])
    return plan


def _check_row(file: Path, row: dict[str, Any], plan: Mapping[str, Any], above: Sequence[str]) -> None:
    """Check a row and complete it: the file of its recipe, ``evaluate`` or ``scores`` from the plan, ``after`` as a list.

    Raises:
        ValueError, FileNotFoundError: see :func:`read_plan`.
    """
    if set(row) - ROW_KEYS:
        raise InvalidValueError(
            "plan-row-key-unknown", f"{file}: row {row['name']!r} has the unknown key {sorted(set(row) - ROW_KEYS)[0]!r}"
        )
    if ("config" in row) == ("backbone" in row):
        raise InvalidValueError(
            "plan-row-kind-unclear", f"{file}: row {row['name']!r} needs either config (to train) or backbone (to evaluate)"
        )
    own = row if "evaluate" in row or "scores" in row else plan
    if ("evaluate" in own) == ("scores" in own):
        raise InvalidValueError(
            "plan-kind-unclear",
            f"{file}: row {row['name']!r} needs either evaluate (features are evaluated) or scores (the run measures itself), "
            "its own or the plan's",
        )
    row.update({key: own[key] for key in ("evaluate", "scores") if key in own})
    if "evaluate" in row:
        _check_evaluate(f"{file}: row {row['name']!r}", row["evaluate"])
    if "scores" in row and "config" not in row:
        raise InvalidValueError(
            "plan-row-without-config",
            f"{file}: row {row['name']!r} has no config, but with scores every row is a run that measures itself",
        )
    after = row.get("after", [])
    row["after"] = [after] if isinstance(after, str) else list(after)
    for name in row["after"]:
        if name not in above:
            raise InvalidValueError(
                "plan-row-order", f"{file}: row {row['name']!r} comes after {name!r}, which must be a row that stands above it"
            )
    if "config" in row:
        try:
            row["config"] = str(find_recipe(row["config"]))
        except FileNotFoundError as error:
            raise MissingFileError("plan-row-file-missing", f"{file}: row {row['name']!r}: {error}") from error


def _check_evaluate(where: str, arguments: Mapping[str, Any]) -> None:
    """Refuse, before hours of training, what ``hgkd evaluate`` would refuse after them."""
    for key in arguments:
        if key.replace("-", "_") not in _EVALUATE_KEYS:
            told = unknown_name_message("argument of evaluate", key, sorted(_EVALUATE_KEYS))
            raise InvalidValueError("plan-evaluate-key-unknown", f"{where}: {told}")
    for key, value in _fill(arguments, {"seed": "0", "here": "."}).items():
        wanted = _EVALUATE_TYPES[key.replace("-", "_")]
        if value is not None and not _fits(value, wanted):
            raise InvalidValueError(
                "plan-evaluate-value", f"{where}: evaluate has {key}={value!r}, expected {words_of(wanted)}; correct the plan"
            )
    for key in _EVALUATE_NEEDS:
        if not arguments.get(key):
            raise InvalidValueError(
                "plan-evaluate-incomplete", f"{where}: evaluate has no {key}; it needs {', '.join(_EVALUATE_NEEDS)}"
            )
    try:
        check_methods(arguments["methods"])
    except ValueError as error:
        raise InvalidValueError("plan-evaluate-methods", f"{where}: {error}") from error
    try:
        check_finetune_options(arguments.get("finetune_options"))
    except ValueError as error:
        raise InvalidValueError("plan-evaluate-finetune-options", f"{where}: {error}") from error


def _fits(value: object, wanted: Any) -> bool:
    """Whether the command reads a value of a plan as what :func:`evaluate` takes; it gets all of them as texts."""
    if isinstance(wanted, UnionType):
        return any(_fits(value, part) for part in get_args(wanted))
    if get_origin(wanted) is Sequence:
        items = value if isinstance(value, (list, tuple)) else [value]
        return len(items) > 0 and all(_fits(item, get_args(wanted)[0]) for item in items)
    if get_origin(wanted) is Mapping:
        return isinstance(value, Mapping)
    if wanted is NoneType:
        return value is None
    if wanted is bool or isinstance(value, bool):
        return wanted is bool and isinstance(value, bool)
    if wanted is str or isinstance(value, (list, tuple, Mapping)):
        return not isinstance(value, (list, tuple, Mapping))
    try:
        wanted(str(value))
    except ValueError:
        return False
    return True


def _fill(value: object, values: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        try:
            return value.format_map(values)
        except KeyError as error:
            raise InvalidValueError(
                "plan-value-missing", f"the plan needs a value for {error}: --set {error.args[0]}=..."
            ) from None
    if isinstance(value, Mapping):
        return {key: _fill(item, values) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_fill(item, values) for item in value]
    return value


def jobs_of(plan: Mapping[str, Any], work_dir: Path, only: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Job]:
    """The runs of a plan, seed by seed, so that an interrupted comparison holds whole rows of its first seeds.

    ``seeds``: only the runs of these; a row that has none of them, such as a teacher of one seed, keeps its own.

    Raises:
        ValueError: ``only`` names a row or ``seeds`` a seed that the plan lacks, or two rows would share a folder.
    """
    names = [row["name"] for row in plan["rows"]]
    missing = [name for name in only if name not in names]
    if missing:
        raise InvalidValueError("plan-row-unknown", f"the plan has no row {missing[0]!r}; it has {', '.join(names)}")
    seeds_of = {row["name"]: list(row.get("seeds", [0])) for row in plan["rows"]}
    known = sorted(set().union(*seeds_of.values()))
    for seed in seeds:
        if seed not in known:
            raise InvalidValueError(
                "plan-seed-unknown", f"no row of the plan has seed {seed}; its seeds are {', '.join(map(str, known))}"
            )
    found = []
    for row in plan["rows"]:
        if only and row["name"] not in only:
            continue
        own = seeds_of[row["name"]]
        for order, seed in enumerate([seed for seed in own if seed in seeds] or own):
            filled = partial(_fill, values={"seed": str(seed), "here": str(work_dir)})
            evaluation = {**filled(row["evaluate"]), "seed": seed} if "evaluate" in row else {}
            options: dict[str, Any] = {}
            if "config" in row:
                options = {**filled({**plan.get("options", {}), **row.get("options", {})}), "seed": seed}
            else:
                evaluation |= {key: filled(row[key]) for key in ("backbone", "checkpoint", "block") if key in row}
            after = tuple(
                _folder(work_dir, name, seed if seed in seeds_of[name] else seeds_of[name][0]) for name in row["after"]
            )
            job = Job(
                row["name"],
                seed,
                _folder(work_dir, row["name"], seed),
                row.get("config"),
                options,
                evaluation,
                row.get("scores", {}),
                after,
            )
            found.append((order, job))
    rows: dict[Path, str] = {}
    for _, job in found:
        if rows.setdefault(job.folder, job.row) != job.row:
            raise InvalidValueError(
                "plan-folder-shared",
                f"rows {rows[job.folder]!r} and {job.row!r} would share the folder {job.folder}; rename one of them",
            )
    return [job for _, job in sorted(found, key=lambda pair: pair[0])]


def _folder(work_dir: Path, row: str, seed: int) -> Path:
    """Of a run."""
    return work_dir / f"{re.sub(r'[^0-9A-Za-z-]+', '_', row)}_seed{seed}"


def run(job: Job, threads: int) -> dict[str, Any]:
    """Train (or find trained), evaluate, and write ``result.json`` into the run's folder.

    Raises:
        StoppedError: a process failed; the message names its log.
    """
    complete = result_of(job)
    if complete is not None:
        return complete
    setting, result_file = _setting_of(job), job.folder / _RESULT
    job.folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"row": job.row, "seed": job.seed, "setting": setting, "threads": threads}
    arguments = dict(job.evaluate)
    if job.config is not None:
        _check_started(job, setting)
        result["command"] = shlex.join(["hgkd", *job.train_command])
        resume = ["--resume"] if results_in(job.folder) else []
        if resume:
            result["resumed"] = True  # its seconds are those of the last piece only
        seconds = _process([*job.train_command[:4], *resume, *job.train_command[4:]], job.folder / "train.log", threads)
        result |= {"train_seconds": seconds[0], "train_cpu_seconds": seconds[1], **_log(job)}
        if not job.scores:
            checkpoint = (job.folder / "last_checkpoint").read_text(encoding="utf-8").strip()
            result["images"], arguments["backbone"] = trained(checkpoint)
    if job.scores:
        result["scores"] = {name: {"value": curve[-1][1]} for name, curve in result["curves"].items()}
        result_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        return result
    command = _evaluate_command(arguments, job.folder / "evaluation.json")
    result["evaluate_command"] = shlex.join(["hgkd", *command])
    _process(command, job.folder / "evaluate.log", threads)
    found = json.loads((job.folder / "evaluation.json").read_text(encoding="utf-8"))
    if "method" in found:  # one method only
        found = {found["method"]: found}
    result["scores"] = {method: {key: found[method][key] for key in ("top1", "ci95")} for method in found}
    result_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def result_of(job: Job) -> dict[str, Any] | None:
    """The result of a run that is complete; None: it is not.

    Raises:
        StoppedError: the folder holds that of another setting.
    """
    file = job.folder / _RESULT
    if not file.is_file():
        return None
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if result["setting"] != _setting_of(job):
        raise StoppedError(
            "run-setting-changed", f"{job.folder} holds a run with another setting; give another --work-dir or delete it"
        )
    return result


def _setting_of(job: Job) -> dict[str, Any]:
    """What makes a run what it is, as JSON holds it."""
    kept = {"options": job.options, "evaluate": job.evaluate, "config": job.config}
    setting: dict[str, Any] = json.loads(json.dumps({**kept, "scores": job.scores} if job.scores else kept))
    return setting


def _check_started(job: Job, setting: Mapping[str, Any]) -> None:
    """Note what a training starts with; refuse to go on with one that was started with something else.

    Raises:
        StoppedError: names what differs.
    """
    started = job.folder / STARTED
    now = {"config": setting["config"], "options": setting["options"]}
    if started.is_file() and results_in(job.folder):
        before = json.loads(started.read_text(encoding="utf-8"))
        pairs = {key: (before["options"].get(key), now["options"].get(key)) for key in {*before["options"], *now["options"]}}
        pairs["config"] = before["config"], now["config"]
        differ = [f"{key} {old} -> {new}" for key, (old, new) in sorted(pairs.items()) if old != new]
        if differ:
            raise StoppedError(
                "run-setting-changed",
                f"{job.folder} holds a training that was begun with another setting ({', '.join(differ)}); with that one the "
                "same command goes on, else give another --work-dir or delete this folder",
            )
    started.write_text(json.dumps(now, indent=2) + "\n", encoding="utf-8")


def _evaluate_command(arguments: Mapping[str, Any], out: Path) -> list[str]:
    command = ["evaluate", *arguments["methods"], "--json", str(out)]
    for key, value in arguments.items():
        option = "--k" if key == "ks" else f"--{key.replace('_', '-')}"
        if key == "methods" or value is None or value == {}:
            continue
        if key == "standardise":
            command += [] if value else ["--no-standardise"]
        elif isinstance(value, bool):
            command += [option] if value else []
        elif isinstance(value, Mapping):
            command += [option, *(f"{name}={option_text(name, inner)}" for name, inner in value.items())]
        elif isinstance(value, (list, tuple)):
            command += [option, *map(str, value)]
        else:
            command += [option, str(value)]
    return command


def threads_of(jobs: int) -> int:
    """Threads of each of several runs at a time: its share of the cores, or fewer where OMP_NUM_THREADS says so.

    Threads that wait for a core that others hold spin, and slow everything many times.
    """
    share = max(1, (os.cpu_count() or 1) // jobs)
    said = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(said)) if said.isdecimal() and int(said) else share


def _process(command: Sequence[str], log: Path, threads: int) -> tuple[float, float]:
    """Run one of our commands; wall and CPU seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    start = time.perf_counter()
    before = log.stat().st_size if log.exists() else 0
    with log.open("a", encoding="utf-8") as handle:
        process = subprocess.Popen(
            [sys.executable, "-m", "hgkd", *command], stdout=handle, stderr=subprocess.STDOUT, env=environment
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        told = [line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("error: ")]
        raise StoppedError(
            "run-failed", f"{command[0]} ended with {process.returncode}; see {log}" + (f": {told[-1]}" if told else "")
        )
    _refuse_stopped(command[0], log, before)
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime


def _refuse_stopped(command: str, log: Path, before: int) -> None:
    """Half of a training is no row of a table, and one that a signal has stopped ends with 0.

    Args:
        before: bytes of the log that are of earlier starts.
    """
    if STOPPED in log.read_bytes()[before:].decode("utf-8", errors="replace"):
        raise StoppedError("run-stopped", f"{command} was stopped by a signal; see {log}. The same command goes on with it")


def _log(job: Job) -> dict[str, Any]:
    """Medians over the logged steps (images a second, teacher's share), and what the validations found as ``curves``.

    A curve is name -> [[step or epoch, value], ...]. A validation in which a detector found nothing logs no score (mmdet
    measures nothing then): it counts as 0, and its step is in ``found_nothing``.

    Raises:
        StoppedError: one of the plan's scores was never logged, or not by the last validation.
    """
    steps: dict[str, list[float]] = {"images_per_s": [], "teacher_share": []}
    given = job.scores or {"knn": "knn/top1"}
    keys = {name: (key, 1) if isinstance(key, str) else tuple(key) for name, key in given.items()}
    curves: dict[str, dict[int, float]] = {name: {} for name in keys}
    logged: set[str] = set()
    validations: dict[int, set[str]] = {}  # what each logged
    for entry in logged_lines(job.folder):
        if "lr" not in entry:  # of a validation
            names = set(entry) - {"step", "time", "data_time"}
            logged |= names
            if "step" in entry:  # of a resumed run the later one counts
                validations[entry["step"]] = names
        for key, values in steps.items():
            if key in entry:
                values.append(entry[key])
        for name, (key, factor) in keys.items():
            if key in entry:
                curves[name][entry["step"]] = factor * entry[key]
    missing = [keys[name][0] for name in job.scores if not curves[name]]
    if missing:
        raise StoppedError(
            "score-not-logged",
            f"no validation in {job.folder} logged {missing[0]!r}, which the plan's scores name; it logged "
            f"{', '.join(sorted(logged)) or 'nothing, as of a detector that finds nothing; train for longer'}",
        )
    empty = [step for step, names in validations.items() if not names]
    found: dict[str, Any] = {"found_nothing": empty} if job.scores and empty else {}
    last = max(validations, default=0)
    for name in job.scores:
        curves[name].update(dict.fromkeys(empty, 0.0))
        if max(curves[name]) < last:
            raise StoppedError(
                "score-not-in-last-validation",
                f"the last validation in {job.folder}, at {last}, did not log {keys[name][0]!r}, which the plan's scores name; "
                f"it logged {', '.join(sorted(validations[last]))}",
            )
    found["curves"] = {name: [list(pair) for pair in sorted(curve.items())] for name, curve in curves.items()}
    return found | {key: statistics.median(values) for key, values in steps.items() if values}


def table_of(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line a row of the plan, mean +- std over seeds (one seed: its bootstrap interval), then commands.

    Of runs that measured themselves there is no interval, but the curve of their first score, mean over seeds.
    """
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        rows.setdefault(result["row"], []).append(result)
    kinds = {name: "value" in score for result in results for name, score in result["scores"].items()}
    methods = list(kinds)
    head = ["row", *(method if kinds[method] else f"{method} top-1 %" for method in methods)]
    head += ["seeds", "training s", "CPU s", "images/s"]
    head += ["teacher % of step"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, runs in rows.items():
        cells = [name]
        for method in methods:
            measured = [run["scores"][method] for run in runs if method in run["scores"]]
            scores = [value_of(score) for score in measured]
            if not scores:
                cells.append("")
            elif len(scores) > 1:
                cells.append(f"{statistics.mean(scores):.1f} +- {statistics.stdev(scores):.1f}")
            elif kinds[method]:
                cells.append(f"{scores[0]:.1f}")
            else:
                low, high = measured[0]["ci95"]
                cells.append(f"{scores[0]:.1f} ({low:.1f} .. {high:.1f})")
        cells.append(str(len(runs)))
        for key, factor in (("train_seconds", 1), ("train_cpu_seconds", 1), ("images_per_s", 1), ("teacher_share", 100)):
            known = [run[key] for run in runs if key in run and not run.get("resumed")]
            cells.append(f"{factor * statistics.mean(known):.0f}" if known else "")
        lines.append(f"| {' | '.join(cells)} |")
    firsts = {name: next(iter(runs[0]["scores"])) for name, runs in rows.items()}
    for first in dict.fromkeys(first for first in firsts.values() if kinds[first]):
        lines += ["", f"{first} after each validation, mean over seeds:", ""]
        for name in (name for name, own in firsts.items() if own == first):
            values = zip(*([value for _, value in run["curves"][first]] for run in rows[name]), strict=False)
            lines.append(f"- {name}: {', '.join(f'{statistics.mean(at):.1f}' for at in values)}")
    for run in results:
        if run.get("found_nothing"):
            steps = ", ".join(map(str, run["found_nothing"]))
            lines.append(
                f"- {run['row']}, seed {run['seed']}: nothing was found in the validation at {steps}, which counts as 0"
            )
    commands = [f"    {runs[0].get('command') or runs[0]['evaluate_command']}" for runs in rows.values()]
    return "\n".join([*lines, "", "Commands (first seed of each row):", "", *commands, ""])


def _in_turn(
    todo: Sequence[Job], attempt: Callable[[Job], dict[str, Any] | StoppedError], jobs: int
) -> Iterator[tuple[Job, dict[str, Any] | StoppedError]]:
    """The outcomes of the jobs as they end, ``jobs`` at a time, each when those that it comes ``after`` have ended well."""
    waiting, running = list(todo), dict[Future[dict[str, Any] | StoppedError], Job]()
    unfinished, failed = {job.folder for job in todo}, set[Path]()
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            for job in list(waiting):
                lost = failed.intersection(job.after)
                if lost:
                    waiting.remove(job)
                    failed.add(job.folder)
                    unfinished.discard(job.folder)
                    yield (
                        job,
                        StoppedError("run-before-failed", f"not started, for {min(lost)} has failed, which it comes after"),
                    )
                elif len(running) < jobs and not unfinished.intersection(job.after):
                    waiting.remove(job)
                    running[pool.submit(attempt, job)] = job
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, outcome = running.pop(future), future.result()
                unfinished.discard(job.folder)
                if isinstance(outcome, StoppedError):
                    failed.add(job.folder)
                yield job, outcome


def _of_earlier_starts(every: Sequence[Job], now: Sequence[Job]) -> Iterator[dict[str, Any]]:
    """Results of a plan's runs that were complete before, and are not among those of now."""
    folders = {job.folder for job in now}
    for job in every:
        if job.folder in folders:
            continue
        try:
            result = result_of(job)
        except StoppedError as error:  # of a trial with other options
            print(f"{job.row} seed {job.seed}: not in the table, {error}", flush=True)
            continue
        if result is not None:
            yield result


def compare(
    plan: str | Path,
    work_dir: str | Path,
    only: Sequence[str] = (),
    jobs: int = 1,
    values: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    seeds: Sequence[int] = (),
) -> list[dict[str, Any]]:
    """Everything that the module's header says; returns the results of the plan's runs that are complete.

    Raises:
        StoppedError: runs failed; the others were finished and their results written.
    """
    if jobs < 1:
        raise InvalidValueError("count-not-positive", f"jobs is the number of runs at a time, 1 or more, got {jobs}")
    work_dir = Path(work_dir).expanduser()
    content = read_plan(plan, values or {})
    content["options"] = {**content.get("options", {}), **(options or {})}
    every, todo = jobs_of(content, work_dir), jobs_of(content, work_dir, only, seeds)
    threads = threads_of(jobs)
    results: list[dict[str, Any]] = []
    work_dir.mkdir(parents=True, exist_ok=True)
    failed: list[StoppedError] = []

    def attempt(job: Job) -> dict[str, Any] | StoppedError:
        try:
            return run(job, threads)
        except StoppedError as error:  # hours of the other runs do not depend on it
            return error

    for job, result in _in_turn(todo, attempt, jobs):
        if isinstance(result, StoppedError):
            print(f"{job.row} seed {job.seed}: FAILED, {result}", flush=True)
            failed.append(result)
            continue
        scores = "  ".join(f"{method} {value_of(score):.1f}" for method, score in result["scores"].items())
        print(f"{job.row} seed {job.seed}: {scores}", flush=True)
        results.append(result)
    if failed and not results:
        raise failed[0]
    results += _of_earlier_starts(every, todo)
    order = {job.folder: place for place, job in enumerate(every)}
    results.sort(key=lambda result: order[_folder(work_dir, result["row"], result["seed"])])
    (work_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (work_dir / "table.md").write_text(table_of(results), encoding="utf-8")
    write_csv(results, work_dir / "table.csv")
    write_picture(results, work_dir / "picture.png")
    if failed:
        raise StoppedError(
            "runs-failed",
            f"{len(failed)} of {len(todo)} runs failed: {'; '.join(map(str, failed))}. {work_dir / 'table.md'} has the others; "
            "the same command tries again what failed",
        )
    return results
