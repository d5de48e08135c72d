"""ImageNet-1k at 224 pixels, without labels; MAE's crops (arXiv 2111.06377: 20 to 100 % of the area, bicubic)."""

_base_ = ["./image_folder.py"]

data_root = "data/imagenet/train"
image_size = 224
workers = 12

train_dataloader = dict(dataset=dict(transform=dict(scale=(0.2, 1.0))))
