"""MGD, SOLO R-101 -> SOLO R-50, 1x on COCO. Published (arXiv 2205.01529): 33.1 -> 36.2 mask AP.

Teacher in the release: SOLO R-101 trained for 3x with several scales (its authors' own file). mmdet 3 has no config of it, so
the teacher is the student's with 101 layers. Four levels of the FPN, as in the release.
"""

_base_ = ["mmdet::solo/solo_r50_fpn_1x_coco.py", "../_base_/distillation.py"]
model = dict(
    _delete_=True,
    type="hgkd.FeatureDistiller",
    student=_base_.model,
    teacher=dict(_base_.model, backbone=dict(_base_.model.backbone, depth=101)),
    teacher_checkpoint=None,
    taps=[dict(_base_.mgd_fpn[0], levels=(0, 1, 2, 3))],
    inherit=True,
)
optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
