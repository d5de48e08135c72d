"""The run card: where exported weights come from, for machines (JSON) and people (Markdown).

What a checkpoint does not say is said to be unknown. Facts that are looked up while exporting, rather than recorded while
training, say so: files may have changed in between. Whatever cannot be looked up is unknown, too: a card never stops an export.

A card leaves with the weights, so home folders are written as ``~`` and the user's name with them left out.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import timm
import torch
import torchvision

import hgkd
from hgkd.data.images import LabelledImages, UnlabelledImages, find_images
from hgkd.data.remote import shown
from hgkd.data.sources import is_source
from hgkd.data.stores import is_address
from hgkd.digests import file_digest, files_digest
from hgkd.errors import WeightsError
from hgkd.weights.export_folder import CARD_FILE, CARD_PAGE
from hgkd.weights.run_file import literal_config
from hgkd.weights.run_folder import logged_lines

LICENCE_FIELDS = ("weights", "teacher", "data")
_DATASETS: dict[str, Any] = {"UnlabelledImages": UnlabelledImages, "LabelledImages": LabelledImages}
_HOMES = re.compile(r"(?<![\w.-])(?:(?:/home|/Users|[A-Za-z]:[\\/]+Users)[\\/]+[^\\/\s'\"]+|/root(?![\w.-]))")


def run_card(
    source: Origin, export: Mapping[str, Any], files: Path, licences: Mapping[str, str], notes: list[str]
) -> dict[str, Any]:
    """Everything that is known of an export.

    Args:
        source: what was exported.
        export: target, options and proof.
        files: folder whose files are listed, with their digests.
        licences: of ``LICENCE_FIELDS``; what is not given is unknown.
        notes: what a user should know.
    """
    meta, cfg = source.meta, literal_config(source.meta.get("cfg"))
    from_run = bool(meta)
    absent = "unknown: the checkpoint does not say" if from_run else "unknown: the file was read as one of another project"
    scores = _looked_up(lambda cfg, absent: _scores(source, cfg, absent), cfg, absent)
    card = {
        "source": {
            "checkpoint": str(source.path.absolute()),
            "sha256": file_digest(source.path),
            **{key: meta.get(key, absent) for key in ("epoch", "iter", "seed", "experiment_name", "time")},
            "commit": _commit(meta) or absent,
        },
        "network": source.describe(),
        "export": {**export, "written": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")},
        "files": {
            file.relative_to(files).as_posix(): {"sha256": file_digest(file), "bytes": file.stat().st_size}
            for file in sorted(files.rglob("*"))
            if file.is_file()
        },
        "data": _looked_up(_data, cfg, absent),
        "teacher": _looked_up(_teacher, cfg, absent),
        "metrics": scores.get("own") or dict(source.metrics) or absent,
        "run": scores.get("all", scores),
        "versions": {
            "hgkd": hgkd.__version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
        },
        "licences": {
            "hgkd's code": "Apache-2.0",
            **{key: licences.get(key, "unknown: not stated; ask the holder before you publish") for key in LICENCE_FIELDS},
        },
        "notes": notes,
        "config": meta.get("cfg", absent),
    }
    return cast(dict[str, Any], _plain(card))


def without_homes(text: str) -> str:
    """A text with the folders of users, this machine's and others', as ``~``."""
    own = re.compile(rf"(?<![\w.-]){re.escape(str(Path.home()))}(?![\w.-])")
    return _HOMES.sub("~", own.sub("~", text) if len(Path.home().parts) > 1 else text)


def _plain(value: object) -> object:
    """Values that JSON can hold, without home folders; whatever is none, as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return without_homes(str(value)).encode("utf-8", "backslashreplace").decode()  # names of files may be no UTF-8


def write_cards(card: Mapping[str, Any], folder: Path) -> None:
    """Write a run card into an export, for machines and for people."""
    write_json(card, folder / CARD_FILE)
    (folder / CARD_PAGE).write_text(card_page(card), encoding="utf-8")


