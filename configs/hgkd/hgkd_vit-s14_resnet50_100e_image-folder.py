"""Your own photographs: H-GKD, ResNet-50 from a DINOv2 ViT-S/14, a folder of images at 224 pixels. Start here.

Every epoch shows other random crops and mirrored images, so the teacher runs in each step and its features are not stored.
Objectives, block and places: hgkd_vit-s14_resnet18_10e_cifar128, chosen there by an ablation (docs/background/results.md).
Crops of 67 to 100 % of the area and mask ratio 0.6: SparK (arXiv 2301.03580). Batch, schedule and learning rate are this
project's guess, never run to the end. Where time is short, the best of six settings (docs/background/results.md, "Photographs,
the teacher in every step") is image_size=128 model.mask.type=RectangleMask model.objectives.hgkd.supervise=visible
model.objectives.pooled.supervise=visible. On a GPU add --amp.

teacher_checkpoint: vit_small_patch14_dinov2 in timm's, the official or Hugging Face naming.
"""

_base_ = [
    "../_base_/default_runtime.py",
    "../_base_/schedules/adamw_cosine.py",
    "../_base_/students/resnet50.py",
    "../_base_/data/image_folder.py",
]

data_root = "data/photos"
image_size = 224
batch_size = 64
epochs = 100
warmup_epochs = 5
teacher_checkpoint = None

model = dict(
    teacher=dict(type="TimmTeacher", name="vit_small_patch14_dinov2"),
    objectives=dict(
        hgkd=dict(type="HGKD", target="full", block=9, supervise="all", beta=2.0),
        pooled=dict(type="PooledFeature", block=9),
    ),
)
train_cfg = dict(val_interval=5)
