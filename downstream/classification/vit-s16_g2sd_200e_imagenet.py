"""G2SD, second stage, at its published scale: ViT-S/16 with two heads, 200 epochs, 8 GPUs x 128 images.

Never run here. Source of every number: pengzhiliang/G2SD, SD.sh and main_finetune_dis.py: learning rate 1e-3 for 256 images,
layer decay 0.75, weight decay 0.05, no stochastic depth, mixup 0.8, CutMix 1.0, erasing 0.25; loss (cross entropy of the
class head + cross entropy of the distillation head with the teacher's answer) / 2. The rest: _base_/mae.py. Its --enable_nkd
(one head) is, here, ``model.classifier.name=vit_small_patch16_224 model.label_weight=0 model.objectives.hard.type=NKD
model.objectives.hard.weight=1``.

backbone: the last checkpoint of g2sd_mae-b16_vit-s16_300e_imagenet (first stage). teacher_checkpoint:
mae_finetuned_vit_base.pth.
"""

_base_ = ["./_base_/mae.py"]

epochs = 200
lr = 1e-3
teacher_checkpoint = None

model = dict(
    classifier=dict(name="deit_small_distilled_patch16_224"),
    label_weight=0.5,
    teacher=dict(type="ClassifierTeacher", name="vit_base_patch16_224.mae", global_pool="avg", dtype="bfloat16"),
    objectives=dict(hard=dict(type="HardLabelKD", weight=0.5)),
)
optim_wrapper = dict(paramwise_cfg=dict(layer_decay=0.75))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=True, begin=0, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min_ratio=2.5e-4, by_epoch=True, convert_to_iter_based=True),
]
