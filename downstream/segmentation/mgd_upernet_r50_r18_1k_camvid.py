"""MGD on CamVid, for 2 CPU cores: UPerNet R-50 -> R-18. Train the teacher first (upernet_r50_1k_camvid.py)."""

_base_ = ["./upernet_r18_1k_camvid.py"]
find_unused_parameters = True
model = dict(
    _delete_=True,
    type="hgkd.FeatureDistiller",
    student=_base_.model,
    teacher=dict(
        _base_.model,
        backbone=dict(_base_.model.backbone, depth=50),
        decode_head=dict(_base_.model.decode_head, in_channels=_base_.widths.resnet50),
        auxiliary_head=dict(_base_.model.auxiliary_head, in_channels=1024),
    ),
    teacher_checkpoint=None,
    taps=[dict(student="backbone", levels=(-1,), loss=dict(mask="position", ratio=0.75, alpha=1.0, reduction="mean"))],
)
