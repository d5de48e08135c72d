"""A student that sees a part of the image against one that sees it all, at equal time: the comparison that counts.

    hgkd compare configs/comparisons/equal_time.py --work-dir OUT --jobs 2 \\
        --set pretrain=DIR bank=DIR test=DIR teacher=FILE features=DIR

Folders as in masking_screen.py, where the settings were chosen on held-out images and where the question is written down with
what counts as a win; test: the test images, which chose nothing. Three seeds a row; processor seconds at one thread from that
plan's table of costs, the teacher's tokens on disk for all. Each student is judged at the size that it was trained at: one of
96 px loses up to 3.4 points of k-NN at 128 px. Budgets by --only, e.g. --only "dense, 96 px, 500 s".
"""

_base_ = "../_base_/comparisons/cifar128.py"

_IMAGES = _base_.options.limit
_judged = _base_.evaluate
_COST = {  # ms an image, the teacher's features stored: docs/background/results.md, "Costs for comparisons"
    "pixels": 23.6,
    "dense": 59.7,
    "dense, 96 px": 30.1,
    "H-GKD 0.6": 28.5,
    "H-GKD 0.6, 96 px": 17.8,
    "H-GKD 0.6 in one rectangle, 96 px": 16.0,
    "H-GKD 0.75 in one rectangle, decoded alone, 96 px": 8.64,
    "H-GKD 0.6 in one rectangle, decoded alone": 19.6,
}
_hgkd = "configs/hgkd/hgkd_vit-s14_resnet18_10e_cifar128.py"
_taught = dict(teacher_checkpoint="{teacher}", teacher_features="{features}")
_visible = {"model.objectives.hgkd.supervise": "visible", "model.objectives.pooled.supervise": "visible"}
_rectangle = {"model.mask.type": "RectangleMask", **_visible, **_taught}
_alone = {**_rectangle, "model.decode": "visible"}
_kinds = {
    "pixels": dict(config="configs/spark/spark_resnet18_10e_cifar128.py"),
    "dense": dict(config=_hgkd, options=dict(mask_ratio=0.0, **_taught)),
    "dense, 96 px": dict(config=_hgkd, options=dict(mask_ratio=0.0, image_size=96, **_taught)),
    "H-GKD 0.6": dict(config=_hgkd, options=_taught),
    "H-GKD 0.6 in one rectangle, 96 px": dict(config=_hgkd, options={"image_size": 96, **_rectangle}),
    "H-GKD 0.6, 96 px": dict(config=_hgkd, options=dict(image_size=96, **_visible, **_taught)),
    "H-GKD 0.75 in one rectangle, decoded alone, 96 px": dict(
        config=_hgkd, options={"mask_ratio": 0.75, "image_size": 96, **_alone}
    ),
    "H-GKD 0.6 in one rectangle, decoded alone": dict(config=_hgkd, options=_alone),
}


def row(kind, seconds):
    """A row that is trained for a budget: whole epochs, the nearest number of them."""
    epochs = round(seconds * 1e3 / _COST[kind] / _IMAGES)
    options = {**_kinds[kind].get("options", {}), "epochs": epochs, "warmup_epochs": 0.25}
    judged = {**_judged, "image_size": options.get("image_size", _judged["image_size"])}
    return dict(_kinds[kind], name=f"{kind}, {seconds} s", options=options, seeds=[0, 1, 2], evaluate=judged)


rows = [
    dict(name="random", backbone="resnet18", seeds=[0, 1, 2]),
    *(row(kind, seconds) for seconds in (500, 1500, 4500) for kind in _kinds),
]
