"""G2SD's specific stage on CIFAR-10 at 128 pixels: ViT-Tiny/16 with class and distillation token, hard labels.

As vit-ti16_10e_cifar128, with G2SD's loss (arXiv 2302.14771) and its layer decay 0.75.

backbone: a student of the generic stage (g2sd_mae-ti16_vit-ti16_10e_cifar128). teacher_checkpoint: a classifier of the same
classes.
"""

_base_ = ["./vit-ti16_10e_cifar128.py"]

teacher_checkpoint = None
model = dict(
    classifier=dict(_delete_=True, name="deit_tiny_distilled_patch16_224"),
    label_weight=0.5,
    teacher=dict(type="ClassifierTeacher"),
    objectives=dict(hard=dict(type="HardLabelKD", weight=0.5)),
)
