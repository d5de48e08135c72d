"""Every shipped recipe is checked and its model is built."""

import math
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import PARAM_SCHEDULERS
from tiny_runs import need_library

from hgkd.config import apply_short_options, check_config
from hgkd.networks.mae import MaskedAutoencoder, make_arch, save_mae
from hgkd.registry import MODELS
from hgkd.training import DecayGroupsConstructor

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = sorted(
    p.relative_to(CONFIGS).as_posix() for p in CONFIGS.glob("*/*.py") if p.parent.name not in ("_base_", "comparisons")
)
DISTILLATIONS = [name for name in RECIPES if not name.startswith("mae/")]


# What the papers' released scripts train with: facebookresearch/mae PRETRAIN.md and main_pretrain.py; keyu-tian/SparK
# pretrain/utils/arg_util.py, lr_control.py, decoder.py; UCSC-VLAA/DMAE pretrain.sh and main_distill.py; pengzhiliang/G2SD GD.sh
# and main_distill.py. `batch` is over 8 processes, `lr` for 256 images.
PUBLISHED = {
    "mae/mae_vit-b16_800e_imagenet.py": dict(
        epochs=800, warmup=40, batch=4096, lr=1.5e-4, weight_decay=0.05, betas=(0.9, 0.95), clip=None, mask_ratio=0.75, crop=0.2
    ),
    "spark/spark_resnet50_1600e_imagenet.py": dict(
        epochs=1600, warmup=40, batch=4096, lr=2e-4, weight_decay=0.04, betas=(0.9, 0.95), clip=5.0, mask_ratio=0.6, crop=0.67
    ),
    "dmae/dmae_mae-l16_vit-b16_100e_imagenet.py": dict(
        epochs=100, warmup=40, batch=4096, lr=1.5e-4, weight_decay=0.05, betas=(0.9, 0.95), clip=None, mask_ratio=0.75, crop=0.2
    ),
    "g2sd/g2sd_mae-b16_vit-s16_300e_imagenet.py": dict(
        epochs=300, warmup=10, batch=4096, lr=1.5e-4, weight_decay=0.05, betas=(0.9, 0.95), clip=3.0, mask_ratio=0.75, crop=0.2
    ),
}


def load(name):
    need_library(name)
    cfg = Config.fromfile(CONFIGS / name)
    apply_short_options(cfg)
    return cfg


def test_there_are_recipes():
    assert len(RECIPES) >= 27
    assert {Path(name).parent.name for name in RECIPES} >= {"mae", "spark", "hgkd", "dmae", "g2sd", "mgd"}


def load_with_teacher(name, mae_file):
    """The recipe with a teacher that exists: a random ViT, or an untrained MAE, deep and narrow."""
    cfg = load(name)
    for teacher in [cfg.model.teacher] if cfg.model.get("teacher") else (cfg.model.get("teachers") or {}).values():
        if teacher.type == "MAETeacher":
            teacher.checkpoint = mae_file
        teacher.allow_random = True
        teacher.pop("dtype", None)  # bfloat16 is slow on the CPU
    return cfg


@pytest.fixture(scope="module")
def mae_file(tmp_path_factory):
    # as deep as the deepest that a recipe taps (ViT-L, with MAE's decoder), and narrow
    arch = dict(embed_dim=16, depth=24, num_heads=2, decoder_embed_dim=16, decoder_depth=8, decoder_num_heads=2)
    network = MaskedAutoencoder(make_arch(arch))
    return str(save_mae(network, tmp_path_factory.mktemp("mae") / "teacher.safetensors"))


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
    if name not in PUBLISHED:
        assert cfg.optim_wrapper.clip_grad.max_norm == 5.0
    warm, main = cfg.param_scheduler[:2]
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
    parts = {"teacher_checkpoint", "teacher_features", "mask_ratio"}  # short options, whose places are compared
    flat = [{f"model.{k}": v for k, v in cfg.pop("model").items()} | cfg for cfg in (left, right)]
    keys = (flat[0].keys() | flat[1].keys()) - parts
    assert {key for key in keys if flat[0].get(key) != flat[1].get(key)} == differ


