"""DeepLabV3, ResNet-18, output stride 8, 80,000 steps of 8 images on Cityscapes, 512 x 1024 px."""

_base_ = "./deeplabv3_r50_80k_cityscapes.py"
model = dict(
    backbone=_base_.resnet18,
    decode_head=dict(in_channels=512, channels=128),
    auxiliary_head=dict(in_channels=256, channels=64),
)
