"""MAE's schedule (arXiv 2111.06377; facebookresearch/mae, PRETRAIN.md and main_pretrain.py), for batch 4096.

AdamW with betas (0.9, 0.95), weight decay 0.05, learning rate 1.5e-4 per 256 images, 40 epochs of warm-up, no clipping. The
warm-up begins at 1 % of the learning rate, there at 0.
"""

_base_ = ["./adamw_cosine.py"]

warmup_epochs = 40
lr = 1.5e-4

optim_wrapper = dict(optimizer=dict(betas=(0.9, 0.95)), clip_grad=None)
auto_scale_lr = dict(base_batch_size=256)
train_cfg = dict(val_interval=10)
