"""AdamW, linear warm-up, cosine to zero.

The numbers are those of this project's first prototype (ResNet-18 from ViT-S/14, CIFAR-10 at 128 px, batch 64), not of a paper.
``lr`` is for ``base_batch_size`` images a step over all processes; mmengine scales it linearly with the real number. Decay
acts on weights only, not on biases, norms and mask tokens.
"""

epochs = 10
warmup_epochs = 1
lr = 1e-3

train_cfg = dict(by_epoch=True, val_interval=1)  # max_epochs: the short option `epochs`
optim_wrapper = dict(
    type="OptimWrapper",
    constructor="DecayGroupsConstructor",
    # fused: one pass over the weights; on a CPU the plain one takes a fifth of a small step. lr: the short option `lr`
    optimizer=dict(type="AdamW", weight_decay=0.05, fused=True),
    clip_grad=dict(max_norm=5.0),  # SparK's; the norm is logged as grad_norm
)
# begin and end of the border between the two: the short options `warmup_epochs` and `epochs`
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=True, begin=0, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=0.0, by_epoch=True, convert_to_iter_based=True),
]
auto_scale_lr = dict(enable=True, base_batch_size=64)
