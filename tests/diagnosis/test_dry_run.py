"""``train.py --dry-run``: every kind of student, a teacher whose features are not finite, and epochs that end badly."""

import pytest
import torch
from refusals import refused
from tiny_runs import HGKD, ROOT, SPARK, tiny, tiny_hgkd, write_images

from hgkd.api import train as train_tool
from hgkd.cli import train as train_command
from hgkd.config import read_config
from hgkd.diagnosis.dry_run import dry_run
from hgkd.errors import DivergedError
from hgkd.networks.mae import MaskedAutoencoder, make_arch, save_mae

CONFIGS = ROOT / "configs"
NARROW = dict(embed_dim=16, num_heads=2, decoder_embed_dim=16, decoder_num_heads=2)


VIT_STUDENTS = [
    path
    for path in sorted(CONFIGS.glob("*/*vit*"))
    if path.parent.name not in ("_base_", "comparisons")
    and read_config(path).model.get("student", {}).get("type") == "MaskedViT"
]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def mae_file(tmp_path_factory):
    # as deep as the deepest that a recipe taps
    network = MaskedAutoencoder(make_arch(dict(depth=24, decoder_depth=8, **NARROW)))
    return str(save_mae(network, tmp_path_factory.mktemp("mae") / "teacher.safetensors"))


def test_there_are_recipes_with_vit_students():
    assert len(VIT_STUDENTS) >= 4


@pytest.mark.parametrize("path", VIT_STUDENTS, ids=lambda path: path.stem)
def test_recipes_with_vit_students(path, images, mae_file):
    teacher = {"teacher_checkpoint": mae_file}
    if read_config(path).model.teacher.type == "TimmTeacher":
        teacher = {"model.teacher": {"allow_random": True, "depth": 12, "embed_dim": 32, "num_heads": 2}}
    else:
        teacher["model.teacher.allow_random"] = True
    options = {
        "data_root": str(images),
        "val_train_root": None,
        "val_test_root": None,
        "workers": 0,
        "batch_size": 2,
        "epochs": 1,
        "model.student.arch": {"_delete_": True, "depth": 12, "decoder_depth": 4, **NARROW},
        **teacher,
    }
    report = dry_run(train_tool.load_config(path, "run", options=options))
    assert "MaskedViT: 0.0" in report
    assert "features 16 at stride 16 (12 blocks)" in report
    assert "finite       yes" in report


def test_a_teacher_that_overflows_is_named_and_the_exit_code_is_2(images, capsys, monkeypatch):
    import hgkd.teachers.vit as module

    build = module.TimmTeacher.freeze

    def overflowing(self):
        build(self)
        with torch.no_grad():
            self.network.blocks[0].mlp.fc2.bias.fill_(6e4)  # a number of float16, whose double is none
            self.network.blocks[1].mlp.fc2.bias.fill_(6e4)

    monkeypatch.setattr(module.TimmTeacher, "freeze", overflowing)
    options = tiny_hgkd(images, **{"model.teacher.dtype": "float16"})
    arguments = [f"{key}={value}" for key, value in options.items()]
    assert train_command.main([str(HGKD), "--dry-run", "--work-dir", "run", "--cfg-options", *arguments]) == 2
    error = capsys.readouterr().err
    assert "the teacher's block 1 (blocks.1) gives inf in float16 on the first images" in error
    assert "set model.teacher.dtype=bfloat16, or float32" in error
    # the first remedy
    options["model.teacher.dtype"] = "bfloat16"
    assert "finite" in dry_run(train_tool.load_config(HGKD, "run", options=options))


def test_a_student_that_is_not_finite_is_named(images, monkeypatch):
    import hgkd.distillers.masked as module

    prepare = module.MaskedDistiller._prepare

    def broken(self, *given):
        prepare(self, *given)
        with torch.no_grad():
            self.student.encoder.layer1[0].conv1.weight.fill_(float("nan"))

    monkeypatch.setattr(module.MaskedDistiller, "_prepare", broken)
    cfg = train_tool.load_config(SPARK, "run", options=tiny(images))
    with refused(DivergedError, "step-not-finite", "1", "student.encoder.layer1.0.conv1"):
        dry_run(cfg)


def test_accumulated_steps_are_no_failure(images):
    cfg = train_tool.load_config(SPARK, "run", options=tiny(images, **{"optim_wrapper.accumulative_counts": 4}))
    assert "4 accumulated = 32 an update" in dry_run(cfg)


def test_an_epoch_that_ends_with_too_small_a_batch(images):
    options = {
        "data_root": str(images),
        "val_root": str(images),
        "num_classes": 2,
        "student": "resnet10t",
        "image_size": 32,
        "workers": 0,
        "batch_size": 15,  # of 16 images
        "epochs": 1,
        "train_dataloader.drop_last": False,
    }
    recipe = ROOT / "downstream/classification/resnet18_10e_cifar128.py"
    with refused(ValueError, "last-batch-too-small", "1", "15", "drop_last=True"):
        dry_run(train_tool.load_config(recipe, "run", options=options))
    for remedy in ({"train_dataloader.drop_last": True}, {"batch_size": 8}):
        dry_run(train_tool.load_config(recipe, "run", options=options | remedy))
