"""G2SD's generic distillation on CIFAR-10 at 128 pixels with a ViT student: ViT-Tiny/16 from a small MAE of its own size.

As g2sd_mae-ti16_resnet18_10e_cifar128, with mask ratio 0.75 (G2SD) and the released tiny decoder (4 blocks x 128, 4 heads).
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
    student=dict(type="MaskedViT", arch=dict(base="tiny", decoder_embed_dim=128, decoder_depth=4, decoder_num_heads=4)),
    mask=dict(type="RandomMask", rounding="floor"),
    teacher=dict(type="MAETeacher"),
    objectives=dict(g2sd=dict(type="G2SD", decoder_block=3, supervise="all")),
)
