"""Epochs that end with a batch that is too small for the model: refused before the first step."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.runner import IterBasedTrainLoop
from refusals import refused
from tiny_runs import ROOT, write_images
from torch import nn
from torch.utils.data import DataLoader

from hgkd.api import train as train_tool
from hgkd.training.last_batch import check_last_batch

RECIPE = ROOT / "downstream/classification/resnet18_10e_cifar128.py"


class Norm(nn.Module):
    """A batch normalisation of pooled features; its preprocessing changes the batch in place, as mmseg's does."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.calls = 0

    def data_preprocessor(self, data, training):
        data["inputs"].add_(1)
        return data

    def forward(self, inputs, mode):
        self.calls += 1
        self.norm(inputs + torch.rand(()) + random.random() + np.random.rand())


def loop(images, batch_size, **options):
    return SimpleNamespace(dataloader=DataLoader(list(range(images)), batch_size, **options))


def batch(size):
    return {"inputs": torch.zeros(size, 2)}


def test_a_last_batch_of_one_image_is_refused():
    with refused(ValueError, "last-batch-too-small", "1", "4", "drop_last=True"):
        check_last_batch(Norm(), loop(9, 4), batch(4))


@pytest.mark.parametrize("images", [8, 10])
def test_nothing_is_changed(images):
    model, data = Norm(), batch(4)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    drawn = (random.random(), np.random.rand(), torch.rand(()).item())
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    check_last_batch(model, loop(images, 4), data)
    assert model.calls == (images == 10)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == drawn
    assert torch.equal(model.norm.running_mean, torch.zeros(2))
    assert model.norm.num_batches_tracked == 0
    assert torch.equal(data["inputs"], torch.zeros(4, 2))


def test_it_is_not_tried_where_no_epoch_ends_so():
    model = Norm()
    check_last_batch(model, loop(9, 4, drop_last=True), batch(4))
    by_steps = IterBasedTrainLoop.__new__(IterBasedTrainLoop)
    by_steps.dataloader = loop(9, 4).dataloader
    check_last_batch(model, by_steps, batch(4))
    assert model.calls == 0


def test_a_fine_tuning_is_refused_before_its_first_step_and_the_remedies_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {
        "data_root": str(write_images(tmp_path / "images", each=4, size=32)),
        "val_root": None,
        "num_classes": 2,
        "student": "resnet10t",
        "image_size": 32,
        "workers": 0,
        "batch_size": 7,  # of 8 images
        "epochs": 1,
        "train_dataloader.drop_last": False,
        "default_hooks.checkpoint.save_best": None,
    }
    with refused(ValueError, "last-batch-too-small", "1", "7", "drop_last=True"):
        train_tool.train(RECIPE, "run", options=options)
    assert not list((tmp_path / "run").glob("*.pth"))
    for number, remedy in enumerate(({"train_dataloader.drop_last": True}, {"batch_size": 4})):
        assert train_tool.train(RECIPE, f"run{number}", options=options | remedy).epoch == 1
    with refused(ValueError, "batch-norm-single-values", "batch_size=2"):
        train_tool.train(RECIPE, "single", options=options | {"batch_size": 1})
