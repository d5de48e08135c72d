"""ResNet-50, recipe A2 of "ResNet strikes back" (arXiv 2110.00476, table 2): 300 epochs, 8 GPUs x 256 images.

Never run here. Learning rate 5e-3, RandAugment 7/0.5, stochastic depth 0.05, repeated augmentation (3); the rest:
_base_/lamb_bce.py. Published top-1 of random initialisation: 79.8. ``backbone=`` starts it from a distilled student instead.
"""

_base_ = ["./_base_/lamb_bce.py"]

epochs = 300
lr = 5e-3
image_size = 224
backbone = None

model = dict(classifier=dict(drop_path=0.05))
train_dataloader = dict(
    dataset=dict(transform=dict(auto_augment="rand-m7-mstd0.5-inc1")),
    sampler=dict(repeats=3),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.02, by_epoch=True, begin=0, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min_ratio=2e-4, by_epoch=True, convert_to_iter_based=True),
]
