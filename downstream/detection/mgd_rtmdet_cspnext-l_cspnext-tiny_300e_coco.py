"""MGD, RTMDet-l -> RTMDet-tiny on COCO. Never run here, and not a setting of the paper (arXiv 2205.01529).

Mask share and weight are its one-stage detectors' (every level of the neck). Both networks take mmdet's BGR images, because the
teacher's published weights (rtmdet_l_8xb32-300e_coco_20220719_112030-5a0be7c4.pth of OpenMMLab) do: backbone=FILE takes
weights of that kind. For a student of hgkd, which takes RGB, train the teacher with the pixels of _base_/student.py and set
model.student.data_preprocessor and model.teacher.data_preprocessor to them.
"""

_base_ = ["mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py", "../_base_/distillation.py"]
model = dict(
    _delete_=True,
    type="hgkd.FeatureDistiller",
    student=_base_.model,
    teacher="mmdet::rtmdet/rtmdet_l_8xb32-300e_coco.py",
    teacher_checkpoint=None,
    taps=_base_.mgd_fpn,
)
