"""Reading configs: a Python program, or plain data from a source that need not be trusted.

A Python config is a program and runs as one. A YAML or JSON config is plain data and is held to it: mmengine 0.10.7 reads YAML
with a loader that runs what the file asks for, and builds whatever importable object a ``type`` names.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.utils import get_installed_path

from hgkd.config.levels import read_levels
from hgkd.errors import InvalidValueError, MissingFileError, nearest_names
from hgkd.recipes import find_recipe, register_recipes

_REGISTERED = re.compile(r"(?:(?:hgkd|mmengine)\.)?\w+")

_DATA_SUFFIXES = (".yaml", ".yml", ".json")
_CODE_KEYS = ("_base_", "_scope_", "custom_imports")  # each of them can import or run a file


def read_config(path: str | os.PathLike[str]) -> Config:
    """A config file: a Python program (.py), or plain data from a source that need not be trusted (.yaml, .yml, .json).

    Args:
        path: of the file; the name of a shipped recipe, see :func:`hgkd.recipes.find_recipe`; or for one that another installed
            package brings ``mmdet::FOLDER/NAME.py``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or a data file that is no mapping, is damaged, or asks for code.
    """
    register_recipes()
    path = find_recipe(path)
    if "::" in str(path):
        path = _packaged(str(path))
    if path.suffix == ".py":
        return read_levels(str(path))
    if path.suffix not in _DATA_SUFFIXES:
        raise InvalidValueError(
            "config-suffix", f"config {path} must end in .py, or for plain data in {', '.join(_DATA_SUFFIXES)}"
        )
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise InvalidValueError("config-not-readable", f"config {path} is no plain {path.suffix[1:]} data: {error}") from error
    if not isinstance(content, dict):
        raise InvalidValueError(
            "config-not-a-mapping", f"config {path} holds a {type(content).__name__}, expected keys and values"
        )
    check_plain_data(content, str(path))
    return Config(content, filename=str(path))


def _packaged(name: str) -> Path:
    """The file behind 'mmdet::FOLDER/NAME.py', a config of an installed package."""
    package, _, inner = name.partition("::")
    known = [key for key in MODULE2PACKAGE if _is_there(key)]
    if package not in known:
        raise MissingFileError(
            "config-package-missing",
            f"config {name}: no package {package!r} with configs is installed; installed are {', '.join(known) or 'none'} "
            "(pip install 'hgkd[downstream]' brings mmdet and mmseg)",
        )
    folder = Path(get_installed_path(MODULE2PACKAGE[package])) / ".mim/configs"
    if (folder / inner).is_file():
        return folder / inner
    files = {str(file.relative_to(folder)): file for file in folder.rglob("*.py")}
    near = [path for path in files if Path(path).name in (inner, f"{inner}.py")] or nearest_names(f"{inner}", files)
    hint = f"; did you mean {' or '.join(f'{package}::{path}' for path in near)}?" if near else ""
    raise MissingFileError("packaged-config-missing", f"config {name} does not exist in {folder}{hint}")


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def check_plain_data(content: Any, where: str) -> None:
    """Refuse a config from an untrusted source that could import or run anything but what hgkd and mmengine register.

    Args:
        where: name of the source, for the message.

    Raises:
        ValueError: names the key.
    """
    for key, value in content.items() if isinstance(content, Mapping) else enumerate(content):
        if key in _CODE_KEYS:
            raise InvalidValueError(
                "plain-config-runs-code",
                f"{where}: {key!r} can run code, which a config of plain data must not; write a Python config",
            )
        names = key in ("type", "constructor", "runner_type", "default_scope")
        if names and not (isinstance(value, str) and _REGISTERED.fullmatch(value)):
            raise InvalidValueError(
                "plain-config-import-path",
                f"{where}: {key}={value!r} is no name of a registry; a config of plain data takes registered classes only, "
                "not import paths; write a Python config",
            )
        if isinstance(value, (Mapping, list, tuple)):
            check_plain_data(value, where)
