"""H-GKD: ResNet-18 from a DINOv2 ViT-S/14, on CIFAR-10 enlarged to 128 pixels. Small: hours on two CPU cores, minutes on a GPU.

Sources of the numbers. H-GKD's abstract (arXiv 2309.09571) gives none. Smooth L1 with beta 2 on normalised tokens: G2SD's form
(arXiv 2302.14771). Mask ratio 0.6, gradient clipping at 5: SparK (arXiv 2301.03580). Block index 9 of 12, all places, batch 32
and the second objective, PooledFeature: this project's ablation (docs/background/results.md). AdamW 1e-3, decay 0.05: its
prototype.

teacher_checkpoint: a weight file of vit_small_patch14_dinov2 in timm's naming.
"""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/schedules/adamw_cosine.py",
    "../_base_/students/resnet18.py",
    "../_base_/data/cifar128.py",
]

lr = 2e-3  # for 64 images, i.e. 1e-3 for 32
teacher_checkpoint = None
teacher_features = "work_dirs/teacher_features"

custom_hooks = [*_base_.custom_hooks, dict(type="TeacherCacheHook")]

model = dict(
    flip=0.5,
    teacher=dict(type="TimmTeacher", name="vit_small_patch14_dinov2"),
    objectives=dict(
        hgkd=dict(type="HGKD", target="full", block=9, supervise="all", beta=2.0),
        pooled=dict(type="PooledFeature", block=9),
    ),
)
