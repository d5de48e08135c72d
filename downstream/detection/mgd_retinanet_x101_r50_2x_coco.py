"""MGD, RetinaNet X101-64x4d -> RetinaNet R-50, 2x on COCO. Published (arXiv 2205.01529): 37.4 -> 41.0 box AP.

Teacher's file in the release: retinanet_x101_64x4d_fpn_mstrain_3x_coco_20210719_051838-022c2187.pth of OpenMMLab.
"""

_base_ = ["mmdet::retinanet/retinanet_r50_fpn_2x_coco.py", "../_base_/distillation.py"]
model = dict(
    _delete_=True,
    type="hgkd.FeatureDistiller",
    student=_base_.model,
    teacher="mmdet::retinanet/retinanet_x101-64x4d_fpn_1x_coco.py",
    teacher_checkpoint=None,
    taps=_base_.mgd_fpn,
    inherit=True,
)
optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
