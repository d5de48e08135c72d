"""Control of hgkd_vit-s14_resnet18_10e_cifar128: the same with nothing hidden, i.e. ordinary feature distillation.

It computes the whole image, so a step costs more; compare at equal time as well as at equal epochs.
"""

_base_ = ["./hgkd_vit-s14_resnet18_10e_cifar128.py"]

mask_ratio = 0.0
