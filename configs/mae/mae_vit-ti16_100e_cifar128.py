"""A ViT-Tiny/16 MAE on CIFAR-10 at 128 pixels: the teacher of the small recipes that need a decoder (g2sd, hgkd-inferred).

Method, mask ratio, betas: MAE (arXiv 2111.06377). Patches are hidden in cells of 32 pixels, as the CNN students will see
them. Decoder of 4 blocks, 100 epochs: this project's, not tuned.
"""

_base_ = [
    "../_base_/mae_runtime.py",
    "../_base_/schedules/adamw_cosine.py",
    "../_base_/data/cifar128.py",
]

lr = 2e-3  # for 64 images, i.e. 1e-3 for 32
epochs = 100
warmup_epochs = 5

train_dataloader = dict(dataset=dict(transform=dict(_delete_=True, scale=(0.67, 1.0), hflip=0.5)))

model = dict(type="MAEPretraining", arch="tiny", patch_size=16, mask_ratio=0.75, mask_cell=32, norm_pix=True)
optim_wrapper = dict(optimizer=dict(betas=(0.9, 0.95)))
