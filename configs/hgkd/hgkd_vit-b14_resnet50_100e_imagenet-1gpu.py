"""Recommended for one GPU: H-GKD, ResNet-50 from a DINOv2 ViT-B/14, on your images.

Objective: this project's definition (docs/background/methods.md), smooth L1 with beta 2 from G2SD, mask ratio 0.6 from SparK.
Block, schedule and learning rate are guesses, never run.

teacher_checkpoint: vit_base_patch14_dinov2 in timm's, the official or Hugging Face naming.
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
    objectives=dict(hgkd=dict(type="HGKD", target="full", block=9, supervise="all")),
)
