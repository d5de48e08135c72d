"""ConvNeXt-T as published (arXiv 2201.03545; facebookresearch/ConvNeXt, TRAINING.md): 8 GPUs x 512 images.

Never run here. AdamW, learning rate 4e-3 for 4096 images, weight decay 0.05, 20 epochs of warm-up, cosine to 1e-6;
RandAugment 9/0.5, erasing 0.25, mixup 0.8, CutMix 1.0, label smoothing 0.1, stochastic depth 0.1, moving average 0.9999.
Published top-1 of random initialisation: 82.1. ``backbone=`` starts it from a distilled student instead.
"""

_base_ = ["./_base_/runtime.py", "../../configs/_base_/schedules/adamw_cosine.py", "./_base_/imagenet.py"]

epochs = 300
warmup_epochs = 20
lr = 4e-3
batch_size = 512
image_size = 224
backbone = None

model = dict(
    type="ClassifierTraining",
    classifier=dict(name="convnext_tiny", drop_path=0.1),
    labels=dict(smoothing=0.1, mixup=0.8, cutmix=1.0),
    erasing=0.25,
)
train_dataloader = dict(dataset=dict(transform=dict(auto_augment="rand-m9-mstd0.5-inc1")))
val_dataloader = dict(dataset=dict(resize_ratio=256 / 224))
optim_wrapper = dict(optimizer=dict(weight_decay=0.05), clip_grad=None)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=True, begin=0, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min_ratio=2.5e-4, by_epoch=True, convert_to_iter_based=True),
]
custom_hooks = [dict(type="EMAHook", momentum=1e-4, update_buffers=True), *_base_.custom_hooks]
auto_scale_lr = dict(base_batch_size=4096)
train_cfg = dict(val_interval=10)
