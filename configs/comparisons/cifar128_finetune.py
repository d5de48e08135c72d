"""Fine-tuned top-1 on CIFAR-10 from several backbones, same schedule, at all labels and at a tenth of them.

    hgkd compare configs/comparisons/cifar128_finetune.py --work-dir OUT \\
        --only "judge, 10 % labels" "judge, all labels" --set train=DIR test=DIR runs=- mae=- dino=FILE judges=-
    hgkd compare configs/comparisons/cifar128_finetune.py --work-dir OUT --jobs 2 \\
        --set train=DIR test=DIR runs=PRE mae=CHECKPOINT dino=FILE judges=OUT

train, test: labelled images, one folder a class; 300 and 100 of each class are used. runs: work folder of cifar128_pretrain
(or of cifar128), whose runs are named after row and seed; mae: the teacher of its rows, itself a ViT-Tiny that learned pixels.
dino: weight file of vit_small_patch14_dinov2 (MGD's teacher, and what the judges start from).

The draw of the 10 % is the same for all seeds. H-GKD's students are CNNs, so ViT-Tiny has no such row.

A judge is the fine-tuned teacher of the specific stage, KD and NKD; it knows no more labels than its students. judges: the work
folder of the first command.

Sizes: 64 pixels (128 costs four times as much); ViT-Tiny 128, judges 112. All labels: 3,000 images twice; 10 %: 300 images
sixteen times. Either takes about 2 minutes of one slow core, three times as much with a ViT teacher; a judge 12 minutes.
"""

_few = dict(label_fraction=0.1, epochs=16, warmup_epochs=1)
_few["train_cfg.val_interval"] = 4
_folder = "downstream/classification/"
_plain = _folder + "resnet18_10e_cifar128.py"
_specific = _folder + "resnet18_g2sd_10e_cifar128.py"
_mgd = _folder + "resnet18_mgd_10e_cifar128.py"
_tiny = _folder + "vit-ti16_10e_cifar128.py"
_vit = dict(image_size=128)  # 16 tokens, of 64 pixels, would be too few
_dino = dict(teacher_checkpoint="{dino}")
_hgkd = dict(backbone="{runs}/H-GKD_seed{seed}")
_generic = dict(backbone="{runs}/G2SD_seed{seed}")
_vit_generic = dict(backbone="{runs}/G2SD_ViT-Ti_seed{seed}", **_vit)
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


def _recipes(labels):
    """Name, config, options and seeds of every row; ``labels``: as in the folder of the judge's run."""
    judge = dict(teacher_checkpoint="{judges}/judge_" + labels + "_labels_seed0")
    return [
        ("judge", _folder + "vit-s14_2e_cifar112.py", dict(backbone="{dino}", image_size=112), _side),
        ("random", _plain, dict(), _main),
        ("pixels", _plain, dict(backbone="{runs}/pixels_seed{seed}"), _main),
        ("H-GKD", _plain, _hgkd, _main),
        ("DMAE", _plain, dict(backbone="{runs}/DMAE_seed{seed}"), _side),
        ("G2SD generic only", _plain, _generic, _side),
        ("G2SD specific only", _specific, judge, _side),
        ("G2SD generic + specific", _specific, dict(**_generic, **judge), _side),
        ("H-GKD + specific", _specific, dict(**_hgkd, **judge), _side),
        ("random + KD", _folder + "resnet18_kd_10e_cifar128.py", judge, _side),
        ("random + NKD", _folder + "resnet18_nkd_10e_cifar128.py", judge, _side),
        ("random + MGD", _mgd, _dino, _side),
        ("H-GKD + MGD", _mgd, dict(**_hgkd, **_dino), _side),
        ("ViT-Ti random", _tiny, _vit, _side),
        ("ViT-Ti pixels", _tiny, dict(backbone="{mae}", **_vit), _side),
        ("ViT-Ti DMAE", _tiny, dict(backbone="{runs}/DMAE_ViT-Ti_seed{seed}", **_vit), _side),
        ("ViT-Ti G2SD", _tiny, _vit_generic, _side),
        ("ViT-Ti G2SD generic + specific", _folder + "vit-ti16_g2sd_10e_cifar128.py", dict(**_vit_generic, **judge), _side),
    ]


rows = [
    dict(name=f"{name}, {labels} labels", config=config, options=dict(**own, **extra), seeds=seeds)
    for labels, folder, extra in (("10 %", "10", _few), ("all", "all", dict()))
    for name, config, own, seeds in _recipes(folder)
]
