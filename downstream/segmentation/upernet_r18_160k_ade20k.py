"""UPerNet, ResNet-18, 160,000 steps of 16 images on ADE20K, 512 px."""

_base_ = "./upernet_r50_160k_ade20k.py"
model = dict(
    backbone=_base_.resnet18,
    decode_head=dict(in_channels=_base_.widths.resnet18),
    auxiliary_head=dict(in_channels=256, channels=64),
)
