"""G2SD, first stage, at its published scale: MAE ViT-B/16 to ViT-S/16, ImageNet-1k, 8 GPUs x 512 images. Never run here.

Source of every number: pengzhiliang/G2SD, GD.sh and the defaults of main_distill.py: 300 epochs, 10 of warm-up, learning rate
1.5e-4 per 256 down to 2.5e-6, weight decay 0.05, beta2 0.95, clipping at 3, batch 4096 (there 8 x 256 x 2 accumulated steps),
mask ratio 0.75, smooth L1, target after decoder block 4 (index 3), student decoder 4 blocks x 256 with 8 heads. Paper and
code differ: the paper supervises masked positions, the released run all of them (supervise_all True), and so does this.

    torchrun --nproc_per_node 8 -m hgkd train FILE --launcher pytorch --amp --cfg-options data_root=... teacher_checkpoint=...

teacher_checkpoint: with its decoder, e.g. mae_pretrain_vit_base_full.pth; encoder-only files are refused.
"""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/schedules/mae.py",
    "../_base_/data/imagenet.py",
]

batch_size = 512
teacher_checkpoint = None
epochs = 300
warmup_epochs = 10
mask_ratio = 0.75

model = dict(
    type="MaskedDistiller",
    student=dict(type="MaskedViT", arch=dict(base="small", decoder_embed_dim=256, decoder_depth=4, decoder_num_heads=8)),
    mask=dict(type="RandomMask", rounding="floor"),
    teacher=dict(type="MAETeacher", dtype="bfloat16"),
    objectives=dict(g2sd=dict(type="G2SD", decoder_block=3, supervise="all", beta=2.0)),
)
optim_wrapper = dict(clip_grad=dict(_delete_=True, max_norm=3.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=True, begin=0, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=2.5e-6, by_epoch=True, convert_to_iter_based=True),
]
