"""G2SD's generic target on CIFAR-10 at 128 pixels: ResNet-18 with its UNet decoder from a small MAE.

Target after decoder block 4, smooth L1 with beta 2, all places: G2SD's released run. The rest as
hgkd_vit-s14_resnet18_10e_cifar128.

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
    objectives=dict(g2sd=dict(type="G2SD", decoder_block=3, supervise="all")),
)
