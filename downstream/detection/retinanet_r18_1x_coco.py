"""RetinaNet, ResNet-18-FPN, 1x on COCO."""

_base_ = "./retinanet_r50_1x_coco.py"
model = dict(backbone=_base_.resnet18, neck=dict(in_channels=_base_.widths.resnet18))
