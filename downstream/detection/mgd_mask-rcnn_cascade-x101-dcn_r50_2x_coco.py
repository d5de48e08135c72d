"""MGD, Cascade Mask R-CNN X101-32x4d-DCN -> Mask R-CNN R-50, 2x on COCO. Published (arXiv 2205.01529): 35.4 -> 38.1 mask AP.

Teacher's file in the release: cascade_mask_rcnn_x101_32x4d_fpn_dconv_c3-c5_1x_coco-e75f90c8.pth of OpenMMLab. Ratio 0.45 and
alpha 5e-7 are the release's for two-stage detectors; it does not start the student from the teacher's head here.
"""

_base_ = ["mmdet::mask_rcnn/mask-rcnn_r50_fpn_2x_coco.py", "../_base_/distillation.py"]
model = dict(
    _delete_=True,
    type="hgkd.FeatureDistiller",
    student=_base_.model,
    teacher="mmdet::dcn/cascade-mask-rcnn_x101-32x4d-dconv-c3-c5_fpn_1x_coco.py",
    teacher_checkpoint=None,
    taps=_base_.mgd_fpn_two_stage,
    inherit=False,
)
optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
