"""MAE pretraining of ViT-B/16 on ImageNet-1k at its published scale, 8 GPUs x 512 images. Never run here.

Source of every number: facebookresearch/mae, PRETRAIN.md (800 epochs, the paper's table 1 setting; its main results train
1600) and the paper's appendix, table 8. The released script reaches batch 4096 as 64 GPUs x 64.

    torchrun --nproc_per_node 8 -m hgkd train FILE --launcher pytorch --amp --cfg-options data_root=...

model.arch=large or huge (with model.patch_size=14) trains the other sizes with the same numbers.
"""

_base_ = [
    "../_base_/mae_runtime.py",
    "../_base_/schedules/mae.py",
    "../_base_/data/imagenet.py",
]

batch_size = 512
epochs = 800

model = dict(type="MAEPretraining", arch="base", patch_size=16, mask_ratio=0.75, norm_pix=True)
