"""BCCD: 640x480 microscope images of blood cells with boxes of three kinds, shrunk to 160x120 for 2 CPU cores.

``data_root`` holds ``images/`` and ``annotations/{train,val,test}.json`` in COCO's format.
"""

dataset_type = "CocoDataset"
data_root = "data/bccd/"
metainfo = dict(classes=("WBC", "RBC", "Platelets"), palette=[(106, 0, 228), (220, 20, 60), (255, 179, 0)])
image_scale = (160, 120)

_meta = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomResize", scale=image_scale, ratio_range=(0.8, 1.2), keep_ratio=True),
    dict(type="RandomFlip", prob=[0.3, 0.3], direction=["horizontal", "vertical"]),  # a cell has no upper side
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=image_scale, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=_meta),
]


def _loader(split, pipeline, **options):
    dataset = dict(type=dataset_type, data_root=data_root, metainfo=metainfo, pipeline=pipeline)
    dataset.update(ann_file=f"annotations/{split}.json", data_prefix=dict(img="images/"), **options.pop("dataset", {}))
    return dict(num_workers=0, dataset=dataset, **options)


_test = dict(batch_size=4, sampler=dict(type="DefaultSampler", shuffle=False), dataset=dict(test_mode=True))
train_dataloader = _loader(
    "train",
    train_pipeline,
    batch_size=4,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(filter_cfg=dict(filter_empty_gt=True)),
)
val_dataloader = _loader("val", test_pipeline, **_test)
test_dataloader = _loader("test", test_pipeline, **_test)
val_evaluator = dict(type="CocoMetric", ann_file=data_root + "annotations/val.json", metric="bbox")
test_evaluator = dict(type="CocoMetric", ann_file=data_root + "annotations/test.json", metric="bbox")
