"""ConvNeXt-S as SparK fine-tunes it (arg.py of its released code): AdamW, 400 epochs, 8 GPUs x 512 images.

Never run here. Learning rate 2e-4 for 256 images, weight decay 0.01, 20 epochs of warm-up, mixup 0.8, stochastic depth 0.3,
repeated augmentation (3), cross entropy. The rest: _base_/spark.py. Published: 84.1 from SparK's own pretraining.
"""

_base_ = ["./_base_/spark.py"]

epochs = 400
warmup_epochs = 20
lr = 2e-4

model = dict(classifier=dict(name="convnext_small", drop_path=0.3), labels=dict(mixup=0.8))
train_dataloader = dict(sampler=dict(repeats=3))
optim_wrapper = dict(
    optimizer=dict(weight_decay=0.01),
    paramwise_cfg=dict(layer_decay=0.7, blocks_per_layer=(3, 3, 3, 3)),
)
