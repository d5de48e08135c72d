"""UPerNet, ResNet-18, 80,000 steps of 8 images on Cityscapes, 512 x 1024 px."""

_base_ = "./upernet_r50_80k_cityscapes.py"
model = dict(
    backbone=_base_.resnet18,
    decode_head=dict(in_channels=_base_.widths.resnet18),
    auxiliary_head=dict(in_channels=256, channels=64),
)
