"""Faster R-CNN, ResNet-18-FPN, BCCD at 160 px: a small head and small anchors (cells of 8 to 50 px), for 2 CPU cores."""

_base_ = [
    "mmdet::_base_/models/faster-rcnn_r50_fpn.py",
    "mmdet::_base_/default_runtime.py",
    "../_base_/bccd.py",
    "../_base_/small_12e.py",
    "../_base_/student.py",
]
model = dict(
    backbone=_base_.resnet18,
    neck=dict(in_channels=_base_.widths.resnet18, out_channels=64, norm_cfg=dict(type="BN")),
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(scales=[4])),
    roi_head=dict(bbox_roi_extractor=dict(out_channels=64), bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=3)),
    train_cfg=dict(rpn_proposal=dict(nms_pre=500, max_per_img=300), rcnn=dict(sampler=dict(num=128))),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=300)),
)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=3, max_keep_ckpts=2))
