"""Pixel control of hgkd_mae-tiny_resnet18_shapes: SparK's objective (arXiv 2301.03580), all else equal."""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/schedules/adamw_cosine.py",
    "../_base_/students/resnet18.py",
    "../_base_/data/shapes.py",
]

epochs = 1
warmup_epochs = 0.1
lr = 4e-3
mask_ratio = 0.5

model = dict(
    student=dict(out_stride=8, decoder_width=128),
    objectives=dict(pixels=dict(type="PixelReconstruction", supervise="masked")),
)