def card_page(card: Mapping[str, Any]) -> str:
    """A run card as Markdown."""
    lines = [f"# Run card: {card['network']['name']} for {card['export']['target']}", ""]
    for section, content in card.items():
        if section == "config":
            continue
        lines += [f"## {section}", ""]
        lines += _items(content, "") if isinstance(content, Mapping | list) else [str(content)]
        lines.append("")
    lines += ["## config", "", "```python", str(card["config"]).strip(), "```", ""]
    return "\n".join(lines)


def model_card(card: Mapping[str, Any], library: str, usage: str) -> str:
    """README.md of a Hugging Face repository: front matter, how to load, and the run card without paths of this machine.

    Args:
        library: the hub's ``library_name``.
        usage: the lines that load the folder.
    """
    licence = card["licences"]["weights"]
    task = "image-classification" if card["export"]["part"] == "classifier" else "image-feature-extraction"
    lines = ["---", f"library_name: {library}", f"pipeline_tag: {task}", "tags:", "- hgkd"]
    if not licence.startswith("unknown"):
        # the hub knows identifiers; any other text is a name, quoted as YAML takes it
        named = re.fullmatch(r"[A-Za-z0-9.+-]+", licence)
        lines += [f"license: {licence.lower()}"] if named else ["license: other", f"license_name: {json.dumps(licence)}"]
    lines += ["---", f"# {card['network']['name']}, pretrained with hgkd", "", "## Use", "", "```python", usage, "```", ""]
    for section in ("network", "metrics", "run", "versions", "licences", "notes"):
        lines += [f"## {section}", ""]
        lines += _items(card[section], "") if isinstance(card[section], Mapping | list) else [str(card[section])]
        lines.append("")
    return "\n".join(lines)


