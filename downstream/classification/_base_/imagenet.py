"""ImageNet-1k: ``data/imagenet/{train,val}``, one folder a class."""

_base_ = ["./image_folder.py"]

data_root = "data/imagenet/train"
val_root = "data/imagenet/val"
num_classes = 1000
workers = 12
