"""RetinaNet, ResNet-18-FPN, BCCD at 160 px: a small head and small anchors, for 2 CPU cores."""

_base_ = [
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "mmdet::_base_/default_runtime.py",
    "../_base_/bccd.py",
    "../_base_/small_12e.py",
    "../_base_/student.py",
]
model = dict(
    backbone=_base_.resnet18,
    neck=dict(in_channels=_base_.widths.resnet18, out_channels=64, norm_cfg=dict(type="BN")),
    bbox_head=dict(
        in_channels=64,
        feat_channels=64,
        stacked_convs=2,
        num_classes=3,
        anchor_generator=dict(octave_base_scale=2),
    ),
)
# 205 images leave a last batch of one, of whose coarsest map, often a single place, no norm can take statistics
train_dataloader = dict(drop_last=True)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=3, max_keep_ckpts=2))
