"""UPerNet, ConvNeXt-T, 160,000 steps of 16 images on ADE20K, 512 px.

AdamW with a learning rate that falls from stage to stage, as in ConvNeXt's paper (which shows UPerNet on ADE20K).
"""

_base_ = "./upernet_r50_160k_ade20k.py"
model = dict(
    backbone=_base_.convnext_tiny,
    decode_head=dict(in_channels=_base_.widths.convnext_tiny),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = _base_.stage_decay
param_scheduler = _base_.linear_160k
