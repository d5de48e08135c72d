"""RetinaNet, ResNet-50-FPN, BCCD at 160 px: a teacher for mgd_retinanet_r50_r18_12e_bccd.py."""

_base_ = "./retinanet_r18_12e_bccd.py"
model = dict(backbone=_base_.resnet50, neck=dict(in_channels=_base_.widths.resnet50))
