"""Recommended for one GPU: DMAE's alignment for a CNN, ResNet-50 from a DINOv2 ViT-B/14, pixels beside it.

Loss: DMAE (arXiv 2208.12256) at visible positions, from the stage of stride 16; teacher block at 3/4 of its depth, as published.
A two-layer projector, because CNN and ViT features differ more than those of two ViTs, and the weight 10, because the mean L1
of unit vectors of 768 channels is near 0.03: this project's guesses, never run.
"""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/schedules/one_gpu.py",
    "../_base_/students/resnet50.py",
    "../_base_/data/imagenet.py",
]

batch_size = 256
teacher_checkpoint = None

model = dict(
    teacher=dict(type="TimmTeacher", name="vit_base_patch14_dinov2", dtype="bfloat16"),
    objectives=dict(
        dmae=dict(type="DMAE", taps=((None, 8),), projector="mlp", weight=10.0),
        pixels=dict(type="PixelReconstruction", supervise="masked"),
    ),
)
custom_hooks = [*_base_.custom_hooks, dict(type="TermShareHook")]
