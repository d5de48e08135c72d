"""What a store of features depends on."""

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from hgkd.data import UnlabelledImages
from hgkd.training.hooks.feature_cache import TeacherCacheHook


class Model(torch.nn.Module):
    def store_features(self, folder, pictures, identity):
        self.identity = identity


def identity(root: Path, **options) -> dict:
    dataset = UnlabelledImages(root, image_size=8, transform={"kind": "eval"}, **options)
    runner = SimpleNamespace(
        train_loop=SimpleNamespace(dataloader=SimpleNamespace(dataset=dataset)),
        model=Model(),
        logger=SimpleNamespace(info=print),
    )
    TeacherCacheHook(str(root)).before_train(runner)
    return runner.model.identity


def test_a_store_depends_on_how_files_become_pixels(tmp_path):
    """Features of photographs lying down, as they were read once, must not be taken for those of upright ones."""
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "a.png")
    plain = identity(tmp_path)
    assert plain == identity(tmp_path)
    assert plain["reading"]["rules"] == 2
    assert plain != identity(tmp_path, value_range=(0, 4095))
    assert plain != identity(tmp_path, use_alpha=False)


def test_names_need_not_be_utf8(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / os.fsdecode(b"\xe9.png"))
    assert len(identity(tmp_path)["files"]) == 64
