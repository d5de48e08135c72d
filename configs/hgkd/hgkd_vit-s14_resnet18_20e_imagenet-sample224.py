"""H-GKD: ResNet-18 from a DINOv2 ViT-S/14 on 1,000 photographs of ImageNet at 224 pixels, without labels.

A check of the pipeline on real photographs, not a recipe for features: 300 steps. Numbers as in
hgkd_vit-s14_resnet18_10e_cifar128. There is no validation unless val_train_root and val_test_root are given.
"""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/schedules/adamw_cosine.py",
    "../_base_/students/resnet18.py",
    "../_base_/data/image_folder.py",
]

data_root = "data/imagenet1k_sample"
teacher_checkpoint = None
image_size = 224
epochs = 20
warmup_epochs = 2

model = dict(
    teacher=dict(type="TimmTeacher", name="vit_small_patch14_dinov2"),
    objectives=dict(hgkd=dict(type="HGKD", target="full", block=9, supervise="all", beta=2.0)),
)
