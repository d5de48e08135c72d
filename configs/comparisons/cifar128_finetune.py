"""Fine-tuned top-1 on CIFAR-10 from several backbones, same schedule, at all labels and at a tenth of them.

    python tools/compare.py configs/comparisons/cifar128_finetune.py --work-dir OUT --jobs 2 \\
        --set train=DIR test=DIR runs=PRE dino=FILE judge=RUN

train, test: labelled images, one folder a class; 300 and 100 of each class are used. runs: work folder of cifar128_pretrain
(or of cifar128), whose runs are named after row and seed. dino: weight file of vit_small_patch14_dinov2 (MGD's teacher).
judge: checkpoint or work folder of a classifier of these classes (the teacher of the specific stage), e.g. of
downstream/classification/vit-s14_2e_cifar112.py with backbone=dino, or of resnet18_10e_cifar128.py with more labels and
epochs.

Sizes: 64 pixels (128 costs four times as much). All labels: 3,000 images twice; 10 %: 300 images sixteen times. Either takes
about 2 minutes of one slow core; a step with a ViT teacher costs about three times as much. ViT-Tiny: 128 pixels.
"""

_few = dict(label_fraction=0.1, epochs=16, warmup_epochs=1)
_few["train_cfg.val_interval"] = 4
_folder = "downstream/classification/"
_plain = _folder + "resnet18_10e_cifar128.py"
_specific = _folder + "resnet18_g2sd_10e_cifar128.py"
_tiny = _folder + "vit-ti16_10e_cifar128.py"
_judge = dict(teacher_checkpoint="{judge}")
_vit = dict(image_size=128)  # 16 tokens, of 64 pixels, would be too few
_main, _side = [0, 1, 2], [0]

options = dict(
    data_root="{train}",
    val_root="{test}",
    image_size=64,
    epochs=2,
    warmup_epochs=0.25,
    workers=0,
)
options["train_dataloader.dataset.limit_per_class"] = 300
options["val_dataloader.dataset.limit_per_class"] = 100
options["default_hooks.checkpoint.save_best"] = None
scores = {"top-1 %": "accuracy/top1", "top-5 %": "accuracy/top5"}

# name, config, options, seeds; 'one-stage' G2SD has no backbone, 'two-stage' that of the generic stage
_recipes = [
    ("random", _plain, dict(), _main),
    ("pixels", _plain, dict(backbone="{runs}/pixels_seed{seed}"), _main),
    ("H-GKD", _plain, dict(backbone="{runs}/H-GKD_seed{seed}"), _main),
    ("DMAE", _plain, dict(backbone="{runs}/DMAE_seed{seed}"), _side),
    ("G2SD generic only", _plain, dict(backbone="{runs}/G2SD_seed{seed}"), _side),
    ("G2SD specific only", _specific, dict(**_judge), _side),
    ("G2SD generic + specific", _specific, dict(backbone="{runs}/G2SD_seed{seed}", **_judge), _side),
    ("H-GKD + specific", _specific, dict(backbone="{runs}/H-GKD_seed{seed}", **_judge), _side),
    ("random + KD", _folder + "resnet18_kd_10e_cifar128.py", dict(**_judge), _side),
    ("random + NKD", _folder + "resnet18_nkd_10e_cifar128.py", dict(**_judge), _side),
    ("random + MGD", _folder + "resnet18_mgd_10e_cifar128.py", dict(teacher_checkpoint="{dino}"), _side),
    (
        "H-GKD + MGD",
        _folder + "resnet18_mgd_10e_cifar128.py",
        dict(backbone="{runs}/H-GKD_seed{seed}", teacher_checkpoint="{dino}"),
        _side,
    ),
    ("ViT-Ti random", _tiny, _vit, _side),
    ("ViT-Ti DMAE", _tiny, dict(backbone="{runs}/DMAE_ViT-Ti_seed{seed}", **_vit), _side),
    ("ViT-Ti G2SD", _tiny, dict(backbone="{runs}/G2SD_ViT-Ti_seed{seed}", **_vit), _side),
]
rows = [
    dict(name=f"{name}, {labels} labels", config=config, options=dict(**own, **extra), seeds=seeds)
    for labels, extra in (("10 %", _few), ("all", dict()))
    for name, config, own, seeds in _recipes
]
