"""A tiny MAE on generated shapes: the teacher of hgkd_mae-tiny_resnet18_shapes. Minutes on two CPU cores.

Method, mask ratio 0.75, AdamW with betas (0.9, 0.95) and weight decay 0.05: MAE (arXiv 2111.06377). Pixels are not standardised
patch by patch as MAE's best setting has it: most patches here are smooth, and standardising blows their shading up. The sizes,
the learning rate, the batch and the epochs are this project's, chosen for small images and a small budget: few images a step,
because on a CPU a step costs in proportion to its images.

The last checkpoint (work_dirs/mae_tiny_shapes/epoch_<n>.pth) is what hgkd_mae-tiny_resnet18_shapes takes as teacher_checkpoint.
"""

_base_ = [
    "../_base_/mae_runtime.py",
    "../_base_/schedules/adamw_cosine.py",
    "../_base_/data/shapes.py",
]

epochs = 10
warmup_epochs = 0.5
lr = 4e-3

model = dict(
    type="MAEPretraining",
    arch=dict(embed_dim=128, depth=4, num_heads=4, decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=4),
    patch_size=8,
    mask_ratio=0.75,
    norm_pix=False,
)
optim_wrapper = dict(optimizer=dict(betas=(0.9, 0.95)))
