"""ViT-Tiny/16 on CIFAR-10 at 128 pixels: pooled patch tokens, layer decay 0.75, stochastic depth 0.1.

Sources: MAE's fine-tuning (arXiv 2111.06377) for the form; the rest as resnet18_10e_cifar128.

backbone: a ViT student or MAE of the small recipes (mae_vit-ti16_100e_cifar128, g2sd_mae-ti16_vit-ti16_10e_cifar128, ...).
"""

_base_ = ["./_base_/runtime.py", "../../configs/_base_/schedules/adamw_cosine.py", "./_base_/cifar128.py"]

backbone = None
model = dict(
    type="ClassifierTraining",
    classifier=dict(name="vit_tiny_patch16_224", drop_path=0.1, global_pool="avg"),
    labels=dict(smoothing=0.1),
)
optim_wrapper = dict(constructor="LayerDecayConstructor", paramwise_cfg=dict(layer_decay=0.75))
