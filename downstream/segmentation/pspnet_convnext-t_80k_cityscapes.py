"""PSPNet, ConvNeXt-T, output stride 8, 80,000 steps of 8 images on Cityscapes, 512 x 1024 px.

AdamW with a learning rate that falls from stage to stage, as in ConvNeXt's paper (which shows UPerNet on ADE20K).
"""

_base_ = "./pspnet_r50_80k_cityscapes.py"
model = dict(
    backbone=dict(output_stride=8, **_base_.convnext_tiny),
    decode_head=dict(in_channels=768),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = _base_.stage_decay
param_scheduler = _base_.linear_80k
