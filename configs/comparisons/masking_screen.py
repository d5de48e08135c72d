"""Which kind of masking, and which rival, goes into the comparison at equal time: chosen here, on images held out of its test.

    hgkd compare configs/comparisons/masking_screen.py --work-dir OUT --jobs 2 \\
        --set pretrain=DIR bank=DIR held_out=DIR teacher=FILE features=DIR

pretrain: 3,000 unlabelled images of it are used; bank, held_out: labelled images, one folder a class; teacher: weight file of
vit_small_patch14_dinov2; features: folder that keeps the teacher's features.

The question of the comparison: does a student that sees a part of the image, at the cost of that part, learn more in the same
processor seconds than one that sees it all? Written down before any run, a win is: **2 points of k-NN and of the linear probe
over the best dense rival at equal time, every seed above every seed, at two of three budgets (500, 1,500, 4,500 s)**, and 12
points of k-NN over random weights, 8 over pixels. The dense rival has a search of the same size, and may train at a lower
resolution, or at a low one first.

Equal time: the table below has the processor time that an image takes in a whole training step, one thread, all rows by turns
in one process (forward and backward; 'stored': without the teacher's passes, whose tokens of whole images lie on disk). Epochs
follow from it, so that what else runs on the machine changes nothing: rounded, of the dense rows upwards.
"""

_base_ = "../_base_/comparisons/cifar128.py"

_IMAGES = _base_.options.limit
_judged = _base_.evaluate
_BUDGET = 700.0  # processor seconds
# ms an image of batch 32, (with the teacher in every step, stored): docs/background/results.md, "Costs for comparisons"
_COST = {
    "dense": (99.0, 59.7),
    "dense 96 px": (48.4, 30.1),
    "dense 64 px": (23.6, 14.0),
    "0.6": (61.1, 28.5),
    "0.75": (54.0, 20.1),
    "0 to 0.75": (73.7, 38.1),
    "0.75, two masks": (70.2, 38.0),
    "0.75, and whole": (115.6, 91.1),
    # at 96 px, measured on another day as multiples of the dense row of that size
    "0.6, 96 px": (0.0, 0.593 * 30.1),
    "0.75, 96 px": (0.0, 0.352 * 30.1),
    "0 to 0.75, 96 px": (0.0, 0.826 * 30.1),
    "0.6 in one rectangle, 96 px": (0.0, 0.53 * 30.1),
    "0.6 in one rectangle, decoded alone, 96 px": (0.0, 0.512 * 30.1),
    "0.75 in one rectangle, decoded alone, 96 px": (0.0, 0.287 * 30.1),
    "0.6 in one rectangle, decoded alone": (0.0, 0.651 * 30.1),
    "0.75 in one rectangle, decoded alone": (0.0, 0.501 * 30.1),
}
_stored = dict(teacher_features="{features}")
_fresh = {  # random crops, so that nothing can be stored
    "teacher_features": None,
    "model.flip": 0.0,
    "train_dataloader.dataset.transform._delete_": True,
    "train_dataloader.dataset.transform.kind": "train",
    "train_dataloader.dataset.transform.scale": (0.35, 1.0),
    "train_dataloader.dataset.transform.hflip": 0.5,
}


def epochs_of(seconds, kind, stored=True):
    """Whole epochs; a dense row gets what is left of the last one as well."""
    exact = seconds * 1e3 / _COST[kind][stored] / _IMAGES
    return int(exact + (0.95 if kind.startswith("dense") else 0.5))


def row(name, kind, mask_ratio, stored=True, share=1.0, **options):
    """A row that spends ``share`` of the budget."""
    epochs = epochs_of(_BUDGET * share, kind, stored)
    schedule = dict(epochs=epochs, warmup_epochs=0.25, mask_ratio=mask_ratio)
    options = {**(_stored if stored else _fresh), **schedule, **options}
    size = options.get("image_size", _judged["image_size"])  # as it was trained
    judged = {**_judged, "test": "{held_out}", "image_size": size}
    return dict(name=name, config="configs/hgkd/hgkd_vit-s14_resnet18_10e_cifar128.py", options=options, evaluate=judged)


