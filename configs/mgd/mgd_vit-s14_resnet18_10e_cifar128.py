"""MGD on CIFAR-10 at 128 pixels: ResNet-18 from a DINOv2 ViT-S/14.

The decoder's map, with 65 % of its places hidden once more (the ratio of MGD's detection setting, arXiv 2205.01529),
generates the teacher's tokens; mean-reduced. The rest as hgkd_vit-s14_resnet18_10e_cifar128.
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
    objectives=dict(mgd=dict(type="MGD", feature="decoded", block=9, supervise="all", mask="position", ratio=0.65)),
)
