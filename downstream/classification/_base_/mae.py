"""What MAE's and G2SD's fine-tuning share (facebookresearch/mae, FINETUNE.md and main_finetune.py; arXiv 2111.06377).

AdamW, weight decay 0.05, 5 epochs of warm-up, cosine to 1e-6 (scaled layer by layer, as there), batch 1024; RandAugment
9/0.5, erasing 0.25, mixup 0.8, CutMix 1.0, label smoothing 0.1; heads start from std 2e-5; test crops of 224 from 256
px. Learning rates are for 256 images. The warm-up begins at 0.1 % of the rate, there at 0.
"""

_base_ = ["./runtime.py", "../../../configs/_base_/schedules/adamw_cosine.py", "./imagenet.py"]

warmup_epochs = 5
batch_size = 128
image_size = 224
backbone = None

model = dict(
    type="ClassifierTraining",
    classifier=dict(head_std=2e-5),
    labels=dict(smoothing=0.1, mixup=0.8, cutmix=1.0),
    erasing=0.25,
)
train_dataloader = dict(dataset=dict(transform=dict(auto_augment="rand-m9-mstd0.5-inc1")))
val_dataloader = dict(dataset=dict(resize_ratio=256 / 224))
optim_wrapper = dict(constructor="LayerDecayConstructor", optimizer=dict(weight_decay=0.05), clip_grad=None)
auto_scale_lr = dict(base_batch_size=256)
train_cfg = dict(val_interval=10)
