"""What SparK's fine-tuning recipes share (arXiv 2301.03580; keyu-tian/SparK, downstream_imagenet: all files).

Batch 4096, warm-up from 0.005 and cosine to 0.001 of the learning rate, layer decay 0.7, TrivialAugment, erasing 0.25, CutMix
1.0, label smoothing 0.1, moving average 0.9999 (buffers too), test crops of 95 %, synchronised BatchNorm. Its
blocks_per_layer are those of its models/__init__.py.
"""

_base_ = ["./runtime.py", "../../../configs/_base_/schedules/adamw_cosine.py", "./imagenet.py"]

batch_size = 512
image_size = 224
backbone = None
sync_bn = True

model = dict(type="ClassifierTraining", labels=dict(smoothing=0.1, cutmix=1.0), erasing=0.25)
train_dataloader = dict(dataset=dict(transform=dict(auto_augment="trivial")))
val_dataloader = dict(dataset=dict(resize_ratio=1 / 0.95))
optim_wrapper = dict(constructor="LayerDecayConstructor", clip_grad=None)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.005, by_epoch=True, begin=0, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.001, by_epoch=True, convert_to_iter_based=True),
]
custom_hooks = [dict(type="EMAHook", momentum=1e-4, update_buffers=True), *_base_.custom_hooks]
auto_scale_lr = dict(base_batch_size=256)
train_cfg = dict(val_interval=10)
