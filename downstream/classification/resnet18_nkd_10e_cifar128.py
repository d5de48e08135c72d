"""NKD (arXiv 2303.13005) on CIFAR-10 at 128 pixels: ResNet-18 from a fine-tuned teacher.

As resnet18_10e_cifar128, with NKD added to the label loss: gamma 1.5 and temperature 1, the paper's for ImageNet.
"""

_base_ = ["./resnet18_10e_cifar128.py"]

teacher_checkpoint = None
model = dict(
    teacher=dict(type="ClassifierTeacher"),
    objectives=dict(nkd=dict(type="NKD", temperature=1.0, gamma=1.5)),
)
