"""MGD on top of H-GKD: a RetinaNet on BCCD with and without a ResNet-50 teacher; and MGD's loss without the teacher's head.

    hgkd compare configs/comparisons/bccd_mgd.py --work-dir OUT --only teacher --set data=DIR hgkd=FOLDER teacher=-
    hgkd compare configs/comparisons/bccd_mgd.py --work-dir OUT --jobs 2 \\
        --set data=DIR hgkd=FOLDER teacher=OUT/teacher_seed0/epoch_12.pth

data, hgkd, sizes: see bccd.py. The teacher starts from random weights and has 12 epochs.
"""

options = dict(data_root="{data}", epochs=4)
options["train_cfg.val_interval"] = 1
scores = {"box AP": ["coco/bbox_mAP", 100], "AP50": ["coco/bbox_mAP_50", 100], "AP75": ["coco/bbox_mAP_75", 100]}
_mgd = dict(backbone="{hgkd}", teacher_checkpoint="{teacher}")
_own_head = {**_mgd, "model.inherit": False}
_distiller = "downstream/detection/mgd_retinanet_r50_r18_12e_bccd.py"
rows = [
    dict(name="teacher", config="downstream/detection/retinanet_r50_12e_bccd.py", options=dict(epochs=12), seeds=[0]),
    dict(
        name="H-GKD", config="downstream/detection/retinanet_r18_12e_bccd.py", options=dict(backbone="{hgkd}"), seeds=[0, 1, 2]
    ),
    dict(name="H-GKD, MGD", config=_distiller, options=_mgd, seeds=[0, 1, 2]),
    dict(name="H-GKD, MGD, own head", config=_distiller, options=_own_head, seeds=[0, 1, 2]),
]
