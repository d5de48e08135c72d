"""Remedies that messages name, followed literally: what provokes a message, the remedy as it prints it, and now it runs.

Each case is a function of options. The first call fails with the code; the remedy is read out of the message by a pattern, the
options that it names are typed as they stand (``key=value``), and the second call succeeds.
"""

import contextlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tiny_runs import SPARK, tiny, write_images

from hgkd.api.train import load_config, train
from hgkd.cli.main import main as hgkd
from hgkd.cli.make_shapes import main as make_shapes
from hgkd.config.options import option_value
from hgkd.data import LabelledImages
from hgkd.diagnosis.dry_run import dry_run
from hgkd.errors import USER_ERRORS, code_of
from hgkd.export import export
from hgkd.masking import grid_of, visible_count
from hgkd.openmmlab.backbone import TimmBackbone
from hgkd.registry import MODELS
from hgkd.students import SparseUNet

SMALL: dict[str, Any] = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 64}
VIT = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weight files with something to choose or to say about each."""
    folder = tmp_path_factory.mktemp("files")

    def vit(**options):
        return timm.create_model(VIT, num_classes=0, **{**SMALL, **options}).state_dict()

    torch.save(vit(), folder / "plain.pth")
    torch.save(vit(init_values=1e-5), folder / "scaled.pth")
    torch.save(vit(img_size=96), folder / "larger.pth")
    torch.save({"left": vit(), "right": vit()}, folder / "two.pth")
    huge = vit()
    huge["blocks.1.mlp.fc2.bias"] += 1e6
    torch.save(huge, folder / "huge.pth")
    return folder


@dataclass
class Place:
    """What a case has at hand."""

    images: Path
    files: Path
    folder: Path


Run = Callable[[Place, dict[str, Any]], Any]


def teacher(file: str, **given: Any) -> Run:
    """A teacher in a model: the options are those below ``model.teacher``."""

    def run(place: Place, options: dict[str, Any]) -> None:
        own = {key.removeprefix("model.teacher."): value for key, value in options.items()}
        MODELS.build(
            dict(
                type="MaskedDistiller",
                student=dict(type="SparseUNet", encoder="test_resnet", decoder_width=32),
                objectives=dict(hgkd=dict(type="HGKD", supervise="all")),
                mask=dict(type="RandomMask"),
                image_size=64,
                teacher={"type": "TimmTeacher", "name": VIT, "checkpoint": place.files / file, **SMALL, **given, **own},
                _scope_="hgkd",
            )
        ).teacher(torch.rand(2, 3, 64, 64))

    return run


def configured(base: Path = SPARK, steps: bool = False, **given: Any) -> Run:
    """A recipe, built or with ``steps`` dry-run."""

    def run(place: Place, options: dict[str, Any]) -> None:
        cfg = load_config(base, place.folder / "run", options={**tiny(place.images), **given, **options})
        dry_run(cfg) if steps else MODELS.build({"_scope_": "hgkd", **cfg.model})

    return run


def finetuned(**given: Any) -> Run:
    def run(place: Place, options: dict[str, Any]) -> None:
        model = dict(classifier=dict(name="test_resnet"), num_classes=3, image_size=64, type="ClassifierTraining")
        own = {key.removeprefix("model."): value for key, value in options.items()}
        model |= given
        inner = {key.removeprefix("classifier."): own.pop(key) for key in list(own) if key.startswith("classifier.")}
        model["classifier"] = {**model["classifier"], **inner}
        built = MODELS.build({**model, **own, "_scope_": "hgkd"})
        built.set_classes(("a", "b"))

    return run


def made_shapes(place: Place, options: dict[str, Any]) -> None:
    command = [str(place.folder / "shapes"), "--train", "2", "--test", "2", "--image-size", "32", *options]
    (place.folder / "shapes").mkdir(exist_ok=True)
    (place.folder / "shapes/mine.txt").write_text("")
    typed(["make-shapes", *command])


def typed(words: list[str]) -> None:
    """A command; its message as an error."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = hgkd(words)
    if code:
        raise ValueError(said.getvalue())


def trained_twice(place: Place, options: dict[str, Any]) -> None:
    run = place.folder / "twice"
    given = tiny(place.images, epochs=1, warmup_epochs=0, val_train_root=None, val_test_root=None)
    where = place.folder / "another" if "--work-dir" in options else run
    if not run.exists():
        train(SPARK, run, options=given)
    train(SPARK, where, resume="--resume" in options, options={**given, "epochs": 2} if "--resume" in options else given)


def exported_twice(place: Place, options: dict[str, Any]) -> None:
    model = timm.create_model("test_resnet", num_classes=0, global_pool="")
    torch.save(model.state_dict(), place.folder / "net.pth")
    out = place.folder / ("other" if "--out" in options else "out")
    if not out.exists() and not options:
        export(place.folder / "net.pth", out, encoder="test_resnet")
    export(place.folder / "net.pth", out, encoder="test_resnet", force="--force" in options)


def splits(place: Place, options: dict[str, Any]) -> None:
    for split in ("train", "val"):
        if not (place.folder / "photos" / split).exists():
            write_images(place.folder / "photos" / split, each=1)
    LabelledImages(str(options.get("data_root", place.folder / "photos")), image_size=32)


@dataclass
class Case:
    """A message and its remedy.

    Attributes:
        run: fails without options, and runs with those of the remedy.
        remedy: pattern of the remedy in the message; a group 1, where there is one, is the value.
        option: what the value is of, where the message gives the value alone.
        code: of the error; None: it has none.
    """

    run: Run
    remedy: str
    code: str | None
    option: str | None = None


def size_of(text: str) -> int:
    return int(text.split(" x ")[0])


