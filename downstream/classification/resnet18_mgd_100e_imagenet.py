"""MGD for classification as published (arXiv 2205.01529): ResNet-18 from ResNet-34, 8 GPUs x 32 images.

Never run here. Source: yzd-v/MGD, cls/configs/distillers/res34_distill_res18_img.py (ratio 0.15, alpha 7e-5, last feature
map) over mmcls' resnet18_b32x8_imagenet: SGD 0.1 for 256 images, momentum 0.9, weight decay 1e-4 on everything, a tenth at
epochs 30, 60 and 90, random crops and flips only. Published: 69.90 without, 71.69 with.

teacher_checkpoint: a ResNet-34 classifier in timm's naming.
"""

_base_ = ["./_base_/runtime.py", "./_base_/imagenet.py"]

epochs = 100
lr = 0.1
batch_size = 32
image_size = 224
backbone = None
teacher_checkpoint = None

model = dict(
    type="ClassifierTraining",
    classifier=dict(name="resnet18"),
    teacher=dict(type="ClassifierTeacher", name="resnet34"),
    objectives=dict(mgd=dict(type="FeatureMapMGD", mask="channel", ratio=0.15, alpha=7e-5, reduction="sum")),
)
train_dataloader = dict(dataset=dict(transform=dict(_delete_=True, kind="train", scale=(0.08, 1.0))))
val_dataloader = dict(dataset=dict(resize_ratio=256 / 224))
train_cfg = dict(by_epoch=True, val_interval=10)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="SGD", momentum=0.9, weight_decay=1e-4))
param_scheduler = [dict(type="MultiStepLR", by_epoch=True, milestones=[30, 60, 90], gamma=0.1)]
auto_scale_lr = dict(enable=True, base_batch_size=256)
