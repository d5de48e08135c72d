"""ResNet-18 on any folder of labelled images (one folder a class), 128 pixels, for two CPU cores or one GPU. A starting point.

RandAugment, erasing, mixup and CutMix at half of their usual strength, stochastic depth 0.05, moving average of the weights,
layer decay 0.9: for some thousands of images and a distilled backbone. Set data_root, val_root, num_classes and backbone;
student= takes any other timm CNN or plain ViT (model.classifier.drop_path=0 for those without stochastic depth).
"""

_base_ = ["./_base_/runtime.py", "../../configs/_base_/schedules/adamw_cosine.py", "./_base_/image_folder.py"]

epochs = 30
warmup_epochs = 2
image_size = 128
backbone = None
model = dict(
    type="ClassifierTraining",
    classifier=dict(name="resnet18", drop_path=0.05),
    labels=dict(smoothing=0.1, mixup=0.2, cutmix=1.0, mix_probability=0.5),
    erasing=0.1,
)
train_dataloader = dict(dataset=dict(transform=dict(scale=(0.3, 1.0), auto_augment="rand-m5-mstd0.5-inc1")))
optim_wrapper = dict(constructor="LayerDecayConstructor", paramwise_cfg=dict(layer_decay=0.9))
custom_hooks = [dict(type="EMAHook", momentum=0.002, update_buffers=True), *_base_.custom_hooks]
