"""Pixel control of hgkd_vit-s14_resnet18_20e_imagenet-sample224: SparK's objective (arXiv 2301.03580), all else equal."""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/schedules/adamw_cosine.py",
    "../_base_/students/resnet18.py",
    "../_base_/data/image_folder.py",
]

data_root = "data/imagenet1k_sample"
image_size = 224
epochs = 20
warmup_epochs = 2

model = dict(objectives=dict(pixels=dict(type="PixelReconstruction", supervise="masked")))
