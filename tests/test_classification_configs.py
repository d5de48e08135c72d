"""Every fine-tuning recipe is checked and built, and the full-scale ones hold the published numbers."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from hgkd.config import apply_short_options, check_config
from hgkd.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS

FOLDER = Path(__file__).parents[1] / "downstream/classification"
RECIPES = sorted(path.name for path in FOLDER.glob("*.py"))
MIXING = dict(mixup=0.8, cutmix=1.0)

# "ResNet strikes back" (arXiv 2110.00476), table 2; keyu-tian/SparK, downstream_imagenet/arg.py, util.py, data.py;
# facebookresearch/ConvNeXt, TRAINING.md and main.py; facebookresearch/mae, FINETUNE.md; pengzhiliang/G2SD, SD.sh; yzd-v/MGD,
# cls/configs. `batch` is over 8 processes, `lr` the rate for that batch.
PUBLISHED = {
    "resnet50_rsb-a2_300e_imagenet.py": dict(
        epochs=300,
        warmup=5,
        batch=2048,
        lr=5e-3,
        weight_decay=0.02,
        layer_decay=None,
        optimizer="timm.optim.Lamb",
        end=2e-4,
        drop_path=0.05,
        repeats=3,
        augment="rand-m7-mstd0.5-inc1",
        erasing=0.0,
        ema=None,
        test_crop=0.95,
        labels=dict(loss="bce", threshold=0.2, smoothing=0.0, mixup=0.1, cutmix=1.0),
    ),
    "resnet50_rsb-a3_100e_imagenet.py": dict(
        epochs=100,
        warmup=5,
        batch=2048,
        lr=8e-3,
        weight_decay=0.02,
        layer_decay=None,
        optimizer="timm.optim.Lamb",
        end=1.25e-4,
        drop_path=0.0,
        repeats=1,
        augment="rand-m6-mstd0.5-inc1",
        erasing=0.0,
        ema=None,
        test_crop=0.95,
        labels=dict(loss="bce", threshold=0.2, smoothing=0.0, mixup=0.1, cutmix=1.0),
    ),
    "resnet50_spark_300e_imagenet.py": dict(
        epochs=300,
        warmup=5,
        batch=4096,
        lr=2e-3 * 16,
        weight_decay=0.02,
        layer_decay=0.7,
        optimizer="timm.optim.Lamb",
        end=0.001,
        drop_path=0.05,
        repeats=1,
        augment="trivial",
        erasing=0.25,
        ema=0.9999,
        test_crop=0.95,
        labels=dict(loss="bce", smoothing=0.1, mixup=0.1, cutmix=1.0),
    ),
    "convnext-s_spark_400e_imagenet.py": dict(
        epochs=400,
        warmup=20,
        batch=4096,
        lr=2e-4 * 16,
        weight_decay=0.01,
        layer_decay=0.7,
        optimizer="AdamW",
        end=0.001,
        drop_path=0.3,
        repeats=3,
        augment="trivial",
        erasing=0.25,
        ema=0.9999,
        test_crop=0.95,
        labels=dict(smoothing=0.1, **MIXING),
    ),
    "convnext-t_300e_imagenet.py": dict(
        epochs=300,
        warmup=20,
        batch=4096,
        lr=4e-3,
        weight_decay=0.05,
        layer_decay=None,
        optimizer="AdamW",
        end=1e-6 / 4e-3,
        drop_path=0.1,
        repeats=1,
        augment="rand-m9-mstd0.5-inc1",
        erasing=0.25,
        ema=0.9999,
        test_crop=0.875,
        labels=dict(smoothing=0.1, **MIXING),
    ),
    "vit-b16_mae_100e_imagenet.py": dict(
        epochs=100,
        warmup=5,
        batch=1024,
        lr=5e-4 * 4,
        weight_decay=0.05,
        layer_decay=0.65,
        optimizer="AdamW",
        end=1e-6 / 2e-3,
        drop_path=0.1,
        repeats=1,
        augment="rand-m9-mstd0.5-inc1",
        erasing=0.25,
        ema=None,
        test_crop=0.875,
        labels=dict(smoothing=0.1, **MIXING),
    ),
    "vit-s16_g2sd_200e_imagenet.py": dict(
        epochs=200,
        warmup=5,
        batch=1024,
        lr=1e-3 * 4,
        weight_decay=0.05,
        layer_decay=0.75,
        optimizer="AdamW",
        end=1e-6 / 4e-3,
        drop_path=0.0,
        repeats=1,
        augment="rand-m9-mstd0.5-inc1",
        erasing=0.25,
        ema=None,
        test_crop=0.875,
        labels=dict(smoothing=0.1, **MIXING),
    ),
}


def load(name):
    cfg = Config.fromfile(FOLDER / name)
    apply_short_options(cfg)
    return cfg


def test_there_are_recipes():
    assert len(RECIPES) >= 16
    assert {name.split("_")[0] for name in RECIPES} >= {"resnet50", "resnet18", "convnext-t", "vit-b16", "vit-ti16"}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_checked_built_and_listed(name):
    cfg = load(name)
    cfg.train_dataloader.dataset.setdefault("data_root", "data")
    cfg.model.setdefault("num_classes", 3)
    if cfg.val_dataloader is None:  # a folder that the user names
        assert cfg.val_root is None
    check_config(cfg)
    assert f"`{name}`" in (FOLDER / "README.md").read_text()
    assert (FOLDER / name).read_text().startswith('"""')
    # narrow on the inside where timm allows it, so that a build is quick
    model = cfg.model
    if model.get("teacher"):
        model.teacher.update(allow_random=True, dtype="float32")
        model.teacher.setdefault("name", "test_resnet")
        if not model.teacher.get("backbone_only"):
            model.teacher.num_classes = model.num_classes
        if "vit" in model.teacher.name:
            model.teacher.update(depth=2, embed_dim=32, num_heads=2)
    if "vit" in model.classifier.name or "deit" in model.classifier.name:
        model.classifier.update(depth=2, embed_dim=32, num_heads=2)
    built = MODELS.build({"_scope_": "hgkd", **model})
    wrapper = dict(cfg.optim_wrapper)
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.build(
        dict(
            type=wrapper.pop("constructor", "DefaultOptimWrapperConstructor"),
            paramwise_cfg=wrapper.pop("paramwise_cfg", None),
            optim_wrapper_cfg=wrapper,
        )
    )
    groups = constructor(built).optimizer.param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(built.parameters()))
    assert max(group["lr"] for group in groups) == cfg.lr
    # a step on small images where the network takes any
    if model.image_size == 128:
        images = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
        with torch.no_grad():
            losses = built(images, mode="loss", label=torch.tensor([0, 1]))
        assert all(value.isfinite() for value in losses.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_scale_is_as_published(name):
    cfg = load(name)
    data, hooks = cfg.train_dataloader.dataset, {hook["type"]: hook for hook in cfg.custom_hooks}
    batch = 8 * cfg.train_dataloader.batch_size
    found = dict(
        epochs=cfg.train_cfg.max_epochs,
        warmup=cfg.param_scheduler[0].end,
        batch=batch,
        lr=cfg.optim_wrapper.optimizer.lr * batch / cfg.auto_scale_lr.base_batch_size,
        weight_decay=cfg.optim_wrapper.optimizer.weight_decay,
        layer_decay=cfg.optim_wrapper.get("paramwise_cfg", {}).get("layer_decay"),
        optimizer=cfg.optim_wrapper.optimizer.type,
        end=cfg.param_scheduler[1].eta_min_ratio,
        drop_path=cfg.model.classifier.get("drop_path", 0.0),
        repeats=cfg.train_dataloader.sampler.get("repeats", 1),
        augment=data.transform.auto_augment,
        erasing=cfg.model.get("erasing", 0.0),
        ema=1 - hooks["EMAHook"]["momentum"] if "EMAHook" in hooks else None,
        test_crop=1 / cfg.val_dataloader.dataset.resize_ratio,
        labels=cfg.model.labels.to_dict(),
    )
    assert found == {**PUBLISHED[name], **{key: pytest.approx(PUBLISHED[name][key]) for key in ("lr", "end", "test_crop")}}
    assert cfg.auto_scale_lr.enable
    assert cfg.optim_wrapper.clip_grad is None
    assert data.image_size == (160 if "a3" in name else 224)
    assert cfg.val_dataloader.dataset.image_size == 224
    assert cfg.model.num_classes == 1000


def test_published_models():
    spark = load("resnet50_spark_300e_imagenet.py")
    assert spark.sync_bn
    lamb = spark.optim_wrapper.optimizer
    assert (lamb.max_grad_norm, lamb.always_adapt, lamb.bias_correction) == (1e7, True, False)
    g2sd = load("vit-s16_g2sd_200e_imagenet.py").model
    assert (g2sd.label_weight, g2sd.objectives.to_dict()) == (0.5, dict(hard=dict(type="HardLabelKD", weight=0.5)))
    assert g2sd.classifier.name == "deit_small_distilled_patch16_224"
    mgd = load("resnet18_mgd_100e_imagenet.py")
    assert mgd.model.objectives.mgd == dict(type="FeatureMapMGD", mask="channel", ratio=0.15, alpha=7e-5, reduction="sum")
    assert (mgd.train_cfg.max_epochs, mgd.param_scheduler[0].milestones) == (100, [30, 60, 90])
    assert mgd.optim_wrapper.optimizer == dict(type="SGD", momentum=0.9, weight_decay=1e-4, lr=0.1)
    assert 8 * mgd.train_dataloader.batch_size == mgd.auto_scale_lr.base_batch_size == 256


def test_recipes_with_a_teacher_differ_from_the_baseline_in_the_teacher_only():
    base = load("resnet18_10e_cifar128.py").to_dict()
    for name in ("resnet18_g2sd", "resnet18_nkd", "resnet18_kd", "resnet18_mgd"):
        cfg = load(f"{name}_10e_cifar128.py").to_dict()
        differ = {key for key in cfg.keys() | base.keys() if cfg.get(key) != base.get(key)}
        assert differ <= {"model", "teacher_checkpoint"}
        parts = {key for key in cfg["model"] if cfg["model"][key] != base["model"].get(key)}
        assert parts <= {"classifier", "label_weight", "teacher", "objectives"}
        assert ("classifier" in parts) == (name == "resnet18_g2sd")  # its second head
