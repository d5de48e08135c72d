"""DMAE on CIFAR-10 at 128 pixels with a ViT student: ViT-Tiny/16 from a DINOv2 ViT-S/14.

Mask ratio 0.75 and student block index 8 of 12: DMAE's script. The rest as dmae_vit-s14_resnet18_10e_cifar128.
"""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/schedules/adamw_cosine.py",
    "../_base_/data/cifar128.py",
]

lr = 2e-3  # for 64 images, i.e. 1e-3 for 32
teacher_checkpoint = None
mask_ratio = 0.75

model = dict(
    type="MaskedDistiller",
    flip=0.5,
    student=dict(type="MaskedViT", arch="tiny"),
    mask=dict(type="RandomMask", rounding="floor"),
    teacher=dict(type="TimmTeacher", name="vit_small_patch14_dinov2"),
    objectives=dict(
        dmae=dict(type="DMAE", taps=((8, 8),), projector="linear", weight=10.0),
        pixels=dict(type="PixelReconstruction", supervise="masked"),
    ),
)
