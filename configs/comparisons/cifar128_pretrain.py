"""All methods on equal budget, for a ResNet-18 and a ViT-Tiny, on CIFAR-10 at 128 pixels.

    hgkd train configs/mae/mae_vit-ti16_100e_cifar128.py --work-dir MAE \\
        --cfg-options data_root=DIR val_train_root=None val_test_root=None
    hgkd compare configs/comparisons/cifar128_pretrain.py --work-dir PRE --jobs 2 \\
        --set pretrain=DIR bank=DIR test=DIR teacher=FILE mae=MAE/epoch_100.pth features=DIR

pretrain, bank, test, teacher, features: see cifar128.py, whose rows 'pixels', 'dense' and 'H-GKD' these are. mae: teacher of
the rows with a decoder. The budget: --cfg-options limit=20000 for all images, limit=40 epochs=1 warmup_epochs=0 for a trial.

Each row sees 3,000 images four times; 'dense' twice, for an image costs it twice as much. cifar128_finetune goes on from here.
"""

_base_ = "../_base_/comparisons/cifar128.py"

options = dict(epochs=4, warmup_epochs=0.25)
_cached = dict(teacher_checkpoint="{teacher}", teacher_features="{features}")
_dino = dict(teacher_checkpoint="{teacher}")
_mae = dict(teacher_checkpoint="{mae}")
_hgkd = "configs/hgkd/hgkd"
_seeds = [0, 1, 2]
rows = [
    dict(name="random", backbone="resnet18", seeds=_seeds),
    dict(name="pixels", config="configs/spark/spark_resnet18_10e_cifar128.py", seeds=_seeds),
    dict(
        name="dense", config=f"{_hgkd}-dense_vit-s14_resnet18_10e_cifar128.py", options=dict(epochs=2, **_cached), seeds=_seeds
    ),
    dict(name="H-GKD", config=f"{_hgkd}_vit-s14_resnet18_10e_cifar128.py", options=_cached, seeds=_seeds),
    dict(name="H-GKD, inferred", config=f"{_hgkd}-inferred_mae-ti16_resnet18_10e_cifar128.py", options=_mae),
    dict(name="DMAE", config="configs/dmae/dmae_vit-s14_resnet18_10e_cifar128.py", options=_dino),
    dict(name="G2SD", config="configs/g2sd/g2sd_mae-ti16_resnet18_10e_cifar128.py", options=_mae),
    dict(name="MGD", config="configs/mgd/mgd_vit-s14_resnet18_10e_cifar128.py", options=_cached),
    dict(name="mix", config=f"{_hgkd}-mix_vit-s14_resnet18_10e_cifar128.py", options=_cached),
    dict(name="random ViT-Ti", backbone="vit_tiny_patch16_224"),
    dict(name="DMAE, ViT-Ti", config="configs/dmae/dmae_vit-s14_vit-ti16_10e_cifar128.py", options=_dino),
    dict(name="G2SD, ViT-Ti", config="configs/g2sd/g2sd_mae-ti16_vit-ti16_10e_cifar128.py", options=_mae),
    dict(name="teacher, block 9", backbone="vit_small_patch14_dinov2", checkpoint="{teacher}", block=9),
    dict(name="teacher (MAE)", backbone="{mae}"),
]
