"""MGD, RepPoints X101-DCN -> RepPoints R-50, 2x on COCO. Published (arXiv 2205.01529): 38.6 -> 42.3 box AP.

Teacher's file in the release: reppoints_moment_x101_fpn_dconv_c3-c5_gn-neck+head_2x_coco_20200329-f87da1ea.pth of OpenMMLab.
The release compares the FPN's convolutions (neck.fpn_convs.N.conv), here before the group normalisation of this FPN.
"""

_base_ = ["mmdet::reppoints/reppoints-moment_r50_fpn-gn_head-gn_2x_coco.py", "../_base_/distillation.py"]
model = dict(
    _delete_=True,
    type="hgkd.FeatureDistiller",
    student=_base_.model,
    teacher="mmdet::reppoints/reppoints-moment_x101-dconv-c3-c5_fpn-gn_head-gn_2x_coco.py",
    teacher_checkpoint=None,
    taps=_base_.mgd_fpn_convolutions,
    inherit=True,
)
optim_wrapper = dict(clip_grad=dict(max_norm=35, norm_type=2))
