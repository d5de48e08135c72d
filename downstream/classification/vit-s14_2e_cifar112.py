"""A teacher for the small recipes: DINOv2's ViT-S/14 fine-tuned on CIFAR-10 at 112 pixels (8 x 8 tokens).

Layer decay 0.75 (MAE, arXiv 2111.06377), AdamW 5e-4 for 64 images, two epochs: this project's guess.

backbone: a weight file of vit_small_patch14_dinov2 in timm's naming.
"""

_base_ = ["./_base_/runtime.py", "../../configs/_base_/schedules/adamw_cosine.py", "./_base_/cifar128.py"]

epochs = 2
warmup_epochs = 0.25
lr = 5e-4
image_size = 112
backbone = None
model = dict(
    type="ClassifierTraining",
    classifier=dict(name="vit_small_patch14_dinov2", drop_path=0.1),
    labels=dict(smoothing=0.1),
)
optim_wrapper = dict(constructor="LayerDecayConstructor", paramwise_cfg=dict(layer_decay=0.75))
