"""Recommended for one GPU: MGD as the objective of masked distillation, ResNet-50 from a DINOv2 ViT-B/14.

MGD (arXiv 2205.01529) is published beside a supervised loss on labelled images; this is its generation of the teacher's map
alone, mean-reduced, on normalised tokens, with the ratio of hidden positions of its detection setting. The rest is a guess,
never run.
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
    objectives=dict(mgd=dict(type="MGD", feature="decoded", block=9, supervise="all", mask="position", ratio=0.65)),
)
