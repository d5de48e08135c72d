"""What the guides and tutorials name exists: recipes, config keys, codes of errors, numbers that they take from the results.

The commands of the guides are read by ``tests/test_readme.py``, as those of all pages; the tutorials are run as a whole.
"""

import difflib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from test_readme import COMMANDS, commands
from tiny_runs import ROOT

from hgkd.api.train import load_config
from hgkd.config.options import option_value
from hgkd.diagnosis.error_codes import CODE, coded_errors
from hgkd.errors import Refusal
from hgkd.recipes import plan_names, recipe_names

PAGES = sorted(page for part in ("howto", "tutorials") for page in (ROOT / "docs" / part).glob("*.md"))
NAMES = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES]
every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)

RECIPE = re.compile(
    r"(?:hgkd::)?(?:configs/)?((?:hgkd|spark|mae|dmae|g2sd|mgd|comparisons|downstream/\w+)/[a-z0-9_-]+)(?:\.py)?"
)
KEY = re.compile(
    r"((?:model|train_dataloader|val_dataloader|test_dataloader|optim_wrapper|train_cfg|val_cfg|default_hooks|auto_scale_lr|randomness"
    r"|env_cfg)(?:\.\w+)+)(?:=(\S+))?"
)
CODE_COLUMNS = ("code", "error code", "refused with", "error")
# a recipe for each kind of run: a key must have a place in one of them
RUNS = (
    "hgkd/hgkd_vit-s14_resnet50_100e_image-folder",
    "downstream/classification/resnet18_30e_image-folder",
    "spark/spark_resnet18_shapes",
    "mae/mae_tiny_shapes",
    "dmae/dmae_vit-s14_vit-ti16_10e_cifar128",
    "hgkd/hgkd-inferred_mae-ti16_resnet18_10e_cifar128",
    "hgkd/hgkd-two_vit-s14-mae-ti16_resnet18_10e_cifar128",
    "mgd/mgd_vit-s14_resnet18_10e_cifar128",
    "downstream/classification/resnet18_mgd_10e_cifar128",
    "downstream/classification/resnet50_spark_300e_imagenet",
)
OF_LIBRARIES = {"backbone", "neck", "bbox_head", "decode_head", "inherit"}  # mmdet's and mmseg's own keys, which they check
FILES = re.compile(r"model\.(pth|pt2|ts|xml|ncnn\.param|bin|json|safetensors(\.index\.json)?|onnx|pte|tflite|mlpackage|plan)")
MEASURED = ("results", "performance")


def spans(page: Path) -> list[str]:
    """What stands in backticks in a page, blocks left out."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def tables(page: Path) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Head and rows of the tables of a page."""
    found = re.findall(r"(?:^\|.*\n)+", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for table in found:
        rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines()]
        yield rows[0], rows[2:]


@cache
def codes() -> list[str]:
    return sorted({error.code for error in coded_errors()})


@cache
def has_place(key: str, value: str | None) -> bool:
    """Whether a recipe takes a dotted key, with this value where the page gives one."""
    for recipe in RUNS:
        try:
            load_config(recipe, options={key: 1 if value is None else option_value(key, value)})
        except Refusal as error:
            kinds = ("value-of-another-kind", "type-not-a-name")  # of the 1 that is tried, at the key's own place
            if value is None and error.code in kinds and str(error).startswith(f"{key}=1"):
                return True
            continue
        return True
    return False


def test_there_are_guides_with_commands() -> None:
    told = {page.name for page, _ in COMMANDS if page.parent.name == "howto"}
    assert len(told) >= 12
    assert {
        "choose_method.md",
        "choose_student.md",
        "mask_ratio.md",
        "teacher_files.md",
        "small_data.md",
        "many_channels.md",
    } <= told


def test_commands_with_lists_and_in_fences_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```\nhgkd train mine/a.py a=[1,[2,3]]\n```\n\n    hgkd train b.py [c=D]\n    hgkd export x --to timm\n")
    assert commands(page) == [["export", "x", "--to", "timm"], ["train", "mine/a.py", "a=[1,[2,3]]"]]


