"""MGD in fine-tuning on CIFAR-10 at 128 pixels: ResNet-18 with labels, and the last map of a DINOv2 ViT-S/14.

As resnet18_10e_cifar128, with MGD (arXiv 2205.01529): channel mask, ratio 0.15. Its published weight is for CNN teachers,
whose maps have another scale; here the tokens are normalised and the loss is mean-reduced, with weight 1.

teacher_checkpoint: a weight file of vit_small_patch14_dinov2 in timm's naming. Its input is 112 px, 8 x 8 tokens.
"""

_base_ = ["./resnet18_10e_cifar128.py"]

teacher_checkpoint = None
model = dict(
    teacher=dict(type="ClassifierTeacher", name="vit_small_patch14_dinov2", backbone_only=True, image_size=112),
    objectives=dict(mgd=dict(type="FeatureMapMGD", normalise=True, mask="channel", ratio=0.15, alpha=1.0, reduction="mean")),
)
