"""Recommended for one GPU: a ViT-Tiny/16 MAE on your images, as teacher for decoder targets or as a student's start.

Method and mask ratio: MAE (arXiv 2111.06377). Epochs and learning rate: this project's guess, never run.
"""

_base_ = [
    "../_base_/mae_runtime.py",
    "../_base_/schedules/one_gpu.py",
    "../_base_/data/imagenet.py",
]

batch_size = 256
epochs = 300
warmup_epochs = 20

model = dict(type="MAEPretraining", arch="tiny", patch_size=16, mask_ratio=0.75, norm_pix=True)
optim_wrapper = dict(optimizer=dict(betas=(0.9, 0.95)))
