"""CIFAR-10 enlarged to 128 pixels, PNG files in one folder a class; crops of at least half the area, mirrored."""

_base_ = ["./image_folder.py"]

data_root = "data/cifar10/train"
val_root = "data/cifar10/test"
num_classes = 10
image_size = 128
batch_size = 32

train_dataloader = dict(dataset=dict(transform=dict(_delete_=True, kind="train", scale=(0.5, 1.0))))
