"""For one GPU, 100 epochs at batch 256 (which the recipes set): AdamW 1e-3. This project's guess, never run."""

_base_ = ["./adamw_cosine.py"]

epochs = 100
warmup_epochs = 5
lr = 1e-3

auto_scale_lr = dict(base_batch_size=256)
train_cfg = dict(val_interval=10)
