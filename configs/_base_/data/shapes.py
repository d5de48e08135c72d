"""Generated shapes: tools/make_shapes.py data/shapes --layout imagefolder --train 4000 --test 800 --image-size 96."""

_base_ = ["./image_folder.py"]

data_root = "data/shapes/train"
val_train_root = "data/shapes/train"
val_test_root = "data/shapes/test"
image_size = 96