@pytest.mark.parametrize("name", DISTILLATIONS)
def test_only_the_best_by_knn_and_the_last_two_checkpoints_are_kept(name):
    hook = load(name).default_hooks.checkpoint
    assert (hook.max_keep_ckpts, hook.save_best, hook.rule) == (2, "knn/top1", "greater")


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_scale_is_as_published(name):
    cfg, published = load(name), PUBLISHED[name]
    clip = cfg.optim_wrapper.get("clip_grad")
    model = cfg.model
    found = dict(
        epochs=cfg.train_cfg.max_epochs,
        warmup=cfg.param_scheduler[0].end,
        batch=8 * cfg.train_dataloader.batch_size,
        lr=cfg.optim_wrapper.optimizer.lr * 256 / cfg.auto_scale_lr.base_batch_size,
        weight_decay=cfg.optim_wrapper.optimizer.weight_decay,
        betas=tuple(cfg.optim_wrapper.optimizer.betas),
        clip=clip and clip.max_norm,
        mask_ratio=model.mask.mask_ratio if "mask" in model else model.mask_ratio,
        crop=cfg.train_dataloader.dataset.transform.scale[0],
    )
    assert found == published
    assert cfg.auto_scale_lr.enable
    assert model.image_size == 224


def test_published_models():
    dmae = load("dmae/dmae_mae-l16_vit-b16_100e_imagenet.py").model
    assert dmae.student == dict(type="MaskedViT", arch="base")
    assert dmae.objectives.dmae == dict(type="DMAE", taps=((8, 17),), projector="linear", distance="l1")
    # the script has no norm-pix
    assert dmae.objectives.pixels == dict(type="PixelReconstruction", supervise="masked", standardise=False)
    g2sd = load("g2sd/g2sd_mae-b16_vit-s16_300e_imagenet.py")
    assert g2sd.model.objectives.g2sd == dict(type="G2SD", decoder_block=3, supervise="all", beta=2.0)
    assert g2sd.model.student.arch == dict(base="small", decoder_embed_dim=256, decoder_depth=4, decoder_num_heads=8)
    assert g2sd.param_scheduler[1].eta_min == 2.5e-6
    for part in (dmae, g2sd.model):  # the MAE family truncates: 49 of 196 at 0.75
        assert part.mask.rounding == "floor"
    spark = load("spark/spark_resnet50_1600e_imagenet.py")
    assert spark.optim_wrapper.optimizer.type == "timm.optim.Lamb"
    warm, main, decay = spark.param_scheduler
    assert (warm.start_factor, main.eta_min_ratio) == (0.005, 0.001)
    assert spark.optim_wrapper.optimizer.weight_decay * decay.eta_min_ratio == pytest.approx(0.2)
    assert decay.end == spark.epochs
    student = MODELS.build({"_scope_": "hgkd", **spark.model}).student
    assert list(student.pyramid_channels.values()) == [768, 384, 192, 96, 48, 24]
    assert list(student.pyramid_channels) == [32, 16, 8, 4, 2, 1]


def test_weight_decay_rises_where_there_is_any():
    cfg = load("spark/spark_resnet50_1600e_imagenet.py")
    layer = torch.nn.Linear(2, 2)
    wrapper = DecayGroupsConstructor({k: v for k, v in cfg.optim_wrapper.items() if k != "constructor"})(layer)
    scheduler = PARAM_SCHEDULERS.build(
        {**cfg.param_scheduler[2], "end": 10, "optimizer": wrapper, "convert_to_iter_based": False, "by_epoch": False}
    )
    values = []
    for _ in range(10):
        values.append([group["weight_decay"] for group in wrapper.optimizer.param_groups])
        layer(torch.ones(1, 2)).sum().backward()
        wrapper.step()
        scheduler.step()
    # half a cosine over 10 steps from 0.04 to 0.2; nothing at biases
    expected = [[0.12 - 0.08 * math.cos(math.pi * step / 10), 0.0] for step in range(10)]
    assert values == [pytest.approx(pair) for pair in expected]


def test_the_weight_decay_rises_over_the_epochs_that_are_given():
    cfg = Config.fromfile(CONFIGS / "spark/spark_resnet50_1600e_imagenet.py")
    cfg.merge_from_dict({"epochs": 50, "warmup_epochs": 0})
    apply_short_options(cfg)
    main, decay = cfg.param_scheduler  # without the warm-up, as recipes with two schedules
    assert (main.type, main.begin, main.end) == ("CosineAnnealingLR", 0, 50)
    assert (decay.param_name, decay.begin, decay.end) == ("weight_decay", 0, 50)
