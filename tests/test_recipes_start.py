"""Every shipped recipe of pretraining and classification starts: dry run, an epoch of one step, a validation, a checkpoint.

Networks are thin and images small; the rest of a recipe is as it stands: hooks, schedule, optimiser, data, evaluator, teacher.
"""

import copy

import pytest
import timm
from safetensors.torch import save_file
from tiny_runs import ROOT, need_library, write_images

from hgkd.api import test as test_api
from hgkd.api import train as train_tool
from hgkd.cli import train as train_command
from hgkd.distillers import MAEPretraining
from hgkd.weights.run_folder import read_run_checkpoint

PRETRAINING = sorted(path for path in (ROOT / "configs").glob("*/*.py") if path.parent.name not in ("_base_", "comparisons"))
CLASSIFICATION = sorted((ROOT / "downstream/classification").glob("*.py"))
VIT = dict(embed_dim=32, num_heads=2)
THIN = {
    "resnet": dict(channels=(8, 16, 32, 64), layers=(1, 1, 1, 1)),
    "convnext": dict(dims=(8, 16, 32, 64), depths=(1, 1, 1, 1)),
    "mmdet.CSPNeXt": dict(widen_factor=0.125),
    "vit": VIT,
    "deit": VIT,
}
MAE = dict(VIT, depth=12, decoder_embed_dim=16, decoder_depth=8, decoder_num_heads=2)


def thin(name):
    return next(sizes for family, sizes in THIN.items() if name.startswith(family))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return str(write_images(tmp_path_factory.mktemp("images"), each=2))


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with pytest.MonkeyPatch.context() as patch:  # the dumped config's good style takes longer than a training here
        patch.setattr("mmengine.config.config.FormatCode", lambda text, **options: (text, True))
        yield


def small(images, **options):
    sizes = {"image_size": 64, "batch_size": 4, "workers": 0}
    return {"data_root": images, **sizes, **options}


def shrink(cfg):
    """The options that make the networks of a config thin."""
    model, found = cfg.model, {}
    student = model.get("student") or {}
    if "encoder" in student:
        found["model.student.encoder_kwargs"] = thin(student.encoder)
        found |= {"model.student.decoder_width": 32, "model.student.min_decoder_width": 8}
    for path, part in (("model.arch", model), ("model.student.arch", student)):
        if "arch" in part:
            sizes = {**(part.arch if isinstance(part.arch, dict) else {}), **MAE}
            found[path] = {**sizes, "_delete_": True}
            found[path].pop("base", None)
    if "classifier" in model:
        found |= {f"model.classifier.{key}": value for key, value in thin(model.classifier.name).items()}
    return found


def teacher_options(cfg, folder):
    """A teacher of random weights, thin and as deep as its recipe taps it."""
    several = cfg.model.get("teachers") or {}
    if several:
        return {key: value for name in several for key, value in _options_of(cfg, folder, name).items()}
    return _options_of(cfg, folder) if cfg.model.get("teacher") else {}


def _options_of(cfg, folder, name=None):
    """Of the only teacher, or of one of several."""
    place = "model.teacher" if name is None else f"model.teachers.{name}"
    teacher = cfg.model.teacher if name is None else cfg.model.teachers[name]
    file = folder / f"{name or 'teacher'}.safetensors"
    found = {"teacher_checkpoint" if name is None else f"{place}.checkpoint": str(file), f"{place}.allow_random": True}
    if teacher.type == "MAETeacher":
        depth = 24 if "-l16" in cfg.filename else 12
        MAEPretraining({**MAE, "depth": depth}, 64).save_teacher(file)
        return found
    network_name = teacher.get("name", "resnet18")
    sizes = {} if network_name == "resnet34" else thin(network_name)
    pooled = {key: teacher[key] for key in ("global_pool",) if key in teacher}
    classes = 0 if teacher.type == "TimmTeacher" or teacher.get("backbone_only") else 2
    network = timm.create_model(network_name, num_classes=classes, **sizes, **pooled)
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, file)
    found |= {f"{place}.{key}": value for key, value in sizes.items()}
    if teacher.type == "ClassifierTeacher":
        found["model.teacher.name"] = network_name
    return found


def start(recipe, options, folder):
    """Dry run at full length and training of one step; the runner, and the options of its epoch."""
    cfg = train_tool.load_config(recipe, folder / "run", options=options)
    assert "finite yes" in " ".join(train_command.dry_run(copy.deepcopy(cfg)).split())
    options = {**options, "epochs": 1, "default_hooks.logger.interval": 1}
    if any(part.type == "LinearLR" for part in cfg.param_scheduler):
        options["warmup_epochs"] = 0
    runner = train_tool.train(recipe, folder / "run", options=options)
    assert runner.iter == 1
    read_run_checkpoint(folder / "run/epoch_1.pth")
    return runner, options


@pytest.mark.parametrize("recipe", PRETRAINING, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_pretraining_starts(recipe, images, tmp_path, monkeypatch):
    need_library(recipe)
    monkeypatch.chdir(tmp_path)
    cfg = train_tool.Config.fromfile(recipe)
    options = small(images, val_train_root=images, val_test_root=images, **shrink(cfg), **teacher_options(cfg, tmp_path))
    _, options = start(recipe, options, tmp_path)
    assert "knn/top1" in "".join(file.read_text() for file in (tmp_path / "run").glob("*/*.log"))
    options["epochs"] = 2
    assert train_tool.train(recipe, tmp_path / "run", resume=True, options=options).epoch == 2


@pytest.mark.parametrize("recipe", CLASSIFICATION, ids=lambda path: path.stem)
def test_a_classifier_starts(recipe, images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = train_tool.Config.fromfile(recipe)
    options = small(images, val_root=images, num_classes=2, **shrink(cfg), **teacher_options(cfg, tmp_path))
    _, options = start(recipe, options, tmp_path)
    metrics = test_api.run_test(recipe, tmp_path / "run/epoch_1.pth", options=options)
    assert 0 <= metrics["accuracy/top1"] <= 100
