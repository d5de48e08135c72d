"""The main comparison of docs/background/results.md: random, pixels, dense distillation, H-GKD, teacher; CIFAR-10 at 128 px.

    hgkd compare configs/comparisons/cifar128.py --work-dir OUT --jobs 2 \\
        --set pretrain=DIR bank=DIR test=DIR teacher=FILE features=DIR

pretrain: unlabelled images, 3,000 of them are used; bank, test: labelled images, one folder a class; teacher: weight file of
vit_small_patch14_dinov2; features: folder that keeps the teacher's features. 'dense' hides nothing: half as many epochs cost
about the time of H-GKD's four; 'dense, equal images' sees as many images.
"""

_base_ = "../_base_/comparisons/cifar128.py"

options = dict(epochs=4, warmup_epochs=0.25)
_teacher = dict(teacher_checkpoint="{teacher}", teacher_features="{features}")
_dense = "configs/hgkd/hgkd-dense_vit-s14_resnet18_10e_cifar128.py"
rows = [
    dict(name="H-GKD", config="configs/hgkd/hgkd_vit-s14_resnet18_10e_cifar128.py", options=dict(**_teacher), seeds=[0, 1, 2]),
    dict(name="pixels", config="configs/spark/spark_resnet18_10e_cifar128.py", seeds=[0, 1, 2]),
    dict(name="dense", config=_dense, options=dict(epochs=2, **_teacher), seeds=[0, 1, 2]),
    dict(name="random", backbone="resnet18"),
    dict(name="teacher, block 9", backbone="vit_small_patch14_dinov2", checkpoint="{teacher}", block=9),
    dict(name="dense, equal images", config=_dense, options=dict(**_teacher)),
]
