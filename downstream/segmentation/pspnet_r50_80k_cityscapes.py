"""PSPNet, ResNet-50, output stride 8, 80,000 steps of 8 images on Cityscapes, 512 x 1024 px.

mmseg's recipe on the plain ResNet (not V1c), with SyncBN in every part.
"""

_base_ = ["mmseg::pspnet/pspnet_r50-d8_4xb2-80k_cityscapes-512x1024.py", "../_base_/student.py"]
norm_cfg = dict(type="BN")
model = dict(
    pretrained=None,
    backbone=dict(type="ResNet", norm_cfg=norm_cfg, **_base_.resnet50),
    decode_head=dict(norm_cfg=norm_cfg),
    auxiliary_head=dict(norm_cfg=norm_cfg),
)
