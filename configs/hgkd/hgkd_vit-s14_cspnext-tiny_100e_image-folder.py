"""H-GKD for RTMDet: CSPNeXt-tiny from a DINOv2 ViT-S/14, a folder of images at 224 pixels. Needs mmdet.

All but the student is that of hgkd_vit-s14_resnet50_100e_image-folder, whose header says where the numbers come from. The
result is the backbone of downstream/detection/rtmdet_cspnext-tiny_*.py:

    hgkd export work_dirs/RUN/epoch_100.pth --to mmdet --out exported/cspnext
"""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/schedules/adamw_cosine.py",
    "../_base_/students/cspnext_tiny.py",
    "../_base_/data/image_folder.py",
]

data_root = "data/photos"
image_size = 224
batch_size = 64
epochs = 100
warmup_epochs = 5
teacher_checkpoint = None
teacher_features = None

custom_hooks = [*_base_.custom_hooks, dict(type="TeacherCacheHook")]

model = dict(
    teacher=dict(type="TimmTeacher", name="vit_small_patch14_dinov2"),
    objectives=dict(
        hgkd=dict(type="HGKD", target="full", block=9, supervise="all", beta=2.0),
        pooled=dict(type="PooledFeature", block=9),
    ),
)
train_cfg = dict(val_interval=5)
