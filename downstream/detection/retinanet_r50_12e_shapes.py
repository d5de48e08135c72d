"""RetinaNet, ResNet-50-FPN, on generated shapes: a teacher for mgd_retinanet_r50_r18_12e_shapes.py."""

_base_ = "./retinanet_r18_12e_shapes.py"
model = dict(backbone=_base_.resnet50, neck=dict(in_channels=_base_.widths.resnet50))
