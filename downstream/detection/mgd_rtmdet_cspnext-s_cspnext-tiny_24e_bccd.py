"""MGD between two RTMDets on BCCD, for 2 CPU cores: s -> tiny. Train the teacher first (rtmdet_cspnext-s_24e_bccd.py)."""

_base_ = ["./rtmdet_cspnext-tiny_24e_bccd.py"]
find_unused_parameters = True
model = dict(
    _delete_=True,
    type="hgkd.FeatureDistiller",
    student=_base_.model,
    teacher=dict(
        _base_.model,
        backbone=dict(_base_.model.backbone, deepen_factor=0.33, widen_factor=0.5),
        neck=dict(_base_.model.neck, in_channels=[128, 256, 512], out_channels=128),
        bbox_head=dict(_base_.model.bbox_head, in_channels=128, feat_channels=128),
    ),
    teacher_checkpoint=None,
    taps=[dict(student="neck", loss=dict(mask="position", ratio=0.65, alpha=1.0, reduction="mean"))],
)
