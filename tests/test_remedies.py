"""Remedies that messages name, followed literally: what provokes a message, the remedy as it prints it, and now it runs.

Each case is a function of options. The first call fails with the code; the remedy is read out of the message by a pattern, the
options that it names are typed as they stand (``key=value``), and the second call succeeds.
"""

import contextlib
import importlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from mmengine.optim import build_optim_wrapper
from PIL import Image
from refusals import refused
from student_checkpoints import write_student
from tiny_runs import SPARK, tiny, write_images

from hgkd.api.compare import read_plan
from hgkd.api.train import load_config, train
from hgkd.cli.main import main as hgkd
from hgkd.cli.make_shapes import main as make_shapes
from hgkd.config.options import option_value
from hgkd.data import LabelledImages, UnlabelledImages
from hgkd.data.pixels import as_value_range, measure, open_image, warnings_of
from hgkd.data.transforms import augment_transform
from hgkd.diagnosis.dry_run import dry_run
from hgkd.distillers import MAEPretraining
from hgkd.errors import USER_ERRORS, InvalidValueError, code_of
from hgkd.evaluation.records import check_outputs
from hgkd.export import export
from hgkd.masking import grid_of, visible_count
from hgkd.mmcv_ops import register_ops
from hgkd.networks.backbones import load_backbone
from hgkd.networks.classifier import ImageClassifier
from hgkd.networks.encoder import build_encoder
from hgkd.networks.mae import MaskedAutoencoder, make_arch, save_mae
from hgkd.objectives import HGKD
from hgkd.objectives.generation import MGDLoss
from hgkd.openmmlab.backbone import TimmBackbone
from hgkd.openmmlab.data_checks.checks import _check_heads, _check_padding, _check_palette, _check_workers
from hgkd.openmmlab.measures import check_all_measured, check_coco_metric
from hgkd.openmmlab.weights import check_start
from hgkd.pixels import check_pixels
from hgkd.registry import MODELS
from hgkd.sparse import save_sparse, sparsify
from hgkd.students import MaskedViT, SparseUNet
from hgkd.teachers.classifier import ClassifierTeacher
from hgkd.training.optim import check_optim_config
from hgkd.weights.export_folder import read_spec

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
    if code == 2:  # as a user reads it: the text with the code at its end
        text, _, told = said.getvalue().partition("\n")[0].rpartition(" [")
        raise InvalidValueError(told.removesuffix("]"), text)


def called(function: Callable[..., Any], *arguments: Any, **given: Any) -> Run:
    """A function or class, with keywords that options replace; of a dotted path the last part is the keyword."""

    def run(place: Place, options: dict[str, Any]) -> None:
        function(*arguments, **given | {key.rpartition(".")[2]: value for key, value in options.items()})

    return run


def written_twice(write: Callable[..., Any], make: Callable[[], Any], name: str) -> Run:
    def run(place: Place, options: dict[str, Any]) -> None:
        if not options:
            write(make(), place.folder / name)
        write(make(), place.folder / name, **options)

    return run


def optimised(place: Place, options: dict[str, Any]) -> None:
    own = {key.removeprefix("optim_wrapper."): value for key, value in options.items()}
    made = dict(type="OptimWrapper", constructor="hgkd.DecayGroupsConstructor", paramwise_cfg=dict(norm_decay_mult=0.0))
    build_optim_wrapper(torch.nn.Linear(2, 2), {**made, "optimizer": dict(type="SGD", lr=0.1, weight_decay=0.05), **own})


def listed(place: Place, options: dict[str, Any]) -> None:
    inside = place.folder / "inside"
    inside.mkdir(exist_ok=True)
    (place.folder / "list.txt").write_text(f"{sorted(place.images.rglob('*.png'))[0]}\n")
    UnlabelledImages(str(options.get("data_root", inside)), list_file=str(place.folder / "list.txt"), image_size=32)


