"""MGD, PSPNet R-101 -> PSPNet R-18, 40,000 steps on Cityscapes at 512 px. Published (arXiv 2205.01529): 69.85 -> 73.63 mIoU.

Teacher's file in the release: pspnet_r101-d8_512x1024_40k_cityscapes_20200604_232751-467e7cf4.pth of OpenMMLab. The release
adds channel-wise distillation of the logits with weight 3, and does not start the student from the teacher's head.
The student's backbone is a ResNetV1c and starts from OpenMMLab's resnet18_v1c; an export of resnet18 needs
model.student.backbone.type=ResNet.
"""

_base_ = ["mmseg::_base_/models/pspnet_r50-d8.py", "../_base_/cityscapes_512_40k.py", "../_base_/distillation.py"]
_student = dict(
    _base_.model,
    data_preprocessor=dict(_base_.model.data_preprocessor, size=_base_.crop_size),
    pretrained=None,
    backbone=dict(_base_.model.backbone, depth=18),
    decode_head=dict(_base_.model.decode_head, in_channels=512, channels=128),
    auxiliary_head=dict(_base_.model.auxiliary_head, in_channels=256, channels=64),
)
model = dict(
    _delete_=True,
    type="hgkd.FeatureDistiller",
    student=_student,
    teacher="mmseg::pspnet/pspnet_r101-d8_4xb2-40k_cityscapes-512x1024.py",
    teacher_checkpoint=None,
    taps=_base_.mgd_last_map,
    logits=3.0,
    inherit=False,
)
