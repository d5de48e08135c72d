"""Mask R-CNN, ResNet-18-FPN, 3x on COCO."""

_base_ = "./mask-rcnn_r50_3x_coco.py"
model = dict(backbone=_base_.resnet18, neck=dict(in_channels=_base_.widths.resnet18))
