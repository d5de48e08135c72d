"""H-GKD from two teachers at once: ResNet-18 from a DINOv2 ViT-S/14 and a MAE, on CIFAR-10 enlarged to 128 pixels.

Each objective names its teacher. Both compare with tokens that are standardised place by place (layer normalisation without
parameters), so that neither teacher's scale decides; what each term contributes to the student's gradient is logged as
``<term>_share``. Several teachers: AM-RADIO (arXiv 2312.06709), which also standardises each teacher's features. Weights,
blocks
and the rest: as hgkd_vit-s14_resnet18_10e_cifar128; the MAE's weight of 0.5 is not tuned.

model.teachers.dino.checkpoint: a weight file of vit_small_patch14_dinov2 in timm's naming; model.teachers.mae.checkpoint:
the last
checkpoint of mae_vit-ti16_100e_cifar128, or any MAE file.
"""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/schedules/adamw_cosine.py",
    "../_base_/students/resnet18.py",
    "../_base_/data/cifar128.py",
]

lr = 2e-3  # for 64 images, i.e. 1e-3 for 32
teacher_features = "work_dirs/teacher_features"

custom_hooks = [*_base_.custom_hooks, dict(type="TeacherCacheHook"), dict(type="TermShareHook")]

model = dict(
    flip=0.5,
    teachers=dict(
        dino=dict(type="TimmTeacher", name="vit_small_patch14_dinov2", checkpoint=None),
        mae=dict(type="MAETeacher", checkpoint=None),
    ),
    objectives=dict(
        dino=dict(type="HGKD", teacher="dino", target="full", block=9, supervise="all", beta=2.0),
        pooled=dict(type="PooledFeature", teacher="dino", block=9),
        mae=dict(type="HGKD", teacher="mae", target="full", block=9, supervise="all", beta=2.0, weight=0.5),
    ),
)
