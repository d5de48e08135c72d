"""Transfer to segmentation: one UPerNet on CamVid, four starts of its ResNet-18.

    hgkd compare configs/comparisons/camvid.py --work-dir OUT --jobs 2 \\
        --set data=DIR pixels=FOLDER hgkd=FOLDER dense=FOLDER

data: CamVid (images/, annotations/, each with train, val, test). The others: see bccd.py. mIoU of 11 classes on the val split,
by which nothing is chosen.

Sizes: all 367 images, crops of 128 from about 240x180, 360 steps of 4; 4 minutes of one slow core a run. With a tenth of
the labels: --cfg-options train_dataloader.dataset.indices=37 (as many steps).
"""

options = dict(data_root="{data}", iterations=360)
options["train_cfg.val_interval"] = 120
scores = {"mIoU": "mIoU", "accuracy": "aAcc"}
_common = dict(config="downstream/segmentation/upernet_r18_1k_camvid.py", seeds=[0, 1, 2])
rows = [
    dict(name="random", **_common),
    dict(name="pixels", options=dict(backbone="{pixels}"), **_common),
    dict(name="H-GKD", options=dict(backbone="{hgkd}"), **_common),
    dict(name="dense", options=dict(backbone="{dense}"), **_common),
]
