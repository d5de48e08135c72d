"""G2SD's specific stage for a CNN on CIFAR-10 at 128 pixels: ResNet-18 with two heads, hard labels of a teacher.

As resnet18_10e_cifar128, with G2SD's loss (arXiv 2302.14771): half label, half the teacher's answer on the second head.

backbone: a student of the generic stage (g2sd_mae-ti16_resnet18_10e_cifar128). teacher_checkpoint: a classifier of the same
classes, e.g. of vit-s14_2e_cifar112 or resnet18_10e_cifar128.
"""

_base_ = ["./resnet18_10e_cifar128.py"]

teacher_checkpoint = None
model = dict(
    classifier=dict(two_heads=True),
    label_weight=0.5,
    teacher=dict(type="ClassifierTeacher"),
    objectives=dict(hard=dict(type="HardLabelKD", weight=0.5)),
)
