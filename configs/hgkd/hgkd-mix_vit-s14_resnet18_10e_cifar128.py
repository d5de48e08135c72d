"""A mix on CIFAR-10 at 128 pixels: H-GKD with a cosine term, from two blocks to two scales, with pixels and MGD beside it.

All but the objectives is hgkd_vit-s14_resnet18_10e_cifar128. The weights are guesses; TermShareHook logs what share of the
gradient each term really has. MGD's ratio of hidden positions: the paper's for detection (arXiv 2205.01529).
"""

_base_ = ["./hgkd_vit-s14_resnet18_10e_cifar128.py"]

model = dict(
    objectives=dict(
        hgkd=dict(_delete_=True, type="HGKD", target="full", block=(6, 9), stride=(32, 16), supervise="all", cosine=0.5),
        pixels=dict(type="PixelReconstruction", supervise="masked", weight=0.2),
        mgd=dict(type="MGD", block=9, supervise="all", mask="position", ratio=0.65, weight=0.5),
    )
)
custom_hooks = [*_base_.custom_hooks, dict(type="TermShareHook")]
