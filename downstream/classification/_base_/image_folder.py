"""Labelled images, one folder a class: ``data_root`` for training, ``val_root`` for validation and test (None: neither).

hgkd test takes the validation's images too. ``label_fraction=0.1`` trains on a tenth of each class.
"""

data_root = None
val_root = None
num_classes = None
label_fraction = 1.0
batch_size = 64
workers = 2

train_dataloader = dict(
    dataset=dict(type="LabelledImages", split="train", transform=dict(kind="augment")),
    sampler=dict(type="EpochSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
    drop_last=True,
)
val_dataloader = dict(
    batch_size=64,
    dataset=dict(type="LabelledImages", data_root=None, image_size=224, value_range=None),
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
)
val_cfg = dict()
val_evaluator = dict(type="ClassificationMetric")
