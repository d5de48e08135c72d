"""What recipes A2 and A3 of "ResNet strikes back" (arXiv 2110.00476, table 2) share.

LAMB, weight decay 0.02, batch 2048, 5 epochs of warm-up (from 1e-4) and a cosine to 1e-6; binary cross entropy without label
smoothing; mixup 0.1, CutMix 1.0; test crops of 95 %. Targets above 0.2 count as 1: timm's files of these recipes
(bce_target_thresh).
"""

_base_ = ["./runtime.py", "../../../configs/_base_/schedules/adamw_cosine.py", "./imagenet.py"]

batch_size = 256
warmup_epochs = 5

model = dict(
    type="ClassifierTraining",
    classifier=dict(name="resnet50"),
    labels=dict(loss="bce", threshold=0.2, smoothing=0.0, mixup=0.1, cutmix=1.0),
)
val_dataloader = dict(dataset=dict(resize_ratio=1 / 0.95))
optim_wrapper = dict(optimizer=dict(_delete_=True, type="timm.optim.Lamb", weight_decay=0.02), clip_grad=None)
auto_scale_lr = dict(base_batch_size=2048)
train_cfg = dict(val_interval=10)
