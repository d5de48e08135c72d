"""Folders that ``export`` wrote: their files, and the network that they describe."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hgkd.errors import MissingFileError, WeightsError
from hgkd.weights.run_file import EncoderSpec

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
READABLE = ("timm", "sparse", "torch")  # targets whose folders are read back


# what exports before 0.2.0 call a target; they also call the part ``what``
_EARLIER_TARGETS = {"program": "pt2"}


def read_spec(path: str | os.PathLike[str]) -> EncoderSpec:
    """The description of the encoder in an exported folder; raises as :func:`load_backbone` does."""
    path = Path(path).expanduser()
    _refuse_other_target(path)
    return EncoderSpec.parse(read_config(path).get("hgkd"), str(path / CONFIG_FILE))


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


def read_card(path: Path) -> dict[str, str]:
    """``target`` and ``part`` of an export, from its run card; empty where there is none."""
    try:
        card = json.loads((path / CARD_FILE).read_text(encoding="utf-8"))
        export = card["export"]
        target, part = str(export["target"]), export["part"] if "part" in export else export["what"]
        return {"target": _EARLIER_TARGETS.get(target, target), "part": str(part)}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def read_config(path: Path) -> dict[str, Any]:
    """``config.json`` of an exported folder; raises as :func:`load_backbone` does."""
    if not path.is_dir():
        raise MissingFileError(
            "export-folder-missing", f"export folder {path} does not exist; expected one that hgkd export wrote"
        )
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
    return config


CARD_FILE, CARD_PAGE = "run_card.json", "run_card.md"
