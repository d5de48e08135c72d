"""Pixel control of hgkd_mae-tiny_resnet18_shapes: SparK's objective (arXiv 2301.03580), all else equal."""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/schedules/adamw_cosine.py",
    "../_base_/students/resnet18.py",
    "../_base_/data/shapes.py",
]

epochs = 10
batch_size = 32
lr = 2e-3

model = dict(objectives=dict(pixels=dict(type="PixelReconstruction", supervise="masked")))