@every_page
def test_a_shell_takes_the_commands_as_they_are_typed(page: Path) -> None:
    """Round brackets outside of quotes are a syntax error of the shell; lists are written in square ones."""
    text = re.sub(r"^```python.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for line in re.findall(r"^(?: {4}|\$ |hgkd ).*", text, flags=re.MULTILINE):
        assert not re.search(r"(?:^|\s)[\w.]+=\(", line), f"quote the brackets of: {line.strip()}"


@every_page
def test_recipes_and_plans_exist(page: Path) -> None:
    named = {
        found[1] for span in spans(page) if (found := RECIPE.fullmatch(span)) and re.search(r"[_-]|^comparisons/", found[1])
    }
    assert named - {*recipe_names(), *plan_names()} == set()


@every_page
def test_config_keys_have_a_place(page: Path) -> None:
    for span in spans(page):
        for word in span.split():
            found = KEY.fullmatch(word)
            if found is None or FILES.fullmatch(found[1]) or "_delete_" in word:
                continue
            parts = found[1].split(".")
            if OF_LIBRARIES & set(parts) or any(part.isupper() for part in parts):
                continue  # capitals stand for a name of the reader's
            value = None if found[2] is None or re.search(r"[A-Z]{2}|\.\.\.", found[2]) else found[2]
            assert has_place(found[1], value), f"no recipe has a place for `{word}`"


@every_page
def test_codes_of_errors_exist(page: Path) -> None:
    """All of a column of codes; elsewhere what looks like a code, but is misspelt."""
    for head, rows in tables(page):
        for place in [place for place, name in enumerate(head) if name.lower() in CODE_COLUMNS]:
            told = {code for row in rows for code in re.findall(r"`([^`]+)`", row[place]) if CODE.fullmatch(code)}
            assert told - set(codes()) == set()
    for span in spans(page):
        if CODE.fullmatch(span) and span not in codes():
            assert not difflib.get_close_matches(span, codes(), n=1, cutoff=0.9), f"`{span}` is no code of an error"
    bracketed = re.findall(r"^error: .*\[([a-z0-9-]+)\]$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(bracketed) <= set(codes())


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "howto"], ids=lambda page: page.name)
def test_means_with_their_spread_are_those_of_the_results(page: Path) -> None:
    """In guides; a tutorial shows what its own commands gave."""
    measured = "\n".join((ROOT / f"docs/background/{name}.md").read_text(encoding="utf-8") for name in MEASURED)
    for number in re.findall(r"\d+\.\d \+- \d+\.\d", page.read_text(encoding="utf-8")):
        assert number in measured, f"{number} is not in docs/background"


def test_a_wrong_key_is_found() -> None:
    assert has_place("model.student.renormalize", "True")
    assert not has_place("model.student.renormalise", "True")


def test_teachers_have_timms_names_licences_and_hub_ids() -> None:
    timm = pytest.importorskip("timm")
    ((_, rows),) = [(head, rows) for head, rows in tables(ROOT / "docs/howto/teacher_files.md") if "licence" in head]
    assert len(rows) >= 25
    for family, name, hub, licence, _ in rows:
        ids = re.findall(r"`([^`]+)`", hub)
        known = [found for found in ids if found.startswith("timm/")]
        network = name.strip("`")
        # the file's own tag, else that of the name, else timm's first
        tagged = next((entry.removeprefix("timm/") for entry in known), network)
        cfg = timm.get_pretrained_cfg(network if "." in network or not known else tagged)
        assert cfg is not None, name
        assert cfg.license == licence, (family, cfg.license)
        own = cfg.hf_hub_id if cfg.hf_hub_id != "timm/" else f"timm/{cfg.architecture}.{cfg.tag}"
        assert known == ([] if own is None else [own]), (family, own)
