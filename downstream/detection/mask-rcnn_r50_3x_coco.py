"""Mask R-CNN, ResNet-50-FPN, 3x on COCO, sides from 640 to 800.

mmdet's recipe with SyncBN, in the FPN too, and nothing frozen.
"""

_base_ = ["mmdet::mask_rcnn/mask-rcnn_r50_fpn_ms-poly-3x_coco.py", "../_base_/student.py"]
model = dict(backbone=_base_.resnet50, neck=dict(norm_cfg=dict(type="BN")))
