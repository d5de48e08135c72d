"""SparK's pretraining of ResNet-50 at its published scale, 8 GPUs x 512 images. Never run here.

Source of every number: keyu-tian/SparK, pretrain/utils/arg_util.py (the paper's table in appendix A agrees) and
utils/lr_control.py: LAMB with betas (0.9, 0.95), learning rate 2e-4 per 256 images, weight decay 0.04 rising to 0.2, 40
epochs of warm-up, down to a thousandth, clipping at 5, mask ratio 0.6, crops of 67 to 100 % of the area, decoder to single
pixels. Published: ResNet-50 80.6 % after fine-tuning.

    torchrun --nproc_per_node 8 -m hgkd train FILE --launcher pytorch --amp --cfg-options data_root=...
"""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/schedules/adamw_cosine.py",
    "../_base_/students/resnet50.py",
    "../_base_/data/image_folder.py",
]

data_root = "data/imagenet/train"
image_size = 224
workers = 8
epochs = 1600
warmup_epochs = 40
batch_size = 512
lr = 2e-4

model = dict(
    student=dict(out_stride=1, decoder_width=768, min_decoder_width=24),
    objectives=dict(pixels=dict(type="PixelReconstruction", supervise="masked")),
)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="timm.optim.Lamb", betas=(0.9, 0.95), weight_decay=0.04, max_grad_norm=None),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.005, by_epoch=True, begin=0, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min_ratio=0.001, by_epoch=True, convert_to_iter_based=True),
    # a ratio, so that what does not decay stays at 0
    dict(
        type="CosineAnnealingParamScheduler",
        param_name="weight_decay",
        eta_min_ratio=5.0,
        begin=0,
        end=1600,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
auto_scale_lr = dict(base_batch_size=256)
train_cfg = dict(val_interval=10)
sync_bn = "torch"
