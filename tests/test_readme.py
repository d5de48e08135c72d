"""What the README prints runs as it stands: its Python examples, and every ``hgkd ...`` in its order.

Commands keep their words; options are appended that make networks thin and runs short. The names in them (``DIR``,
``~/photos``) are folders of the test.
"""

import argparse
import importlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch
from downstream_runs import need
from small_models import write_ade20k, write_coco_2017
from tiny_commands import readers_folder, run_command
from tiny_runs import ROOT, load_tool, write_images

from hgkd.api.train import load_config

README = ROOT / "README.md"


def commands(page: Path) -> list[list[str]]:
    """Every ``hgkd ...`` of a page, in a block or within a sentence, as words: the command first."""
    text = re.sub(r" *\\\n\s*", " ", page.read_text())  # a command goes on after a backslash
    blocks = [line.removeprefix("$").strip() for line in text.splitlines() if line.startswith(("    ", "$ "))]
    spans = [span.replace("\n", " ") for span in re.findall(r"`(hgkd [^`]*)`", text)]
    # not those that are named without their arguments, or described
    whole = re.compile(r"hgkd [a-z-]+ (?!--\w+ [a-z]+$)(?!\w+$(?<=[a-z]))[^\[]*")
    return [shlex.split(line, comments=True)[1:] for line in (*blocks, *spans) if whole.fullmatch(line) and " ..." not in line]


def indented_examples(page: Path) -> list[str]:
    """The indented blocks of a page that are Python."""
    blocks = re.findall(r"(?:^ {4}.*\n)+", page.read_text(), flags=re.MULTILINE)
    return [re.sub(r"^ {4}", "", block, flags=re.MULTILINE) for block in blocks if block.startswith(("    import", "    from"))]


def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["dense"].shape == (2, 512, 4, 4)
    assert type(names["same"]) is torch.Tensor
    hidden = ~names["visible"][:, None].expand_as(names["dense"])
    assert not names["dense"][hidden].any()
    assert type(names["again_features"]) is type(names["features"])


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder like the reader's: photographs, labelled images, data sets, the teacher's file, and the repository's parts."""
    readers_folder(tmp_path, monkeypatch)
    for split in ("train", "val", "test"):
        write_images(tmp_path / "DIR" / split, classes=[f"class{number}" for number in range(7)], each=3)
    return tmp_path


@pytest.mark.slow
def test_commands_run(place, capsys):
    need("mmdet", "mmseg")
    write_coco_2017(place / "home/coco")
    write_ade20k(place / "home/ade20k")
    found = commands(README)
    assert len(found) >= 7
    assert {words[0] for words in found} >= {"train", "export", "evaluate", "compare"}
    for words in found:
        if "--help" in words:
            with pytest.raises(SystemExit) as end:
                run_command(words)
            assert end.value.code == 0
        else:
            assert run_command(words) == 0, f"{' '.join(words)}\n{capsys.readouterr().err[-3000:]}"
        if words[0] == "export":
            (example,) = [text for text in indented_examples(README) if "import hgkd" not in text]
            exec(compile(example, "README.md", "exec"), {})  # of what has just been written


def test_the_jobs_in_python_have_these_arguments(monkeypatch):
    (example,) = [text for text in indented_examples(README) if "import hgkd" in text]
    called = []
    for place in ("hgkd.api.train.train", "hgkd.export.export", "hgkd.api.evaluate.evaluate"):
        module, _, name = place.rpartition(".")
        real = getattr(importlib.import_module(module), name)
        double = mock.create_autospec(real, side_effect=lambda *args, name=name, **options: called.append(name))
        monkeypatch.setattr(place, double)
    exec(compile(example, "README.md", "exec"), {})
    assert called == ["train", "export", "evaluate"]


PAGES = sorted(
    page
    for folder in ("docs", "configs", "downstream")
    for page in (ROOT / folder).rglob("*.md")
    # tutorials are run as a whole, by tests/docs; a site that was built holds copies
    if page.stem != "field_cases" and page.parent.name != "tutorials" and "_build" not in page.parts
)
COMMANDS = [(page, words) for page in (README, *PAGES) for words in commands(page) if "--help" not in words]


class Understood(Exception):
    """Raised in place of the work, with the parsed arguments."""


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{page.stem}-{words[0]}" for page, words in COMMANDS])
def test_commands_of_all_pages_are_understood(page, words, monkeypatch):
    """Their options exist, and so do the config files and their keys; the files are the reader's."""

    def parse(parser, *args, parse=argparse.ArgumentParser.parse_args, **options):
        raise Understood(parse(parser, *args, **options))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    # a variable of the shell holds options, a single letter stands for a number; the GPU is the reader's
    words = ["cpu" if word == "cuda" else word for word in words]
    words = ["epochs=8" if word.startswith("$") else re.sub(r"^[A-Z]$", "1", word) for word in words]
    with pytest.raises(Understood) as found:
        load_tool(words[0].replace("-", "_")).main(words[1:])
    (args,) = found.value.args
    config = getattr(args, "config", None)
    if config and "/" in config:
        load_config(config, options=args.cfg_options)


def test_targets_of_make():
    if shutil.which("make") is None:
        pytest.skip("no make")
    targets = re.findall(r"^    make (\w+)", README.read_text(), flags=re.MULTILINE)
    assert targets == ["demo", "test"]
    done = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
