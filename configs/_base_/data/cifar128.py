"""CIFAR-10 enlarged to 128 pixels, the same pictures in every epoch (mirrored by ``model.flip``).

What the small recipes share, so that they differ in the method only. Folders of PNG files, one a class.
"""

_base_ = ["./image_folder.py"]

data_root = "data/cifar10/train"
val_train_root = "data/cifar10/train"
val_test_root = "data/cifar10/test"
image_size = 128
batch_size = 32  # twice the steps of 64 for the same images: better by 1 to 2 points (docs/background/results.md)

train_dataloader = dict(dataset=dict(transform=dict(_delete_=True, kind="eval")))
