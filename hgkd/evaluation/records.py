"""Results of evaluations on disk: JSON with every test image's outcome, a CSV that grows, and two runs against each other.

A result is a dict of plain values: ``method``, ``backbone``, ``top1`` and ``ci95`` (percent, of the first setting),
``per_class``, ``train_images``, ``test_images``, ``test_list`` (see :func:`list_digest`), ``settings``, and ``scores``:
setting -> ``top1``, ``ci95``, ``correct`` and, with several draws, ``std``. ``correct`` holds one number a test image:
1 right, 0 wrong, or the share of draws in which it was right.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from hgkd.data import LabelledImages
from hgkd.errors import InvalidValueError, MissingFileError
from hgkd.evaluation.accuracy import PairedTest, bootstrap_interval, paired_test, per_class_accuracy, percent
from hgkd.writing import locked, writing, written_beside

CLASSIFIER = "classifier"  # the setting of a fine-tuned network: its own answers
Results = Mapping[str, Mapping[str, Any]]  # method -> result

CSV_COLUMNS = (
    "method",
    "setting",
    "backbone",
    "checkpoint",
    "block",
    "image_size",
    "reading",
    "train",
    "test",
    "train_images",
    "test_images",
    "seed",
    "top1",
    "std",
    "ci95_low",
    "ci95_high",
)
_NUMBERS = re.compile(r"\[\s+([-+.\deE]+(?:,\s+[-+.\deE]+)*)\s+\]")
_SETUP = (
    "image_size",
    "reading",
    "train",
    "limit_per_class",
    "temperature",
    "standardise",
    "c_grid",
    "draws",
    "epochs",
    "finetune_options",
)


def make_result(
    method: str,
    backbone: str,
    correct: Mapping[str, NDArray[np.bool_]],
    images: LabelledImages,
    indices: Sequence[int],
    train_images: int | None,
    settings: Mapping[str, Any],
    seed: int = 0,
    **extra: object,
) -> dict[str, Any]:
    """The result of one method, see the module's header.

    Args:
        method: 'knn', 'linear', 'fewshot' or 'finetune'.
        backbone: what was measured.
        correct: setting -> whether each of N test images is right, in each of the draws (draws, N).
        images: the test images' data set.
        indices: places of the N images in it.
        train_images: how many were learnt from; None: not known.
        settings: of the measurement.
        seed: of the bootstrap.
        extra: further entries.
    """
    labels = np.asarray(images.labels)[list(indices)]
    files = [(images.path(i), images.classes[label]) for i, label in zip(indices, labels.tolist(), strict=True)]
    per_class = per_class_accuracy(next(iter(correct.values())).mean(axis=0), labels)
    scores = {setting: _score(drawn, seed) for setting, drawn in correct.items()}
    return {
        "method": method,
        "backbone": backbone,
        **{key: next(iter(scores.values()))[key] for key in ("top1", "ci95")},
        "per_class": {images.classes[label]: value for label, value in per_class.items()},
        "train_images": train_images,
        "test_images": len(labels),
        **extra,
        "scores": scores,
        "test_list": list_digest((os.path.relpath(path, images.data_root), name) for path, name in files),
        "settings": {**settings, "reading": images.reading},
    }


def _score(drawn: NDArray[np.bool_], seed: int) -> dict[str, Any]:
    """An entry of ``scores`` from the outcomes (draws, N)."""
    correct = drawn.mean(axis=0)
    score: dict[str, Any] = {"top1": percent(correct), "ci95": list(bootstrap_interval(correct, seed=seed))}
    if len(drawn) > 1:
        score["std"] = float(100.0 * drawn.mean(axis=1).std(ddof=1))
        return {**score, "correct": [round(share, 6) for share in correct.tolist()]}
    return {**score, "correct": drawn[0].astype(int).tolist()}


def list_digest(images: Iterable[tuple[str, str]]) -> str:
    """SHA-256 (hexadecimal) of test images in their order, as pairs of path and class name."""
    lines = "".join(f"{path}\t{name}\n" for path, name in images)
    return hashlib.sha256(lines.encode("utf-8", errors="surrogateescape")).hexdigest()


def write_json(results: Results, file: str | os.PathLike[str]) -> None:
    """One result as it is; several under their methods' names. Lists of numbers take one line.

    Raises:
        WriteError: the disk does not take it; a file that was there is untouched.
    """
    content = next(iter(results.values())) if len(results) == 1 else results
    text = _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", json.dumps(content, indent=2))
    with written_beside(Path(file).expanduser()) as beside:
        beside.write_text(text + "\n", encoding="utf-8")


def read_json(file: str | os.PathLike[str]) -> Results:
    """Read results that :func:`write_json` wrote, by method.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise MissingFileError(
            "result-file-missing", f"result {path} does not exist; hgkd evaluate writes one with --json {path}"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = {content["method"]: content} if "method" in content else content
        for result in found.values():
            if not result["scores"] or not all(score["correct"] for score in result["scores"].values()):
                raise KeyError
            _ = result["test_list"], result["settings"]
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise InvalidValueError(
            "result-file-other",
            f"{path} holds no results with an outcome for every test image; write it anew with hgkd evaluate or "
            "hgkd test --json",
        ) from None
    return dict(found)


def compare_results(first: Results, second: Results, seed: int = 0) -> tuple[dict[tuple[str, str], PairedTest], list[str]]:
    """A paired test for every method and setting that two runs share.

    Returns:
        (method, setting) -> test; and what else of their set-ups differs, one line each.

    Raises:
        ValueError: no common method and setting, or not the same test images in the same order.
    """
    found: dict[tuple[str, str], PairedTest] = {}
    notes: list[str] = []
    for method in [name for name in first if name in second]:
        a, b = first[method], second[method]
        if a["test_list"] != b["test_list"]:
            raise InvalidValueError(
                "tested-images-differ",
                f"the two runs were tested on different images: {_tested(a)} and {_tested(b)}; a paired test needs the same "
                "images in the same order: evaluate both with the same --test",
            )
        for setting in [name for name in a["scores"] if name in b["scores"]]:
            correct = [np.asarray(run["scores"][setting]["correct"], dtype=np.float64) for run in (a, b)]
            found[method, setting] = paired_test(correct[0], correct[1], seed)
        for key in _SETUP:
            values = a["settings"].get(key), b["settings"].get(key)
            if values[0] != values[1]:
                notes.append(f"{method}: {key} is {values[0]} in the first run and {values[1]} in the second")
    if not found:
        has = ["; ".join(f"{m} ({', '.join(run[m]['scores'])})" for m in run) for run in (first, second)]
        raise InvalidValueError(
            "results-share-no-method", f"the two runs share no method and setting: the first has {has[0]}, the second {has[1]}"
        )
    return found, notes


def _tested(result: Mapping[str, Any]) -> str:
    return f"{result['test_images']} of {result['settings'].get('test')} (list {result['test_list'][:8]})"


# --- the growing CSV -------------------------------------------------------------------------------------------------------


def check_outputs(json_file: str | os.PathLike[str] | None, csv_file: str | os.PathLike[str] | None) -> None:
    """Make the folders of both files, and refuse what could not be written; before a long evaluation.

    Raises:
        ValueError: a folder or not writable; the CSV's columns are others, or its last line is not complete.
    """
    for path in (Path(file).expanduser() for file in (json_file, csv_file) if file is not None):
        for folder in path.parents:
            if folder.exists() and not folder.is_dir():
                raise InvalidValueError(
                    "output-folder-missing", f"results cannot be written to {path}: {folder} is no folder; name another place"
                )
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise InvalidValueError(
                "output-is-a-folder", f"results cannot be written to {path}: it is a folder; name a file in it"
            )
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise InvalidValueError(
                "output-not-writable", f"results cannot be written to {path}: no permission; name another place"
            )
    table = None if csv_file is None else Path(csv_file).expanduser()
    if table is not None and table.exists():
        with table.open(newline="", encoding="utf-8", errors="surrogateescape") as handle:
            _check_open_csv(handle, table)


def append_csv(results: Results, file: str | os.PathLike[str]) -> None:
    """One line a method and setting; the column names first when the file is new.

    The lines are written at once, under a lock where the system has them, so that several processes may share a file.

    Raises:
        ValueError: see :func:`check_outputs`; nothing is written then.
        WriteError: the disk does not take them; the file keeps its earlier lines, none of them cut off.
    """
    path = Path(file).expanduser()
    with writing(path), _opened(path) as handle, locked(path):
        handle.seek(0)
        is_new = _check_open_csv(handle, path)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, CSV_COLUMNS)
        if is_new:
            writer.writeheader()
        for result in results.values():
            writer.writerows(_csv_rows(result))
        end = path.stat().st_size
        try:
            handle.write(text.getvalue())
            handle.flush()
        except OSError:
            os.truncate(path, end)
            raise


