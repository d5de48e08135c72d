"""Parts of a user's own, in a module beside a config outside the repository: trained, pictured, dry-run, exported."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused
from safetensors.torch import load_file
from tiny_runs import BLOCKS, HGKD, ROOT, SPARK, tiny, write_images

from hgkd.api.train import load_config, train
from hgkd.diagnosis.dry_run import dry_run
from hgkd.errors import WeightsError
from hgkd.export import export, load_backbone
from hgkd.weights.files import read_checkpoint

OWN = Path(__file__).with_name("own_parts.py")
FINETUNING = ROOT / "downstream/classification/resnet18_10e_cifar128.py"
IMPORTS = "custom_imports = dict(imports=['own_parts_of_a_user'])\n"
TEACHER = "model.teacher"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A user's folder: a module, and configs beside it. Nothing of it is on Python's path."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copy(OWN, folder / "own_parts_of_a_user.py")
    yield folder
    sys.path.remove(str(folder))


def config(home, name, base, text=""):
    (home / f"{name}.py").write_text(f"_base_ = {str(base)!r}\n{IMPORTS}{text}")
    return home / f"{name}.py"


PARTS = {
    "masked objective": (HGKD, "model = dict(objectives=dict(_delete_=True, own=dict(type='MeanToken')))\n"),
    "objective with pictures": (
        HGKD,
        "model = dict(objectives=dict(_delete_=True, own=dict(type='VisibleTokens', weight=2.0)))\n",
    ),
    "teacher": (HGKD, ""),
    "student": (SPARK, "model = dict(student=dict(_delete_=True, type='OneLevel'))\n"),
    "student and teacher": (HGKD, "model = dict(student=dict(_delete_=True, type='OneLevel', width=8))\n"),
    "mask generator": (SPARK, "model = dict(mask=dict(_delete_=True, type='CentreMask', mask_ratio=0.5))\n"),
    "mask generator, two masks": (
        SPARK,
        "model = dict(mask=dict(_delete_=True, type='CentreMask', mask_ratio=0.5), masks_per_image=2)\n",
    ),
    "data reader": (
        SPARK,
        "train_dataloader = dict(dataset=dict(_delete_=True, type='FrameStack', transform=dict(hflip=0.5)))\n",
    ),
    "layer rule": (SPARK, "student = 'gated_resnet'\n"),
    "encoder": (HGKD, "student = 'Towers'\nmodel = dict(student=dict(encoder_kwargs=dict(width=4)))\n"),
}
HOOKS = """
custom_hooks = [
    dict(type="VisualizationHook", num_images=2),
    dict(type="TermShareHook", interval=1),
    dict(type="MaskScheduleHook"),
]
"""


def run_options(part, images):
    options = tiny(images, epochs=1, warmup_epochs=0)
    if "student" in part or part in ("layer rule", "encoder"):
        options.pop("student")
    if "student" in part:
        options.pop("model.student.decoder_width")
    if part == "data reader":
        options["data_root"] = str(frames(images))
    return options


def frames(images):
    """The images as one array, beside their folder."""
    file = images.parent / "frames.npy"
    np.save(file, np.stack([np.asarray(Image.open(path)) for path in sorted(images.rglob("*.png"))]))
    return file


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_users_own_trains_is_pictured_and_dry_runs(part, home, images, tmp_path):
    base, text = PARTS[part]
    if base is HGKD:
        text += "model = {**globals().get('model', {}), 'teacher': dict(_delete_=True, type='PatchTeacher')}\n"
    path = config(home, part.replace(" ", "_"), base, text + HOOKS)
    options = run_options(part, images)
    if base is HGKD:
        options |= {"teacher_features": None}
        options |= {} if "objective" in part else BLOCKS
    report = dry_run(load_config(path, tmp_path / "dry", options=options))
    assert "finite" in report
    runner = train(path, tmp_path / "run", options=options)
    assert runner.iter == 2
    assert (tmp_path / "run/pictures/epoch_1.png").is_file()
    shares = [key for key in runner.message_hub.log_scalars if key.endswith("_share") and "teacher" not in key]
    assert shares
    checkpoint = read_checkpoint(tmp_path / "run/epoch_1.pth")
    assert not any("teacher" in name for name in checkpoint["state_dict"])
    resumed = train(path, tmp_path / "run", resume=True, options={**options, "epochs": 2})
    assert resumed.iter == 4


def test_an_own_network_is_exported_under_its_own_names(home, images, tmp_path):
    path = config(home, "towers", SPARK, "student = 'Towers'\n")
    train(path, tmp_path / "run", options=run_options("encoder", images))
    report = export(tmp_path / "run/epoch_1.pth", tmp_path / "out", to="torch")
    assert (report.network["name"], report.max_difference) == ("Towers", 0.0)
    own = sys.modules["own_parts_of_a_user"].Towers()
    own.load_state_dict(load_file(tmp_path / "out/model.safetensors"))  # strict, the head included
    with torch.no_grad():
        image = torch.randn(1, 3, 64, 64)
        expected = load_backbone(tmp_path / "out").forward_features(image)
        assert torch.equal(own.eval().stages(image), expected)
    with pytest.raises(WeightsError, match="timm has no Towers; export it to torch, onnx, pt2 or sparse"):
        export(tmp_path / "run/epoch_1.pth", tmp_path / "other", to="timm")
    command = [sys.executable, "-m", "hgkd", "export", str(tmp_path / "run/epoch_1.pth"), "--to", "torch", "--out", "typed"]
    alone = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert alone.returncode == 2
    assert "unknown encoder 'Towers'" in alone.stderr
    assert "custom_imports" in alone.stderr


def test_an_own_target_exports_an_own_student(home, images, tmp_path):
    path = config(home, "exported", SPARK, PARTS["student"][1])
    train(path, tmp_path / "run", options=run_options("student", images))
    report = export(tmp_path / "run/epoch_1.pth", tmp_path / "out", to="halves", suffix="small")
    written = load_file(tmp_path / "out/weights.small.safetensors")
    assert {value.dtype for value in written.values() if value.is_floating_point()} == {torch.float16}
    assert report.max_difference < 0.02
    with refused(ValueError, "target-option-unknown", "halves", "cell", "suffix"):
        export(tmp_path / "run/epoch_1.pth", tmp_path / "other", to="halves", cell=32)
    command = [sys.executable, "-m", "hgkd", "export", str(tmp_path / "run/epoch_1.pth"), "--to", "halves", "--out", "typed"]
    found = subprocess.run([*command, "--config", str(path)], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "typed/weights.half.safetensors").is_file()
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert "--config" in found.stderr


def test_an_own_network_is_evaluated_and_pictured_with_its_config(home, images, tmp_path):
    path = config(home, "evaluated", SPARK, PARTS["layer rule"][1])
    train(path, tmp_path / "run", options=run_options("layer rule", images))
    backbone = ["--backbone", str(tmp_path / "run/epoch_1.pth"), "--image-size", "32"]
    evaluated = ["evaluate", "knn", *backbone, "--train", str(images), "--test", str(images), "--k", "1", "--workers", "0"]
    pictured = ["visualize", "pca", *backbone, "--images", str(images), "--limit", "2", "--out", "pictures"]
    for command in (evaluated, pictured):
        command = [sys.executable, "-m", "hgkd", *command]
        found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert found.returncode == 2
        assert "--config FILE) [timm-name-unknown]\n" in found.stderr
        found = subprocess.run([*command, "--config", str(path)], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr
    assert (tmp_path / "pictures/pca.png").is_file()


def finetuning(home, name, images, objective):
    teacher = dict(type="ClassifierTeacher", name="test_resnet", allow_random=True)
    text = f"model = dict(teacher={teacher}, objectives=dict(own={objective}))\n"
    path = config(home, name, FINETUNING, text)
    options = {
        "student": "test_resnet",
        "data_root": str(images),
        "val_root": str(images),
        "num_classes": 2,
        "image_size": 64,
        "batch_size": 4,
        "workers": 0,
        "epochs": 1,
        "warmup_epochs": 0,
        "default_hooks.logger.interval": 1,
    }
    return path, options


def test_a_fine_tuning_objective_of_a_users_own(home, images, tmp_path):
    path, options = finetuning(home, "finetuning", images, dict(type="MeanFeature"))
    assert "own_mean_loss" in dry_run(load_config(path, tmp_path / "dry", options=options))
    train(path, tmp_path / "run", options=options)
    assert "objectives.own.head.weight" in read_checkpoint(tmp_path / "run/epoch_1.pth")["state_dict"]
    assert list((tmp_path / "run").glob("best_accuracy_top1_*.pth"))


@pytest.mark.parametrize("kind", ["MeanToken", "HGKD"])
def test_an_objective_of_the_wrong_kind_is_refused_by_name_in_fine_tuning(kind, home, images, tmp_path):
    path, options = finetuning(home, f"wrong_{kind}", images, dict(type=kind))
    with refused(ValueError, "type-not-found", kind, "fine-tuning", "HardLabelKD", "MeanFeature", "NKD"):
        load_config(path, tmp_path, options=options)


@pytest.mark.parametrize("kind", ["MeanFeature", "HardLabelKD"])
def test_an_objective_of_the_wrong_kind_is_refused_by_name_in_masked_distillation(kind, home, images, tmp_path):
    path = config(home, f"wrong_{kind}", SPARK, f"model = dict(objectives=dict(own=dict(type={kind!r})))\n")
    with refused(ValueError, "type-not-found", kind, "fine-tuning", "HGKD", "MeanToken"):
        load_config(path, tmp_path, options=tiny(images))


def test_a_module_that_is_nowhere_is_told_with_the_folders_that_were_searched(home, tmp_path):
    path = tmp_path / "config.py"
    path.write_text(f"_base_ = {str(SPARK)!r}\ncustom_imports = dict(imports=['no_such_module_of_mine'])\n")
    with refused(ValueError, "custom-import-fails", "no_such_module_of_mine", "PYTHONPATH"):
        load_config(path)


def test_a_module_that_is_typed_is_imported_and_named_as_in_a_config(tmp_path, monkeypatch):
    (tmp_path / "typed_parts_of_a_user.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    shown = {"data_root": ".", "val_train_root": None, "val_test_root": None}
    load_config(SPARK, options={**shown, "custom_imports": {"imports": ["typed_parts_of_a_user"]}})
    assert sys.modules.pop("typed_parts_of_a_user").__file__ == str(tmp_path / "typed_parts_of_a_user.py")
    with refused(ValueError, "custom-imports-without-names", "custom_imports='my_parts'", "dict(imports=['my_parts'])"):
        load_config(SPARK, options={**shown, "custom_imports": "my_parts"})


def test_a_module_whose_name_is_taken_is_told(tmp_path):
    (tmp_path / "json.py").write_text("")
    path = tmp_path / "config.py"
    path.write_text(f"_base_ = {str(SPARK)!r}\ncustom_imports = dict(imports=['json'])\n")
    with refused(ValueError, "custom-import-hidden"):
        load_config(path)


@pytest.mark.parametrize("place", ["student", "teacher"])
def test_a_part_of_another_kind_is_refused_by_name(place, home, images, tmp_path):
    path = config(home, f"another_{place}", HGKD, f"model = dict({place}=dict(_delete_=True, type='RandomMask'))\n")
    options = run_options("student", images)
    with refused(ValueError, "part-of-wrong-kind", place, "RandomMask", place.title()):
        train(path, tmp_path, options={**options, "teacher_features": None})


def test_the_pages_snippets_are_those_that_are_tested():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/howto/extending.md").read_text(encoding="utf-8"), re.S)
    module = OWN.read_text(encoding="utf-8").replace("  # noqa: E402", "")
    assert len(blocks) >= 7
    for block in blocks:
        assert block.strip() in module
