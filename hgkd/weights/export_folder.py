"""Folders that ``export`` wrote: their files, and the network that they describe."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from hgkd.digests import file_digest
from hgkd.errors import MissingFileError, WeightsError
from hgkd.weights.run_file import EncoderSpec
from hgkd.weights.signature import Signature

CARD_FILE, CARD_PAGE = "run_card.json", "run_card.md"
WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
READABLE = ("timm", "sparse", "torch")  # targets whose folders are read back


# what exports before 0.2.0 call a target; they also call the part ``what``
_EARLIER_TARGETS = {"program": "pt2"}


def read_spec(path: str | os.PathLike[str]) -> EncoderSpec:
    """The description of the encoder in an exported folder; raises as :func:`hgkd.networks.load_backbone` does."""
    path = Path(path).expanduser()
    _refuse_other_target(path)
    return EncoderSpec.parse(read_config(path).get("hgkd"), str(path / CONFIG_FILE)).without_head()


def _refuse_other_target(path: Path) -> None:
    """Raise WeightsError for an export that was written for another library, and name the way to one that is read."""
    card = read_card(path)
    if not card:
        return
    target, part = card["target"], card["part"]
    if target not in READABLE or part == "decoder":
        shown = "" if part == "backbone" else f" --part {part}"
        raise WeightsError(
            "export-of-another-target",
            f"{path} is an export to {target}{shown}, which hgkd does not read back; "
            "export the checkpoint again with --to timm",
        )


@dataclass(frozen=True)
class ExportedGraph:
    """A folder of graphs, whose files are as they were written.

    Attributes:
        path: the folder.
        target: e.g. 'onnx'.
        part: e.g. 'classifier'.
        signature: what the graphs take and give.
        files: name -> {'sha256', 'bytes'} of all that belongs to it.
        card: the whole run card.
    """

    path: Path
    target: str
    part: str
    signature: Signature
    files: Mapping[str, Mapping[str, Any]]
    card: Mapping[str, Any]

    def file(self, precision: str = "fp32") -> Path:
        """The file of a precision.

        Raises:
            WeightsError: the folder has none.
        """
        found = self.signature.files.get(precision)
        if found is None:
            has = ", ".join(self.signature.files)
            raise WeightsError(
                "export-lacks-precision",
                f"{self.path} holds {has}, not {precision}; export it again with --precision {precision}",
            )
        return self.path / found


def check_folder(path: Path) -> None:
    """Raise FileNotFoundError unless there is such a folder."""
    if not path.is_dir():
        raise MissingFileError(
            "export-folder-missing", f"export folder {path} does not exist; expected one that hgkd export wrote"
        )


def read_graph(path: str | os.PathLike[str]) -> ExportedGraph:
    """A folder that was exported to a runtime, its files checked.

    Raises:
        FileNotFoundError: no such folder, no run card, or a file of it is missing.
        WeightsError: a file was changed, or the folder holds no graph.
    """
    path = Path(path).expanduser()
    check_folder(path)
    check_files(path)
    card, named = _card(path), read_card(path)
    if not named:
        raise MissingFileError(
            "export-card-missing", f"{path} has no {CARD_FILE} of an export; expected a folder that hgkd export wrote"
        )
    signature = Signature.parse(card.get("signature"), str(path / CARD_FILE))
    return ExportedGraph(path, named["target"], named["part"], signature, card["files"], card)


def check_files(path: Path, only: str | None = None) -> None:
    """Compare the files of an export with the SHA-256 in its run card; a folder without card is passed over.

    Args:
        only: a file in the folder, which may be none of the export's; None: all that the card lists.

    Raises:
        FileNotFoundError: one is missing.
        WeightsError: one was changed.
    """
    files = _card(path).get("files")
    for name, noted in (files if isinstance(files, Mapping) else {}).items():
        if only not in (None, name) or not isinstance(noted, Mapping) or not {"sha256", "bytes"} <= noted.keys():
            continue
        file, again = path / name, "copy the whole folder again, or export the checkpoint again"
        if not file.is_file():
            raise MissingFileError("export-file-missing", f"{path} lacks {name}, which its {CARD_FILE} lists; {again}")
        about = file.stat()
        if about.st_size != noted["bytes"] or _digest(str(file), about.st_size, about.st_mtime_ns) != noted["sha256"]:
            raise WeightsError(
                "export-file-changed",
                f"{file} is not what was exported: its SHA-256 differs from the one in {CARD_FILE}; {again}",
            )


@lru_cache(maxsize=64)
def _digest(file: str, size: int, changed: int) -> str:
    """SHA-256 of a file, once for as long as its size and time stay."""
    return file_digest(file)


def _card(path: Path) -> Mapping[str, Any]:
    """The run card; empty where there is none that can be read."""
    try:
        card = json.loads((path / CARD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return card if isinstance(card, Mapping) else {}


def read_card(path: Path) -> dict[str, str]:
    """``target`` and ``part`` of an export, from its run card; empty where there is none."""
    try:
        export = _card(path)["export"]
        target, part = str(export["target"]), export["part"] if "part" in export else export["what"]
        return {"target": _EARLIER_TARGETS.get(target, target), "part": str(part)}
    except (KeyError, TypeError):
        return {}


def read_config(path: Path) -> dict[str, Any]:
    """``config.json`` of an exported folder whose files are as they were written.

    It raises as :func:`hgkd.networks.load_backbone` does.
    """
    check_folder(path)
    file = path / CONFIG_FILE
    if not file.is_file():
        raise MissingFileError(
            "export-config-missing", f"{path} has no {CONFIG_FILE}; expected a folder that hgkd export wrote"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(
            "export-config-not-json", f"{file} is not valid JSON ({error}); export the checkpoint again"
        ) from error
    if not isinstance(config, dict):
        raise WeightsError(
            "export-config-not-an-object",
            f"{file} holds a {type(config).__name__}, expected an object; export the checkpoint again",
        )
    check_files(path)
    return config