@contextmanager
def _opened(path: Path) -> Iterator[IO[str]]:
    """The CSV to read and append to, made with its folder when it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = path.open("a+", newline="", encoding="utf-8", errors="surrogateescape")
    try:
        yield handle
    finally:
        with suppress(OSError):  # what could not be flushed was reported then
            handle.close()


def _check_open_csv(handle: IO[str], path: Path) -> bool:
    """Whether the file is empty."""
    content = handle.read()
    if not content:
        return True
    columns = next(csv.reader(io.StringIO(content)))
    if tuple("std" if name == "deviation" else name for name in columns) != CSV_COLUMNS:  # as earlier versions call it
        raise InvalidValueError(
            "csv-columns-differ",
            f"{path} has the columns {', '.join(columns)}; results have {', '.join(CSV_COLUMNS)}; give --csv another file",
        )
    if not content.endswith("\n"):
        raise InvalidValueError("csv-line-cut-off", f"the last line of {path} is cut off; remove or complete it")
    return False


def _csv_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    settings = result["settings"]
    used = settings["extractor"]
    shared = {
        **{key: result[key] for key in ("method", "backbone", "train_images", "test_images")},
        **{key: settings[key] for key in ("image_size", "train", "test", "seed")},
        "checkpoint": used.get("weights"),
        "block": used.get("block"),
        "reading": json.dumps(settings["reading"]) if "reading" in settings else None,  # not in results of before 0.2.0
    }
    return [
        {
            **shared,
            "setting": setting,
            "top1": f"{score['top1']:.2f}",
            "std": f"{score['std']:.2f}" if "std" in score else "",
            "ci95_low": f"{score['ci95'][0]:.2f}",
            "ci95_high": f"{score['ci95'][1]:.2f}",
        }
        for setting, score in result["scores"].items()
    ]
