"""Plain logit distillation on CIFAR-10 at 128 pixels: ResNet-18 from a fine-tuned teacher, the control of G2SD and NKD.

As resnet18_10e_cifar128, with T^2 KL at temperature 4 (arXiv 1503.02531), label and teacher weighted 0.5 each: a common
choice.
"""

_base_ = ["./resnet18_10e_cifar128.py"]

teacher_checkpoint = None
model = dict(
    label_weight=0.5,
    teacher=dict(type="ClassifierTeacher"),
    objectives=dict(kd=dict(type="LogitKD", temperature=4.0, weight=0.5)),
)
