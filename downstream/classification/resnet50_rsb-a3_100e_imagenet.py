"""ResNet-50, recipe A3 of "ResNet strikes back" (arXiv 2110.00476, table 2): 100 epochs, 8 GPUs x 256 images.

Never run here. Trained at 160 px, tested at 224; learning rate 8e-3, RandAugment 6/0.5, no stochastic depth, no repeated
augmentation; the rest: _base_/lamb_bce.py. Published top-1 of random initialisation: 78.1. ``backbone=`` starts it from a
distilled student instead.
"""

_base_ = ["./_base_/lamb_bce.py"]

epochs = 100
lr = 8e-3
backbone = None

model = dict(image_size=160)
train_dataloader = dict(dataset=dict(image_size=160, transform=dict(auto_augment="rand-m6-mstd0.5-inc1")))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.0125, by_epoch=True, begin=0, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min_ratio=1.25e-4, by_epoch=True, convert_to_iter_based=True),
]
