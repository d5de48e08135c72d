"""What a store of features depends on."""

import os
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
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


@pytest.mark.parametrize("packed", [False, True])
def test_a_store_depends_on_the_pictures_and_not_on_where_they_lie(tmp_path, packed):
    """BMPs of one size have equally many bytes, whatever they show."""
    for folder, level in (("a", 0), ("b", 255)):
        (tmp_path / folder).mkdir()
        for number in range(3):
            Image.new("RGB", (8, 8), (number, level if number == 1 else 0, 0)).save(tmp_path / folder / f"{number}.bmp")
    shutil.copytree(tmp_path / "a", tmp_path / "copied", copy_function=shutil.copy)  # with dates of its own
    if packed:
        for folder in ("a", "b", "copied"):
            with tarfile.open(tmp_path / folder / "0.tar", "w") as shard:
                for path in sorted((tmp_path / folder).glob("*.bmp")):
                    shard.add(path, path.name)
                    path.unlink()
    found = [identity(tmp_path / folder) for folder in ("a", "b", "copied")]
    assert found[0]["files"] == found[1]["files"]
    assert found[0] == found[2] != found[1]


def test_names_need_not_be_utf8(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / os.fsdecode(b"\xe9.png"))
    assert len(identity(tmp_path)["files"]) == 64