options = dict(val_test_root="{held_out}", teacher_checkpoint="{teacher}")
evaluate = dict(test="{held_out}")
_unmasked_end = 0.3  # share of the steps
_mixed = (1 - _unmasked_end) * _COST["0.6"][1] + _unmasked_end * _COST["dense"][1]
_COST["0.6, then whole"] = (0.0, _mixed)
_mixed = (1 - _unmasked_end) * _COST["0.6, 96 px"][1] + _unmasked_end * _COST["dense 96 px"][1]
_COST["0.6, then whole, 96 px"] = (0.0, _mixed)
_visible = {"model.objectives.hgkd.supervise": "visible", "model.objectives.pooled.supervise": "visible"}
_rectangle = {"model.mask.type": "RectangleMask", **_visible}
rows = [
    row("dense", "dense", 0.0),
    row("dense, lr 1e-3", "dense", 0.0, lr=1e-3),
    row("dense, lr 4e-3", "dense", 0.0, lr=4e-3),
    row("dense, 96 px", "dense 96 px", 0.0, image_size=96),
    row("dense, 64 px", "dense 64 px", 0.0, image_size=64),
    row("dense, 64 px for half", "dense 64 px", 0.0, share=0.5, image_size=64),
    row(
        "dense, 64 then 128 px",
        "dense",
        0.0,
        share=0.5,
        load_from="{here}/dense_64_px_for_half_seed0/epoch_" + str(epochs_of(_BUDGET / 2, "dense 64 px")) + ".pth",
    )
    | dict(after=["dense, 64 px for half"]),
    row("H-GKD 0.6", "0.6", 0.6),
    row("H-GKD 0.6, lr 4e-3", "0.6", 0.6, lr=4e-3),
    row("H-GKD 0.75", "0.75", 0.75),
    row("H-GKD 0 to 0.75", "0 to 0.75", [0.0, 0.75]),
    row("H-GKD 0.6, then whole", "0.6, then whole", 0.6, unmasked_share=_unmasked_end),
    # at the resolution of the best dense row; 'visible': the student learns what it sees, and infers nothing
    row("H-GKD 0.6, 96 px", "0.6, 96 px", 0.6, image_size=96),
    row("H-GKD 0.6, 96 px, visible", "0.6, 96 px", 0.6, image_size=96, **_visible),
    row("H-GKD 0.75, 96 px, visible", "0.75, 96 px", 0.75, image_size=96, **_visible),
    row("H-GKD 0 to 0.75, 96 px, visible", "0 to 0.75, 96 px", [0.0, 0.75], image_size=96, **_visible),
    row(
        "H-GKD 0.6, then whole, 96 px, visible",
        "0.6, then whole, 96 px",
        0.6,
        image_size=96,
        unmasked_share=_unmasked_end,
        **_visible,
    ),
    # what is seen hangs together
    row(
        "H-GKD 0.6 in one rectangle, 96 px, visible",
        "0.6 in one rectangle, 96 px",
        0.6,
        image_size=96,
        **_rectangle,
    ),
    *(
        row(f"H-GKD {kind}", kind, ratio, image_size=size, **_rectangle, **{"model.decode": "visible"})
        for size, added in ((96, ", 96 px"), (128, ""))
        for ratio in (0.6, 0.75)
        for kind in [f"{ratio} in one rectangle, decoded alone{added}"]
    ),
    # the teacher in every step, and new crops of the images
    row("dense, crops", "dense", 0.0, stored=False),
    row("dense, crops, 64 px", "dense 64 px", 0.0, stored=False, image_size=64),
    row("H-GKD 0.6, crops", "0.6", 0.6, stored=False),
    row("H-GKD 0 to 0.75, crops", "0 to 0.75", [0.0, 0.75], stored=False),
    row("H-GKD two of 0.75, crops", "0.75, two masks", 0.75, stored=False, masks_per_image=2),
    row("H-GKD 0.75 and whole, crops", "0.75, and whole", 0.75, stored=False, **{"model.whole_view": True}),
]
