"""MGD on generated shapes: RetinaNet R-50 -> R-18. Train the teacher first (retinanet_r50_12e_shapes.py)."""

_base_ = ["./retinanet_r18_12e_shapes.py"]
find_unused_parameters = True
model = dict(
    _delete_=True,
    type="hgkd.FeatureDistiller",
    student=_base_.model,
    teacher=dict(
        _base_.model,
        backbone=dict(_base_.model.backbone, depth=50),
        neck=dict(_base_.model.neck, in_channels=_base_.widths.resnet50),
    ),
    teacher_checkpoint=None,
    taps=[dict(student="neck", loss=dict(mask="position", ratio=0.65, alpha=1.0, reduction="mean"))],
)
