"""Recommended for one GPU: the pixel control of the other -1gpu recipes, ResNet-50, all else equal.

Objective, mask ratio 0.6 and clipping: SparK (arXiv 2301.03580). The schedule is this project's guess, never run.
"""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/schedules/one_gpu.py",
    "../_base_/students/resnet50.py",
    "../_base_/data/imagenet.py",
]

batch_size = 256

model = dict(objectives=dict(pixels=dict(type="PixelReconstruction", supervise="masked")))
