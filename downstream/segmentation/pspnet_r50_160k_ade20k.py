"""PSPNet, ResNet-50, output stride 8, 160,000 steps of 16 images on ADE20K, 512 px.

mmseg's recipe on the plain ResNet (not V1c), with SyncBN in every part.
"""

_base_ = ["mmseg::pspnet/pspnet_r50-d8_4xb4-160k_ade20k-512x512.py", "../_base_/student.py"]
norm_cfg = dict(type="BN")
model = dict(
    pretrained=None,
    backbone=dict(type="ResNet", norm_cfg=norm_cfg, **_base_.resnet50),
    decode_head=dict(norm_cfg=norm_cfg),
    auxiliary_head=dict(norm_cfg=norm_cfg),
)
