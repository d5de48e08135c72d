"""RetinaNet, ResNet-18-FPN, on generated shapes at 96 px, for 2 CPU cores. The model of retinanet_r18_12e_bccd.

hgkd make-shapes data/shapes-coco --layout coco --train 800 --test 200
"""

_base_ = ["./retinanet_r18_12e_bccd.py"]

data_root = "data/shapes-coco/"
image_scale = (96, 96)
metainfo = dict(classes=("crescent", "cross", "disc", "hexagon", "ring", "square", "star", "triangle"), palette=None)
model = dict(bbox_head=dict(num_classes=8))

_train_pipeline = [
    dict(step, **(dict(scale=image_scale) if step["type"] == "RandomResize" else {})) for step in _base_.train_pipeline
]
_test_pipeline = [dict(step, **(dict(scale=image_scale) if step["type"] == "Resize" else {})) for step in _base_.test_pipeline]


def _data(split, pipeline):
    files = dict(ann_file=f"annotations/{split}.json", data_prefix=dict(img=f"images/{split}/"))
    return dict(dataset=dict(data_root=data_root, metainfo=metainfo, pipeline=pipeline, **files))


train_dataloader = _data("train", _train_pipeline)
val_dataloader = test_dataloader = _data("val", _test_pipeline)
val_evaluator = test_evaluator = dict(ann_file=data_root + "annotations/val.json")