CASES = {
    "allow_random": Case(teacher("plain.pth"), r"set (model\.teacher\.allow_random=True)", "teacher-looks-random"),
    "init_values": Case(
        teacher("scaled.pth", allow_random=True), r"set (model\.teacher\.init_values=[^\s;]+)", "weights-of-another-network"
    ),
    "no init_values": Case(
        teacher("plain.pth", allow_random=True, init_values=1e-5),
        r"set (model\.teacher\.init_values=None)",
        "weights-of-another-network",
    ),
    "img_size": Case(
        teacher("larger.pth", allow_random=True), r"set (model\.teacher\.img_size=\d+)", "weights-of-another-network"
    ),
    "entry": Case(teacher("two.pth", allow_random=True), r"set (model\.teacher\.entry=\w+)", "several-sets-of-weights"),
    "dtype": Case(
        teacher("huge.pth", allow_random=True, dtype="float16"), r"set (model\.teacher\.dtype=\w+)", "teacher-not-finite"
    ),
    "supervise": Case(
        configured(**{"model.objectives.pixels.supervise": "masked", "model.mask.mask_ratio": 0.0}, steps=True),
        r"use (supervise='all')",
        "nothing-supervised",
        "model.objectives.pixels.supervise",
    ),
    "drop_last": Case(
        configured(steps=True, batch_size=3, **{"model.mask.mask_ratio": 0.75, "train_dataloader.drop_last": False}),
        r"Set (train_dataloader\.drop_last=True)",
        "last-batch-too-small",
    ),
    "warmup_epochs": Case(configured(epochs=1, warmup_epochs=2), r"set (warmup_epochs=0)", "warmup-too-long"),
    "mask_ratio": Case(
        lambda place, options: visible_count(2, 2, options.get("mask_ratio", 0.99)),
        r"use at most ([\d.]+),",
        "mask-ratio-too-high",
        "mask_ratio",
    ),
    "image_size, the lower": Case(
        lambda place, options: grid_of((size_of(str(options.get("image_size", "100"))),) * 2, 32),
        r"nearest sizes that are: (\d+ x \d+)",
        "image-size-not-divided",
        "image_size",
    ),
    "image_size, the higher": Case(
        lambda place, options: grid_of((size_of(str(options.get("image_size", "100"))),) * 2, 32),
        r"nearest sizes that are: .* or (\d+ x \d+)",
        "image-size-not-divided",
        "image_size",
    ),
    "cell": Case(
        lambda place, options: SparseUNet("test_resnet", cell=options.get("cell", 40)),
        r"nearest that are: (\d+)",
        "cell-not-divided",
        "cell",
    ),
    "out_stride": Case(
        lambda place, options: SparseUNet("test_resnet", out_stride=options.get("out_stride", 12)),
        r"allowed: .*?, (\d+),",
        "out-stride-not-reached",
        "out_stride",
    ),
    "a name": Case(configured(student="test_resnte"), r"did you mean '(\w+)'", None, "student"),
    "a key": Case(
        lambda place, options: configured(**(options or {"epoch": 2}))(place, {}), r"did you mean '(epochs)'", None, "epochs=2"
    ),
    "num_classes": Case(finetuned(), r"set (num_classes=2)", "classes-differ"),
    "drop_path": Case(
        finetuned(classifier=dict(name="vgg11", drop_path=0.1), num_classes=2),
        r"set (model\.classifier\.drop_path=0)",
        None,
    ),
    "data_root": Case(splits, r"set data_root to one of them, e\.g\. (\S+)", "splits-as-classes", "data_root"),
    "--resume": Case(trained_twice, r"Continue it with (--resume)", "work-folder-in-use"),
    "--work-dir": Case(trained_twice, r"another folder with (--work-dir)", "work-folder-in-use"),
    "--force of an export": Case(exported_twice, r"or (--force) to replace", "folder-not-empty"),
    "--out of an export": Case(exported_twice, r"choose another (--out)", "folder-not-empty"),
    "--force of shapes": Case(made_shapes, r"or (--force) to write", None),
    "out_indices": Case(
        lambda place, options: TimmBackbone("test_resnet", out_indices=(int(options.get("out_indices", 9)),)),
        r"must be among 0 \.\. (\d+)",
        "out-indices-absent",
        "out_indices",
    ),
    "frozen_stages": Case(
        lambda place, options: TimmBackbone("test_resnet", frozen_stages=int(options.get("frozen_stages", -1))),
        r"; (0) freezes nothing",
        "frozen-stages-absent",
        "frozen_stages",
    ),
}


def options_of(case: Case, found: str) -> dict[str, Any]:
    if found.startswith("--"):
        return {found: True}
    if case.option is not None and "=" in case.option:  # the name alone was wrong
        found = case.option
    key, equals, value = found.rpartition("=")
    key = case.option if case.option is not None and "=" not in case.option else key
    return {key: option_value(key, value if equals else found)}


@pytest.mark.parametrize("name", CASES)
def test_a_remedy_that_is_followed_literally_serves(name, images, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case, place = CASES[name], Place(images, files, tmp_path)
    with pytest.raises(USER_ERRORS) as caught:
        case.run(place, {})
    message = " ".join(str(caught.value).split())
    assert code_of(caught.value) == case.code, message
    remedy = re.search(case.remedy, message)
    assert remedy is not None, message
    case.run(place, options_of(case, remedy[1]))


def test_codes_are_shown_with_and_without_debug(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("")
    command = [str(tmp_path), "--train", "2", "--test", "2"]
    assert make_shapes(command) == 2
    assert "[folder-not-empty]\n" in capsys.readouterr().err
    with pytest.raises(FileExistsError):
        make_shapes([*command, "--debug"])
    assert "error code: folder-not-empty" in capsys.readouterr().err
