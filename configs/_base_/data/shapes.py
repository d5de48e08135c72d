"""Generated shapes: hgkd make-shapes data/shapes --plain --image-size 64 --train 3000 --test 800."""

_base_ = ["./image_folder.py"]

data_root = "data/shapes/train"
val_train_root = "data/shapes/train"
val_test_root = "data/shapes/test"
image_size = 64
batch_size = 16
