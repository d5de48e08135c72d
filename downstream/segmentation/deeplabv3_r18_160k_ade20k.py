"""DeepLabV3, ResNet-18, output stride 8, 160,000 steps of 16 images on ADE20K, 512 px."""

_base_ = "./deeplabv3_r50_160k_ade20k.py"
model = dict(
    backbone=_base_.resnet18,
    decode_head=dict(in_channels=512, channels=128),
    auxiliary_head=dict(in_channels=256, channels=64),
)