def exported(place: Place, **options: Any) -> Path:
    """An export of a small network, made once."""
    model = timm.create_model("test_resnet", num_classes=0, global_pool="")
    torch.save(model.state_dict(), place.folder / "net.pth")
    out = place.folder / ("-".join(map(str, options.values())) or "exported")
    if not out.exists():
        export(place.folder / "net.pth", out, encoder="test_resnet", **options)
    return out


def licensed(place: Place, options: dict[str, Any]) -> None:
    given = [f"{key}={value}" for key, value in options.items()] or ["apache-2.0"]
    torch.save(timm.create_model("test_resnet", num_classes=0, global_pool="").state_dict(), place.folder / "net.pth")
    out = str(place.folder / "out")
    typed(["export", str(place.folder / "net.pth"), "--encoder", "test_resnet", "--out", out, "--licence", *given])


def two_networks(place: Place, options: dict[str, Any]) -> None:
    own = timm.create_model("test_resnet", num_classes=0, global_pool="").state_dict()
    torch.save({f"{part}.{key}": value for part in ("left", "right") for key, value in own.items()}, place.folder / "both.pth")
    load_backbone(place.folder / "both.pth", "test_resnet", **options)


def examined_mae(place: Place, options: dict[str, Any]) -> None:
    if not (place.folder / "mae.safetensors").exists():
        save_mae(small_mae(), place.folder / "mae.safetensors")
    typed(["doctor", "teacher", str(place.folder / "mae.safetensors"), *([] if options else ["--name", VIT])])


