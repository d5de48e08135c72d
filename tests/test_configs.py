"""Every shipped recipe is checked and its model is built."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from hgkd.engine import apply_short_options, check_config
from hgkd.registry import MODELS

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(p.relative_to(CONFIGS).as_posix() for p in CONFIGS.glob("*/*.py") if p.parent.name != "_base_")
DISTILLATIONS = [name for name in RECIPES if not name.startswith("mae/")]


def load(name):
    cfg = Config.fromfile(CONFIGS / name)
    apply_short_options(cfg)
    return cfg


def test_there_are_recipes():
    assert len(RECIPES) >= 9


def load_with_teacher(name, mae_file):
    """The recipe with a teacher that exists: a random ViT, or the MAE of its own recipe, untrained."""
    cfg = load(name)
    if cfg.model.get("teacher"):
        if cfg.model.teacher.type == "MAETeacher":
            cfg.model.teacher.checkpoint = mae_file
        else:
            cfg.model.teacher.allow_random = True
    return cfg


@pytest.fixture(scope="module")
def mae_file(tmp_path_factory):
    model = MODELS.build({"_scope_": "hgkd", **load("mae/mae_tiny_shapes.py").model})
    return str(model.save_teacher(tmp_path_factory.mktemp("mae") / "teacher.safetensors"))


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_checked(name, mae_file):
    check_config(load_with_teacher(name, mae_file))


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_listed_and_says_where_its_numbers_come_from(name):
    assert f"`{name}`" in (CONFIGS / "README.md").read_text()
    assert Path(CONFIGS, name).read_text().startswith('"""')


@pytest.mark.parametrize("name", RECIPES)
def test_model_of_a_recipe_computes_a_loss(name, mae_file):
    cfg = load_with_teacher(name, mae_file)
    model = MODELS.build({"_scope_": "hgkd", **cfg.model})
    side = cfg.model.image_size
    with torch.no_grad():
        losses = model(torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8), mode="loss")
    assert losses
    assert all(value.isfinite() for value in losses.values())


@pytest.mark.parametrize("name", RECIPES)
def test_the_numbers_reach_the_optimiser_and_the_schedule(name):
    cfg = load(name)
    assert cfg.train_cfg.max_epochs == cfg.epochs
    assert cfg.optim_wrapper.optimizer.lr == cfg.lr
    assert cfg.optim_wrapper.clip_grad.max_norm == 5.0
    warm, main = cfg.param_scheduler
    assert warm.end == main.begin < main.end == cfg.epochs


@pytest.mark.parametrize(
    ("control", "recipe", "differ"),
    [
        (
            "spark/spark_resnet18_10e_cifar128.py",
            "hgkd/hgkd_vit-s14_resnet18_10e_cifar128.py",
            {"model.teacher", "model.objectives"},
        ),
        (
            "spark/spark_resnet18_20e_imagenet-sample224.py",
            "hgkd/hgkd_vit-s14_resnet18_20e_imagenet-sample224.py",
            {"model.teacher", "model.objectives"},
        ),
        ("spark/spark_resnet18_shapes.py", "hgkd/hgkd_mae-tiny_resnet18_shapes.py", {"model.teacher", "model.objectives"}),
        (
            "hgkd/hgkd-dense_vit-s14_resnet18_10e_cifar128.py",
            "hgkd/hgkd_vit-s14_resnet18_10e_cifar128.py",
            {"model.mask"},
        ),
    ],
)
def test_a_control_differs_only_in_what_it_controls(control, recipe, differ):
    left, right = load(control).to_dict(), load(recipe).to_dict()
    for cfg in (left, right):  # it changes what a teacher costs, not what is learnt
        cfg["custom_hooks"] = [hook for hook in cfg["custom_hooks"] if hook["type"] != "TeacherCacheHook"]
    parts = {"teacher_checkpoint", "mask_ratio"}  # short options, whose places are compared
    flat = [{f"model.{k}": v for k, v in cfg.pop("model").items()} | cfg for cfg in (left, right)]
    keys = (flat[0].keys() | flat[1].keys()) - parts
    assert {key for key in keys if flat[0].get(key) != flat[1].get(key)} == differ


@pytest.mark.parametrize("name", DISTILLATIONS)
def test_only_the_best_by_knn_and_the_last_two_checkpoints_are_kept(name):
    hook = load(name).default_hooks.checkpoint
    assert (hook.max_keep_ckpts, hook.save_best, hook.rule) == (2, "knn/top1", "greater")
