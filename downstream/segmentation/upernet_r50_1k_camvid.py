"""UPerNet, ResNet-50, CamVid at 240 px: a teacher for mgd_ and g2sd_upernet_r50_r18_1k_camvid.py."""

_base_ = "./upernet_r18_1k_camvid.py"
model = dict(
    backbone=_base_.resnet50,
    decode_head=dict(in_channels=_base_.widths.resnet50),
    auxiliary_head=dict(in_channels=1024),
)
