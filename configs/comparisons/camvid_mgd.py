"""MGD and G2SD on top of H-GKD: a UPerNet on CamVid with and without a ResNet-50 teacher.

    hgkd compare configs/comparisons/camvid_mgd.py --work-dir OUT --only teacher --set data=DIR hgkd=FOLDER teacher=-
    hgkd compare configs/comparisons/camvid_mgd.py --work-dir OUT --jobs 2 \\
        --set data=DIR hgkd=FOLDER teacher=OUT/teacher_seed0/iter_1000.pth

data, hgkd, sizes: see camvid.py. The teacher starts from random weights and has 1,000 steps.
"""

options = dict(data_root="{data}", iterations=360)
options["train_cfg.val_interval"] = 120
scores = {"mIoU": "mIoU", "accuracy": "aAcc"}
_taught = dict(options=dict(backbone="{hgkd}", teacher_checkpoint="{teacher}"), seeds=[0, 1, 2])
rows = [
    dict(name="teacher", config="downstream/segmentation/upernet_r50_1k_camvid.py", options=dict(iterations=1000), seeds=[0]),
    dict(
        name="H-GKD",
        config="downstream/segmentation/upernet_r18_1k_camvid.py",
        options=dict(backbone="{hgkd}"),
        seeds=[0, 1, 2],
    ),
    dict(name="H-GKD, MGD", config="downstream/segmentation/mgd_upernet_r50_r18_1k_camvid.py", **_taught),
    dict(name="H-GKD, G2SD", config="downstream/segmentation/g2sd_upernet_r50_r18_1k_camvid.py", **_taught),
]
