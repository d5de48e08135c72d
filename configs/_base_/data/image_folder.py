"""A folder of images, any depth, no labels. With two folders of labelled ones, a k-NN measures the student after each epoch.

Set ``data_root``, and for the k-NN ``val_train_root`` and ``val_test_root`` (one folder a class); without these two there is
no validation.
"""

data_root = None
val_train_root = None
val_test_root = None
batch_size = 64
workers = 2

train_dataloader = dict(
    dataset=dict(type="UnlabelledImages", transform=dict(scale=(0.67, 1.0), hflip=0.5)),
    sampler=dict(type="EpochSampler", shuffle=True),
    collate_fn=dict(type="default_collate"),
    drop_last=True,
)

val_dataloader = dict(
    batch_size=64,
    dataset=dict(
        type="BankAndQuery",
        bank=dict(type="LabelledImages", limit_per_class=100),
        query=dict(type="LabelledImages", limit_per_class=60),
    ),
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
)
val_cfg = dict()
val_evaluator = [dict(type="KNNMetric", k=20), dict(type="FeatureHealthMetric")]
