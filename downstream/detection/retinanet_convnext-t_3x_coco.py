"""RetinaNet, ConvNeXt-T-FPN, 3x on COCO.

AdamW with layer-wise decay of the learning rate, as in ConvNeXt's paper (which trains 3x).
"""

_base_ = "./retinanet_r50_3x_coco.py"
model = dict(backbone=_base_.convnext_tiny, neck=dict(in_channels=_base_.widths.convnext_tiny))
optim_wrapper = _base_.layer_decay