def small_mae() -> MaskedAutoencoder:
    arch = dict(embed_dim=32, depth=2, num_heads=2, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    return MaskedAutoencoder(make_arch(arch, image_size=(32, 32)))


def other_stem(place: Place, options: dict[str, Any]) -> None:
    small = dict(layers=(1, 1, 1, 1), channels=(8, 12, 16, 24))
    encoder = build_encoder("resnet18", stem="cifar", **small)
    write_student(place.folder / "cifar.pth", "resnet18", "cifar", small, encoder)
    own = {key.removeprefix("model.classifier."): value for key, value in options.items()}
    ImageClassifier("resnet18", 3, 64, backbone=place.folder / "cifar.pth", **small, **own)


def mae_teacher(place: Place, options: dict[str, Any]) -> None:
    save_mae(small_mae(), place.folder / "mae.safetensors", overwrite=True)
    kind = str(options.get("type", "TimmTeacher"))
    own = {} if options else dict(name=VIT, **SMALL)
    MODELS.build(dict(_scope_="hgkd", type=kind, checkpoint=str(place.folder / "mae.safetensors"), allow_random=True, **own))


def written_elsewhere(place: Place, options: dict[str, Any]) -> None:
    (place.folder / "mine.csv").write_text("a,b\n1,2\n")
    check_outputs(None, place.folder / ("another.csv" if "--csv" in options else "mine.csv"))


def exported_onto(name: str) -> Run:
    """An export, forced, to a place that holds something of the user's."""

    def run(place: Place, options: dict[str, Any]) -> None:
        (place.folder / "folder").mkdir(exist_ok=True)
        for file in ("file", "folder/thesis.tex"):
            (place.folder / file).write_text("mine")
        torch.save(timm.create_model("test_resnet", num_classes=0, global_pool="").state_dict(), place.folder / "net.pth")
        out = place.folder / ("another" if "--out" in options else name)
        export(place.folder / "net.pth", out, encoder="test_resnet", force=True)

    return run


def fast_backend(place: Place, options: dict[str, Any]) -> None:
    if find_spec("spconv"):
        pytest.skip("spconv is installed")
    sparsify(torch.nn.Conv2d(3, 4, 3, padding=1), 8, backend=str(options.get("backend", "spconv")))


def planned(place: Place, options: dict[str, Any]) -> None:
    (place.folder / "plan.py").write_text(
        "evaluate = dict(methods=['knn'], train='{data}', test='{data}')\nrows = [dict(name='mine', backbone='resnet18')]\n"
    )
    read_plan(place.folder / "plan.py", {key[len("--set ") : -1]: str(place.images) for key in options})


def downstream_backbone(kind: str, **given: Any) -> Run:
    """A backbone of mmdet's or one of ours in a detector, which starts from random weights."""

    def run(place: Place, options: dict[str, Any]) -> None:
        if kind == "ResNet":
            pytest.importorskip("mmdet")
            register_ops()
            check_start(importlib.import_module("mmdet.models.backbones").ResNet(18, **given | options))
        else:
            check_start(TimmBackbone("test_resnet", **given | options))

    return run


def checked(check: Callable[..., Any], key: str, *behind: Any, **given: Any) -> Run:
    """A part of a detection or segmentation config, of which ``given`` is at the dotted place ``key``."""

    def run(place: Place, options: dict[str, Any]) -> None:
        check(given | {path.removeprefix(f"{key}."): value for path, value in options.items()}, *behind)

    return run


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
        remedy: pattern of the remedy in the message; its groups are what is typed.
        option: what the value is of, where the message gives the value alone.
        code: of the error.
    """

    run: Run
    remedy: str
    code: str
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
        r"((?:model\.objectives\.pixels\.)?supervise='all')",
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
    "a name": Case(
        finetuned(classifier=dict(name="test_resnte"), num_classes=2),
        r"did you mean '(\w+)'",
        "timm-name-unknown",
        "model.classifier.name",
    ),
    "a key": Case(
        lambda place, options: configured(**(options or {"epoch": 2}))(place, {}),
        r"did you mean '(epochs)'",
        "config-key-unknown",
        "epochs=2",
    ),
    "num_classes": Case(finetuned(), r"set (num_classes=2)", "classes-differ"),
    "drop_path": Case(
        finetuned(classifier=dict(name="vgg11", drop_path=0.1), num_classes=2),
        r"set (model\.classifier\.drop_path=0)",
        "timm-option-refused",
    ),
    "data_root": Case(splits, r"set data_root to one of them, e\.g\. (\S+)", "splits-as-classes", "data_root"),
    "--resume": Case(trained_twice, r"Continue it with (--resume)", "work-folder-in-use"),
    "--work-dir": Case(trained_twice, r"another folder with (--work-dir)", "work-folder-in-use"),
    "--force of an export": Case(exported_twice, r"or (--force) to replace", "folder-not-empty"),
    "--out of an export": Case(exported_twice, r"choose another (--out)", "folder-not-empty"),
    "--force of shapes": Case(made_shapes, r"or (--force) to write", "folder-not-empty"),
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
    "target, for a block of the decoder": Case(
        called(HGKD, decoder_block=1), r"use (target='inferred')", "decoder-block-without-use"
    ),
    "target, for several blocks": Case(
        called(HGKD, target="inferred", block=(0, 1)), r"need (target='full')", "blocks-need-full-target"
    ),
    "target, for centred ones": Case(
        called(HGKD, target="inferred", centre=True), r"needs (target='full')", "centre-needs-full-target"
    ),
    "alpha": Case(called(MGDLoss, 8, 8, reduction="mean", alpha=2e-5), r"near 1, use ([\d.]+)", "alpha-of-sum", "alpha"),
    "decoder_depth": Case(
        lambda place, options: MaskedViT(dict(base="tiny", decoder_depth=0) | options),
        r"set it to at least (\d)",
        "decoder-missing",
        "decoder_depth",
    ),
    "mask_ratio, a number": Case(
        called(visible_count, 4, 4, mask_ratio="much"), r"write e\.g\. ([\d.]+)", "mask-ratio-not-a-number", "mask_ratio"
    ),
    "mask_ratio of a MAE": Case(
        called(MAEPretraining, "tiny", 32, mask_ratio=0.0), r"MAE's own is ([\d.]+)", "mask-ratio-hides-nothing", "mask_ratio"
    ),
    "auto_augment": Case(
        called(augment_transform, 32, auto_augment="rend-m9"),
        r"e\.g\. '(rand[^']+)'",
        "augmentation-policy-unknown",
        "auto_augment",
    ),
    "divided pixels": Case(
        lambda place, options: check_pixels(*np.divide([[124, 116, 104], [58, 57, 57]], options.get("by", 1)), "normalize"),
        r"divide by (\d+)",
        "pixels-of-255",
        "by",
    ),
    "overwrite a MAE": Case(written_twice(save_mae, small_mae, "mae.safetensors"), r"or (overwrite=True)", "file-exists"),
    "overwrite a sparse network": Case(
        written_twice(save_sparse, lambda: sparsify(torch.nn.Conv2d(3, 4, 3, padding=1), 8), "sparse.safetensors"),
        r"pass (overwrite=True)",
        "file-exists",
    ),
    "constructor": Case(
        optimised, r"set (optim_wrapper\.constructor='DefaultOptimWrapperConstructor')", "paramwise-cfg-refused"
    ),
    "clip_grad": Case(
        lambda place, options: check_optim_config(dict(clip_grad=dict(max_norm=0.0)) | options),
        r"; (clip_grad=None) does",
        "clip-grad-not-positive",
    ),
    "data_root of a list": Case(listed, r"\((data_root=/) allows", "listed-path-leaves-root"),
    "student": Case(
        lambda place, options: ImageClassifier(str(options.get("student", "resnet18")), 3, 64, backbone=exported(place)),
        r"set (student=\w+)",
        "network-differs",
    ),
    "backbone_only": Case(
        lambda place, options: ClassifierTeacher(
            exported(place).parent / "net.pth", "test_resnet", 64, allow_random=True, backbone_only=bool(options)
        ),
        r"set (model\.teacher\.backbone_only=True)",
        "teacher-without-classifier",
    ),
    "--to of an export": Case(
        lambda place, options: read_spec(exported(place) if "--to timm" in options else exported(place, to="torchscript")),
        r"again with (--to timm)",
        "export-of-another-target",
    ),
    "--licence": Case(licensed, r"e\.g\. (weights=apache-2\.0)", "licence-not-a-pair"),
    "prefix": Case(two_networks, r"under '([^']+)'.*; name one with prefix=", "network-found-several-times", "prefix"),
    "--name of a MAE": Case(examined_mae, r"leave (--name) out", "name-not-needed"),
    "stem": Case(other_stem, r"set (model\.classifier\.stem=cifar)", "stem-differs"),
    "type of a teacher": Case(mae_teacher, r"load it with (type='MAETeacher')", "mae-with-decoder"),
    "--csv": Case(written_elsewhere, r"give (--csv) another file", "csv-columns-differ"),
    "--out, not a file": Case(exported_onto("file"), r"choose another (--out)", "output-is-a-file"),
    "--out, not a folder of yours": Case(exported_onto("folder"), r"choose another (--out)", "force-on-other-things"),
    "backend": Case(fast_backend, r"or use (backend='gather')", "spconv-missing"),
    "--set": Case(planned, r": (--set data=)\.\.\.", "plan-value-missing"),
    "frozen_stages of mmdet's": Case(
        downstream_backbone("ResNet", norm_eval=True, frozen_stages=1),
        r"(frozen_stages=-1) .* and (norm_eval=False)",
        "random-weights-frozen",
    ),
    "frozen_stages of ours": Case(
        downstream_backbone("TimmBackbone", norm_eval=True, frozen_stages=1),
        r"hgkd\.TimmBackbone: (0)\) and (norm_eval=False)",
        "random-weights-frozen",
        "frozen_stages",
    ),
    "palette": Case(
        lambda place, options: _check_palette(
            dict(metainfo=dict(palette=options.get("palette", "red"))), 2, "train_dataloader"
        ),
        r"set it to (\[\]) for",
        "palette-not-colours",
        "palette",
    ),
    "seg_pad_val": Case(
        checked(_check_padding, "model.data_preprocessor", {"ignore_index": 255}, 3, size=(32, 32), seg_pad_val=7),
        r"set (model\.data_preprocessor\.seg_pad_val=255)",
        "padding-value-not-ignored",
    ),
    "drop_last of a validation": Case(
        checked(_check_workers, "", "val_dataloader", drop_last=True),
        r"set it to (False)",
        "test-loader-drops-images",
        "drop_last",
    ),
    "persistent_workers": Case(
        checked(_check_workers, "val_dataloader", "val_dataloader", persistent_workers=True),
        r"set (val_dataloader\.persistent_workers=False)",
        "persistent-without-workers",
    ),
    "num_classes of a head": Case(
        lambda place, options: _check_heads({"model.bbox_head": int(next(iter(options.values()), 80))}, ("a", "b"), "train"),
        r"set (model\.bbox_head\.num_classes=2)",
        "head-classes-differ",
    ),
    "metric": Case(
        checked(check_coco_metric, "val_evaluator", {}, "val_evaluator", metric=["bbox", "segm"]),
        r"set (val_evaluator\.metric='bbox')",
        "metric-needs-masks",
    ),
    "test_mode": Case(
        checked(check_all_measured, "", {"ann_file": "a.json"}, "val_dataloader", filter_cfg=dict(filter_empty_gt=True)),
        r"set (test_mode=True)",
        "filter-leaves-images-out",
    ),
}


def options_of(case: Case, found: str) -> dict[str, Any]:
    if found.startswith("--"):
        return {found: True}
    if case.option is not None and "=" in case.option:  # the name alone was wrong
        found = case.option
    key, equals, value = found.rpartition("=")
    if case.option is not None and "=" not in case.option and (not equals or case.option.endswith(key)):
        key = case.option
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
    case.run(place, {key: value for found in remedy.groups() for key, value in options_of(case, found).items()})


def test_commands_that_a_message_names_are_typed_as_they_stand(files, tmp_path, monkeypatch, capsys):
    """``hgkd doctor extract`` of one set of weights; ``hgkd doctor teacher`` of a file that looks random."""
    monkeypatch.chdir(tmp_path)
    place = Place(files, files, tmp_path)
    with refused(ValueError, "several-sets-of-weights") as caught:
        teacher("two.pth", allow_random=True)(place, {})
    command = re.search(r"hgkd (doctor extract \S+ \S+ \S+)", str(caught.value))
    assert command is not None
    typed(command[1].split())
    teacher(str(tmp_path / "OUT.safetensors"), allow_random=True)(place, {})

    with refused(ValueError, "teacher-looks-random") as caught:
        teacher("plain.pth")(place, {})
    command = re.search(r"hgkd (doctor teacher)", str(caught.value))
    assert command is not None
    capsys.readouterr()
    assert hgkd([*command[1].split(), str(files / "plain.pth")]) == 1
    assert "random" in capsys.readouterr().out


def test_the_value_range_that_a_remark_names_ends_it(tmp_path):
    values = np.linspace(100, 4000, 64 * 64, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(values).save(tmp_path / "deep.png")
    with open_image(tmp_path / "deep.png") as file:
        measured = [measure(file)]
    (told,) = warnings_of(measured, None, True)
    remedy = re.search(r"value_range=(\[.*\])", told)
    assert remedy is not None
    value_range = as_value_range(option_value("value_range", remedy[1]))
    assert value_range == (100, 4000)
    assert warnings_of(measured, value_range, True) == []


def test_codes_are_shown_with_and_without_debug(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("")
    command = [str(tmp_path), "--train", "2", "--test", "2"]
    assert make_shapes(command) == 2
    assert "[folder-not-empty]\n" in capsys.readouterr().err
    with pytest.raises(FileExistsError):
        make_shapes([*command, "--debug"])
    assert "error code: folder-not-empty" in capsys.readouterr().err
