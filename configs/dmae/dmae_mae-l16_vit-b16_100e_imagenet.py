"""DMAE at its published scale: MAE ViT-L/16 to ViT-B/16, ImageNet-1k, 8 GPUs x 512 images. Never run here.

Source of every number: UCSC-VLAA/DMAE, pretrain.sh and main_distill.py: 100 epochs, 40 of warm-up, learning rate 1.5e-4 per
256, weight decay 0.05, batch 4096 (there 8 x 128 x 4 accumulated steps), mask ratio 0.75, student block index 8 to teacher
block index 17, L1, one linear projector 768 -> 1024, both losses with weight 1. Paper and code differ: the paper's best
projector is an MLP, the script's a linear map; the script reconstructs the image's pixels as they are
normalised for the network (no norm-pix, hence standardise=False). Published: 84.0 % after fine-tuning.

    torchrun --nproc_per_node 8 -m hgkd train FILE --launcher pytorch --amp --cfg-options data_root=... teacher_checkpoint=...

teacher_checkpoint: the script takes the official mae_visualize_vit_large.pth.
"""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/schedules/mae.py",
    "../_base_/data/imagenet.py",
]

batch_size = 512
teacher_checkpoint = None
epochs = 100
mask_ratio = 0.75

model = dict(
    type="MaskedDistiller",
    student=dict(type="MaskedViT", arch="base"),
    mask=dict(type="RandomMask", rounding="floor"),
    teacher=dict(type="MAETeacher", dtype="bfloat16"),
    objectives=dict(
        dmae=dict(type="DMAE", taps=((8, 17),), projector="linear", distance="l1"),
        pixels=dict(type="PixelReconstruction", supervise="masked", standardise=False),
    ),
)
