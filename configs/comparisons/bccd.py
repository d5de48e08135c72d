"""Transfer to detection: one Faster R-CNN on BCCD, four starts of its ResNet-18.

    hgkd compare configs/comparisons/bccd.py --work-dir OUT --jobs 2 \\
        --set data=DIR pixels=FOLDER hgkd=FOLDER dense=FOLDER

data: BCCD (images/, annotations/{train,val,test}.json). The others: folders that 'hgkd export CHECKPOINT --to timm' wrote,
of students trained with the pixel objective, with H-GKD, and with H-GKD's objective on whole images. Box AP on the val split,
by which nothing is chosen. ``{seed}`` in a FOLDER takes the student of the same seed.

Sizes: all 205 images at 160x120, 4 epochs of 51 steps; 3.6 minutes of one slow core a run. With a fifth of the labels, where a
backbone matters more: --cfg-options train_dataloader.dataset.indices=41 epochs=20 train_cfg.val_interval=5 (as many steps).
"""

options = dict(data_root="{data}", epochs=4)
options["train_cfg.val_interval"] = 1
scores = {"box AP": ["coco/bbox_mAP", 100], "AP50": ["coco/bbox_mAP_50", 100], "AP75": ["coco/bbox_mAP_75", 100]}
_common = dict(config="downstream/detection/faster-rcnn_r18_12e_bccd.py", seeds=[0, 1, 2])
rows = [
    dict(name="random", **_common),
    dict(name="pixels", options=dict(backbone="{pixels}"), **_common),
    dict(name="H-GKD", options=dict(backbone="{hgkd}"), **_common),
    dict(name="dense", options=dict(backbone="{dense}"), **_common),
]
