"""Recommended for one GPU: G2SD's generic target for a CNN, ResNet-50 from an MAE ViT-B/16 with its decoder.

Target and loss: G2SD (arXiv 2302.14771), all places as in its released run; mask ratio 0.6: SparK. The schedule is a guess,
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
    teacher=dict(type="MAETeacher", dtype="bfloat16"),
    objectives=dict(g2sd=dict(type="G2SD", decoder_block=3, supervise="all")),
)
