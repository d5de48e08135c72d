"""Does masking pay where it has room? ResNet-50 on photographs of 224 px (49 cells), random crops, the teacher in every step.

    hgkd compare configs/comparisons/photographs.py --work-dir OUT --jobs 2 --set photos=DIR bank=DIR test=DIR teacher=FILE

photos: unlabelled photographs, any depth (measured with 1,572: a sample of ImageNet, the training pictures of CamVid and BCCD);
bank, test: labelled images of another kind, one folder a class (CIFAR-10); teacher: vit_small_patch14_dinov2.

Written down before any run: masking pays here if a masked row is 2 points of k-NN and of the linear probe above the best dense
row, of whatever resolution, at equal time. One seed tells which rows deserve three.

Equal time: the processor time of an image in a whole step (batch 8, one thread, teacher included, all rows by turns in one
process, docs/background/results.md, "Costs for comparisons"). Epochs follow from it.
"""

_IMAGES = 1572
_BUDGET = 2000.0  # processor seconds
_COST = {  # ms an image: `hgkd benchmark distill`, and 9 ms for reading, clipping of gradients and AdamW
    "dense": 464,
    "dense, 160 px": 226,
    "dense, 128 px": 152,
    "0.6": 260,
    "0.75": 210,
    "0.6 in one rectangle": 255,
    "0.6 in one rectangle, 160 px": 138,
    "0.6 in one rectangle, 128 px": 93,
    # measured on another machine, and scaled by what 0.6 and 0.75 cost there
    "pixels": 180,
    "0 to 0.75": 360,
    "0.75, two masks": 300,
    "0.75, 160 px": 110,
}
_hgkd = "configs/hgkd/hgkd_vit-s14_resnet50_100e_image-folder.py"


def row(name, kind, config=_hgkd, budget=_BUDGET, **options):
    """A row that is trained for the budget: whole epochs, the nearest number of them, at least one."""
    epochs = max(1, round(budget * 1e3 / _COST[kind] / _IMAGES))
    return dict(name=name, config=config, options=dict(epochs=epochs, warmup_epochs=0.25, **options))


options = dict(data_root="{photos}", val_train_root="{bank}", val_test_root="{test}", batch_size=8, lr=4e-3, workers=0)
options["limit"] = _IMAGES
options["val_dataloader.dataset.bank.limit_per_class"] = 20
options["val_dataloader.dataset.query.limit_per_class"] = 20
evaluate = dict(
    methods=["knn", "linear"],
    train="{bank}",
    test="{test}",
    image_size=128,
    limit_per_class=150,
    test_limit_per_class=150,
    workers=0,
)
# the best masked rows of masking_screen learn what is visible alone
_visible = {"model.objectives.hgkd.supervise": "visible", "model.objectives.pooled.supervise": "visible"}
_rectangle = {"model.mask.type": "RectangleMask", **_visible}  # the best of all in equal_time.py
_taught = dict(teacher_checkpoint="{teacher}")
rows = [
    dict(name="random", backbone="resnet50"),
    row("pixels", "pixels", "configs/spark/spark_resnet50_100e_imagenet-1gpu.py"),
    row("dense", "dense", mask_ratio=0.0, **_taught),
    row("dense, 160 px", "dense, 160 px", mask_ratio=0.0, image_size=160, **_taught),
    row("dense, 128 px", "dense, 128 px", mask_ratio=0.0, image_size=128, **_taught),
    row("H-GKD 0.6", "0.6", **_taught),
    row("H-GKD 0.6, visible", "0.6", **_visible, **_taught),
    row("H-GKD 0.75, visible", "0.75", mask_ratio=0.75, **_visible, **_taught),
    row("H-GKD 0 to 0.75, visible", "0 to 0.75", mask_ratio=[0.0, 0.75], **_visible, **_taught),
    row("H-GKD two of 0.75, visible", "0.75, two masks", mask_ratio=0.75, masks_per_image=2, **_visible, **_taught),
    row("H-GKD 0.75, 160 px, visible", "0.75, 160 px", mask_ratio=0.75, image_size=160, **_visible, **_taught),
    row("H-GKD 0.6 in one rectangle", "0.6 in one rectangle", **_rectangle, **_taught),
    row("H-GKD 0.6 in one rectangle, 160 px", "0.6 in one rectangle, 160 px", image_size=160, **_rectangle, **_taught),
    row("H-GKD 0.6 in one rectangle, 128 px", "0.6 in one rectangle, 128 px", image_size=128, **_rectangle, **_taught),
]
