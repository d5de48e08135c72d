"""H-GKD, target 'inferred', on CIFAR-10 at 128 pixels: the teacher sees the visible cells only and infers the others.

Smooth L1 with beta 2 on normalised tokens: G2SD's form (arXiv 2302.14771). The rest as hgkd_vit-s14_resnet18_10e_cifar128.

teacher_checkpoint: the last checkpoint of mae_vit-ti16_100e_cifar128.
"""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/schedules/adamw_cosine.py",
    "../_base_/students/resnet18.py",
    "../_base_/data/cifar128.py",
]

lr = 2e-3  # for 64 images, i.e. 1e-3 for 32
teacher_checkpoint = None

model = dict(
    flip=0.5,
    teacher=dict(type="MAETeacher"),
    objectives=dict(hgkd=dict(type="HGKD", target="inferred", block=9, decoder_block=3, supervise="all")),
)
