"""UPerNet, ResNet-18, CamVid at 240 px: a small head, for 2 CPU cores."""

_base_ = [
    "mmseg::_base_/models/upernet_r50.py",
    "mmseg::_base_/default_runtime.py",
    "../_base_/camvid.py",
    "../_base_/small_1k.py",
    "../_base_/student.py",
]
norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=_base_.crop_size, seg_pad_val=_base_.ignored_label),
    backbone=dict(type="ResNet", norm_cfg=norm_cfg, **_base_.resnet18),
    decode_head=dict(
        in_channels=_base_.widths.resnet18, channels=64, num_classes=11, norm_cfg=norm_cfg, ignore_index=_base_.ignored_label
    ),
    auxiliary_head=dict(in_channels=256, channels=64, num_classes=11, norm_cfg=norm_cfg, ignore_index=_base_.ignored_label),
)
