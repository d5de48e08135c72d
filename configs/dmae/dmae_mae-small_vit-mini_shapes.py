"""DMAE on generated shapes: a ViT of four blocks from the MAE of mae_small_shapes. ViT to ViT, as published.

DMAE's script (arXiv 2208.12256) taps student block 8 of 12 and teacher block 17 of 24, about three quarters of either depth:
here index 2 of 4 and 5 of 8; linear projector, weight 10, pixels of masked patches beside it. mask_ratio=0.9 or 0.95 hides
more, which is the paper's second claim. Pixels are not standardised, as in mae_tiny_shapes.

teacher_checkpoint: the last checkpoint of mae_small_shapes.
"""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/schedules/adamw_cosine.py",
    "../_base_/data/shapes.py",
]

epochs = 40
warmup_epochs = 2
batch_size = 32
lr = 4e-3
teacher_checkpoint = None
mask_ratio = 0.75

model = dict(
    type="MaskedDistiller",
    student=dict(
        type="MaskedViT",
        arch=dict(
            embed_dim=128,
            depth=4,
            num_heads=4,
            patch_size=8,
            image_size=(64, 64),
            decoder_embed_dim=64,
            decoder_depth=1,
            decoder_num_heads=4,
        ),
    ),
    mask=dict(type="RandomMask", rounding="floor"),
    teacher=dict(type="MAETeacher"),
    objectives=dict(
        dmae=dict(type="DMAE", taps=((2, 5),), projector="linear", weight=10.0),
        pixels=dict(type="PixelReconstruction", supervise="masked", standardise=False),
    ),
)
optim_wrapper = dict(optimizer=dict(betas=(0.9, 0.95)))
