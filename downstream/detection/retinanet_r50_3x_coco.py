"""RetinaNet, ResNet-50-FPN, 3x on COCO, sides from 640 to 800.

mmdet's recipe with SyncBN, in the FPN too, and nothing frozen.
"""

_base_ = ["mmdet::retinanet/retinanet_r50_fpn_ms-640-800-3x_coco.py", "../_base_/student.py"]
model = dict(backbone=_base_.resnet50, neck=dict(norm_cfg=dict(type="BN")))
