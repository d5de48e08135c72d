"""The backbones of cifar128_finetune: ResNet-18 by pixels, H-GKD, DMAE and G2SD's generic stage, CIFAR-10 at 128 pixels.

    python tools/compare.py configs/comparisons/cifar128_pretrain.py --work-dir PRE --jobs 2 \\
        --set pretrain=DIR bank=DIR test=DIR teacher=FILE mae=FILE features=DIR

pretrain, bank, test, teacher, features: see cifar128.py, whose rows 'H-GKD' and 'pixels' these are. mae: a MAE with its
decoder, the last checkpoint of configs/mae/mae_vit-ti16_100e_cifar128.py.
"""

options = dict(
    data_root="{pretrain}",
    val_train_root="{bank}",
    val_test_root="{test}",
    limit=3000,
    epochs=4,
    warmup_epochs=0.25,
    workers=0,
)
options["val_dataloader.dataset.bank.limit_per_class"] = 40
options["val_dataloader.dataset.query.limit_per_class"] = 40
evaluate = dict(
    methods=["knn", "linear"],
    train="{bank}",
    test="{test}",
    image_size=128,
    limit_per_class=200,
    test_limit_per_class=200,
    workers=0,
)
_cached = dict(teacher_checkpoint="{teacher}", teacher_features="{features}")
_seeds = [0, 1, 2]
rows = [
    dict(name="H-GKD", config="configs/hgkd/hgkd_vit-s14_resnet18_10e_cifar128.py", options=_cached, seeds=_seeds),
    dict(name="pixels", config="configs/spark/spark_resnet18_10e_cifar128.py", seeds=_seeds),
    dict(
        name="DMAE",
        config="configs/dmae/dmae_vit-s14_resnet18_10e_cifar128.py",
        options=dict(teacher_checkpoint="{teacher}"),
    ),
    dict(
        name="G2SD",
        config="configs/g2sd/g2sd_mae-ti16_resnet18_10e_cifar128.py",
        options=dict(teacher_checkpoint="{mae}"),
    ),
]
