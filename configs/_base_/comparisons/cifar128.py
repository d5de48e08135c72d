"""What the comparisons on CIFAR-10 at 128 px share: 3,000 unlabelled images, and how the students are judged.

pretrain: unlabelled images; bank, test: labelled images, one folder a class.
"""

options = dict(data_root="{pretrain}", val_train_root="{bank}", val_test_root="{test}", limit=3000, workers=0)
options["val_dataloader.dataset.bank.limit_per_class"] = 40
options["val_dataloader.dataset.query.limit_per_class"] = 40
evaluate = dict(
    methods=["knn", "linear"],
    train="{bank}",
    test="{test}",
    image_size=128,
    limit_per_class=200,
    test_limit_per_class=200,
    workers=0,
)
