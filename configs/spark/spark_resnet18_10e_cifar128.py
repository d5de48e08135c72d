"""Pixel control of hgkd_vit-s14_resnet18_10e_cifar128: SparK's objective (arXiv 2301.03580) with no teacher.

Images, steps, student, decoder (16 pixels a place, with a linear head to the pixels), mask and optimiser are those of the H-GKD
recipe, on purpose: only the objective differs. SparK itself decodes to single pixels and trains 1600 epochs with LAMB.
"""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/schedules/adamw_cosine.py",
    "../_base_/students/resnet18.py",
    "../_base_/data/cifar128.py",
]

lr = 2e-3  # for 64 images, i.e. 1e-3 for 32
model = dict(flip=0.5, objectives=dict(pixels=dict(type="PixelReconstruction", supervise="masked")))
