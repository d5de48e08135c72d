"""ViT-B/16 as MAE fine-tunes it: 100 epochs, 8 GPUs x 128 images.

Never run here. Learning rate 5e-4 for 256 images, layer decay 0.65, stochastic depth 0.1, pooled patch tokens (FINETUNE.md).
The rest: _base_/mae.py. Published: 83.6 from MAE's pretraining, 84.0 from DMAE's (arXiv 2208.12256). ``backbone=``: MAE's
file, or a checkpoint of distillation with a ViT student.
"""

_base_ = ["./_base_/mae.py"]

epochs = 100
lr = 5e-4

model = dict(classifier=dict(name="vit_base_patch16_224.mae", drop_path=0.1, global_pool="avg"))
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.65))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=True, begin=0, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min_ratio=5e-4, by_epoch=True, convert_to_iter_based=True),
]