def write_json(content: Mapping[str, Any], file: Path) -> None:
    """Write plain values as JSON.

    Raises:
        WeightsError: the encoder's arguments are no plain values.
    """
    try:
        text = json.dumps(content, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise WeightsError(
            "arguments-not-plain", f"cannot write {file.name}: {error}; encoder arguments must be plain values"
        ) from error
    file.write_text(text + "\n", encoding="utf-8")


def _commit(meta: Mapping[str, Any]) -> str | None:
    """Commit of the folder that training was started in, which mmengine appends to its own version."""
    found = re.fullmatch(r".*?([0-9a-f]{40})", str(meta.get("mmengine_version", "")))
    return f"{found[1]} (of the folder in which training was started)" if found else None


def _looked_up(look: Callable[..., dict[str, Any]], cfg: Mapping[str, Any], absent: str) -> dict[str, Any]:
    """What can be looked up on this machine; when that fails, why it is unknown."""
    try:
        return look(cfg, absent)
    except Exception as error:
        # a folder without permission, a file that vanishes, a config of another version: no reason to keep a student
        return {"unknown": f"could not be looked up while exporting: {type(error).__name__}: {error}"}


def _data(cfg: Mapping[str, Any], absent: str) -> dict[str, Any]:
    dataset = (cfg.get("train_dataloader") or {}).get("dataset") or {}
    root = dataset.get("data_root") or cfg.get("data_root")
    if not root:
        return {"root": absent, "fingerprint": absent}
    if is_address(str(root)):
        return {"root": shown(str(root)), "fingerprint": "unknown: what lies behind an address is not looked up"}
    folder = Path(str(root)).expanduser()
    if not folder.is_dir() and not is_source(str(root)):
        return {"root": str(root), "fingerprint": "unknown: no such folder on this machine any more"}
    kind = _DATASETS.get(str(dataset.get("type", "UnlabelledImages")).rpartition(".")[2])
    files, of = _files_of_run(kind, {**dataset, "data_root": str(folder)}) if kind else _files_below(folder)
    return {
        "root": str(root),
        of: len(files),
        "fingerprint": files_digest(sorted(files)),
        "fingerprint_of": f"names and sizes of the {of.replace('_', ' ')}, sorted, looked up while exporting",
        **({"not_readable": missing} if (missing := sum(size < 0 for _, size in files)) else {}),
    }


def _files_of_run(kind: Callable[..., Any], dataset: Mapping[str, Any]) -> tuple[list[tuple[str, int]], str]:
    """Names and sizes of the images that the run's own data set holds: its list, its limit, its shards."""
    found = kind(**{key: value for key, value in dataset.items() if key not in ("type", "_scope_")})
    paths = [os.path.relpath(found.path(i), found.data_root) for i in range(len(found))]
    return [(path, found.size(i)) for i, path in enumerate(paths)], "images"


def _files_below(folder: Path) -> tuple[list[tuple[str, int]], str]:
    """The same of all images below a folder, where a data set of another library chose among them."""
    paths = [(name, folder / name) for name in find_images(str(folder))]
    return [(name, path.stat().st_size if path.exists() else -1) for name, path in paths], "images_in_the_folder"


def _scores(source: Origin, cfg: Mapping[str, Any], absent: str) -> dict[str, Any]:
    """'own' scores of the checkpoint's weights, and those of 'all' validations of the run whose work folder it lies in, by its
    log.

    One like ``epoch_3.pth`` is written before its validation, so that the file itself has the scores of an earlier one.
    """
    name = source.path.name
    if not source.meta or not re.fullmatch(r"(epoch|iter|best)_.*\.pth", name):
        return {"own": {}, "all": {"scores": absent}}
    logged: dict[str, dict[int, float]] = {}  # name -> epoch or step -> score
    for entry in logged_lines(source.path.parent):
        for key, value in entry.items() if "lr" not in entry else ():
            if key not in ("step", "time", "data_time") and isinstance(value, int | float) and math.isfinite(value):
                logged.setdefault(key, {})[entry["step"]] = value  # of a resumed run the later one counts
    by_epoch = ((cfg.get("default_hooks") or {}).get("logger") or {}).get("log_metric_by_epoch", True)
    step = source.meta.get("epoch" if by_epoch else "iter") if re.fullmatch(r"(epoch|iter)_\d+\.pth", name) else None
    return {
        "own": {key: values[step] for key, values in logged.items() if step in values},
        "all": {
            key: {"last": values[max(values)], "lowest": min(values.values()), "highest": max(values.values())}
            | {"validations": len(values)}
            for key, values in logged.items()
        }
        or {"scores": "unknown: no log of the run lies beside the checkpoint"},
    }


def _teacher(cfg: Mapping[str, Any], absent: str) -> dict[str, Any]:
    model = cfg.get("model") or {}
    several = model.get("teachers") or {}
    if several:
        return {name: _teacher({"model": {"teacher": teacher}}, absent) for name, teacher in several.items()}
    if "model" in cfg and not model.get("teacher"):
        return {"name": "none: trained without a teacher", "file": "none", "sha256": "none"}
    teacher = model.get("teacher") or {}
    if isinstance(teacher, str):  # a config file; its weights are a key of their own
        teacher = {"name": teacher}
    name = teacher.get("name") or teacher.get("type") or absent
    file = teacher.get("checkpoint") or model.get("teacher_checkpoint")
    if not file:
        return {"name": name, "file": absent, "sha256": absent}
    path = Path(str(file)).expanduser()
    if not path.is_file():
        return {"name": name, "file": str(file), "sha256": "unknown: no such file on this machine any more"}
    return {"name": name, "file": str(file), "sha256": file_digest(path), "sha256_of": "the file as found while exporting"}


def _items(content: Mapping[str, Any] | list[Any], indent: str) -> list[str]:
    """Nested values as a Markdown list."""
    named = content.items() if isinstance(content, Mapping) else ((None, item) for item in content)
    lines = []
    for name, value in named:
        label = "" if name is None else f"{name}: "
        if isinstance(value, Mapping | list) and value:
            lines += [f"{indent}- {label}".rstrip(), *_items(value, indent + "  ")]
        else:
            text = str(value).replace("\n", f"\n{indent}  ")
            lines.append(f"{indent}- {label}{text}")
    return lines or [f"{indent}- none"]


class Origin(Protocol):
    """Origin of an export, as run cards tell it."""

    @property
    def path(self) -> Path: ...
    @property
    def meta(self) -> Mapping[str, Any]: ...
    @property
    def metrics(self) -> Mapping[str, Any]: ...
    def describe(self) -> dict[str, Any]:
        """The network, as plain values; ``name`` is among them."""
