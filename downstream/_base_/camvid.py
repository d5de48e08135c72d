"""CamVid: 480x360 road scenes, 11 classes and a label (11) that is ignored, shrunk to 240x180 for 2 CPU cores.

``data_root`` holds ``images/{train,val,test}/*.jpg`` and ``annotations/{train,val,test}/*.png`` (uint8 label maps).
"""

dataset_type = "BaseSegDataset"
data_root = "data/camvid/"
ignored_label = 11
metainfo = dict(
    classes=("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"),
    palette=[
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (0, 0, 192),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    ],
)
image_scale = (240, 180)
crop_size = (128, 128)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=image_scale, ratio_range=(0.9, 1.8), keep_ratio=True),
    dict(type="RandomCrop", crop_size=crop_size, cat_max_ratio=0.75, ignore_index=ignored_label),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=image_scale, keep_ratio=True),
    dict(type="LoadAnnotations"),  # after the resizing: measured at full size
    dict(type="PackSegInputs"),
]


def _loader(split, pipeline, **options):
    folders = dict(img_path=f"images/{split}", seg_map_path=f"annotations/{split}")
    dataset = dict(type=dataset_type, data_root=data_root, metainfo=metainfo, data_prefix=folders, pipeline=pipeline)
    return dict(num_workers=0, dataset=dataset, **options)


_test = dict(batch_size=1, sampler=dict(type="DefaultSampler", shuffle=False))
train_dataloader = _loader("train", train_pipeline, batch_size=4, sampler=dict(type="InfiniteSampler", shuffle=True))
val_dataloader = _loader("val", test_pipeline, **_test)
test_dataloader = _loader("test", test_pipeline, **_test)
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"], ignore_index=ignored_label)
test_evaluator = val_evaluator
