"""Recipes that hgkd ships: found by a short name, from any folder, also where hgkd was installed from a wheel.

They lie in ``hgkd/.mim/configs``, where mmengine looks for ``_base_ = "hgkd::hgkd/NAME.py"``: in a checkout as links to the
folders ``configs`` and ``downstream``, in a wheel as copies, which ``setup.py`` makes.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

from hgkd.errors import MissingFileError, unknown_name_message

SHIPPED = Path(__file__).parent / ".mim" / "configs"
PREFIX = "hgkd::"
PLANS = "comparisons"  # what `hgkd compare` takes; not recipes to train


def recipe_names() -> list[str]:
    """Names of all recipes, e.g. ``hgkd/hgkd_mae-tiny_resnet18_shapes``, ``downstream/detection/retinanet_r18_1x_coco``."""
    return sorted(name for name in _names() if not name.startswith(f"{PLANS}/"))


def plan_names() -> list[str]:
    """Names of all comparison plans, e.g. ``comparisons/cifar128``."""
    return sorted(name for name in _names() if name.startswith(f"{PLANS}/"))


def _names() -> Iterator[str]:
    # not Path.rglob, which passes links over; `configs` is there for the relative paths of downstream recipes
    for folder, folders, files in os.walk(SHIPPED, followlinks=True):
        folders[:] = [name for name in folders if name not in ("_base_", "configs", "__pycache__")]
        for file in files:
            if file.endswith(".py"):
                yield (Path(folder, file).relative_to(SHIPPED)).with_suffix("").as_posix()


def find_recipe(name: str | os.PathLike[str]) -> Path:
    """The file of a recipe or plan.

    Args:
        name: a path; or a shipped recipe as ``hgkd::hgkd/NAME.py``, ``hgkd/NAME``, ``configs/hgkd/NAME.py``, or ``NAME`` alone.

    Raises:
        FileNotFoundError: neither a file nor a recipe; the message has the nearest names.
    """
    if Path(name).expanduser().is_file():
        return Path(name).expanduser()
    if "::" in os.fspath(name) and not os.fspath(name).startswith(PREFIX):
        return Path(name)  # of another package, which mmengine finds
    short = os.fspath(name).removeprefix(PREFIX).removeprefix("configs/").removesuffix(".py")
    known = list(_names())
    found = [full for full in known if short in (full, full.rpartition("/")[2])]
    if len(found) == 1:
        return (SHIPPED / f"{found[0]}.py").resolve()  # past the links of a checkout, to what a user would edit
    if found:
        raise MissingFileError(
            "recipe-name-ambiguous", f"{name} stands for several recipes: {', '.join(sorted(found))}; give one of these names"
        )
    message = unknown_name_message("recipe", short, [*known, *(full.rpartition("/")[2] for full in known)])
    raise MissingFileError(
        "recipe-missing", f"config {name} does not exist, and no recipe is called so: {message} 'hgkd recipes' lists all"
    )


def summary_of(name: str) -> str:
    """First line of a recipe's docstring."""
    text = ast.get_docstring(ast.parse((SHIPPED / f"{name}.py").read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def register_recipes() -> None:
    """Let mmengine find ``_base_ = "hgkd::..."``.

    Its table maps a scope to a distribution, whose folder it takes from pip's records. These name no folder for an editable
    installation, so the entry is this module: mmengine then takes the folder of the module's file, which is the package's.
    """
    from mmengine.config.utils import MODULE2PACKAGE

    MODULE2PACKAGE["hgkd"] = __name__
