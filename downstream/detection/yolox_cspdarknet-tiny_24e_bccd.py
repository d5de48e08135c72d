"""YOLOX-tiny on BCCD at 320 px, for 2 CPU cores: mmdet's model as published, without mosaic and moving average.

AdamW 1e-3 for 4 images, 24 epochs and pictures of one scale, filled to a square: this project's choice for some hundred steps.
"""

_base_ = "./yolox_cspdarknet-tiny_300e_coco.py"
model = dict(data_preprocessor=dict(batch_augments=None), bbox_head=dict(num_classes=3))

data_root = "data/bccd/"
metainfo = dict(classes=("WBC", "RBC", "Platelets"), palette=[(106, 0, 228), (220, 20, 60), (255, 179, 0)])
image_scale = (320, 240)
_meta = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
_placed = [
    dict(type="Resize", scale=image_scale, keep_ratio=True),
    dict(type="Pad", pad_to_square=True, pad_val=dict(img=(114.0, 114.0, 114.0))),
]
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    *_placed,
    dict(type="RandomFlip", prob=[0.3, 0.3], direction=["horizontal", "vertical"]),  # a cell has no upper side
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    *_placed,
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=_meta),
]


def _loader(split, pipeline, train=False):
    dataset = dict(type="CocoDataset", data_root=data_root, metainfo=metainfo, pipeline=pipeline, test_mode=not train)
    dataset.update(ann_file=f"annotations/{split}.json", data_prefix=dict(img="images/"))
    dataset.update(filter_cfg=dict(filter_empty_gt=True) if train else None)
    sampler = dict(type="DefaultSampler", shuffle=train)
    return dict(_delete_=True, batch_size=4, num_workers=0, drop_last=train, sampler=sampler, dataset=dataset)


train_dataloader = _loader("train", train_pipeline, train=True)
val_dataloader = _loader("val", test_pipeline)
test_dataloader = _loader("test", test_pipeline)
val_evaluator = dict(_delete_=True, type="CocoMetric", ann_file=data_root + "annotations/val.json", metric="bbox")
test_evaluator = dict(_delete_=True, type="CocoMetric", ann_file=data_root + "annotations/test.json", metric="bbox")

train_cfg = dict(_delete_=True, type="EpochBasedTrainLoop", max_epochs=24, val_interval=6)
optim_wrapper = dict(optimizer=dict(_delete_=True, type="AdamW", lr=1e-3, weight_decay=0.05), clip_grad=dict(max_norm=35.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", by_epoch=True, begin=0, end=24, T_max=24),
]
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=6, max_keep_ckpts=2))
custom_hooks = []
