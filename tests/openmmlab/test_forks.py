"""Configs of mmdet and mmseg are found by name, on the originals and on the OneDL forks."""

import pytest
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE

from hgkd.openmmlab import forks


@pytest.mark.parametrize(
    ("package", "name", "model"),
    [
        ("mmdet", "retinanet/retinanet_r18_fpn_1x_coco.py", "RetinaNet"),
        ("mmseg", "pspnet/pspnet_r50-d8_4xb4-160k_ade20k-512x512.py", "EncoderDecoder"),
    ],
)
def test_configs_by_name(ops, package, name, model):
    pytest.importorskip(package)
    assert Config.fromstring(f"_base_ = '{package}::{name}'", ".py").model.type == model


@pytest.mark.parametrize(("installed", "wanted"), [(True, "mmseg"), (False, "mmsegmentation")])
def test_only_the_fork_changes_where_configs_are_sought(monkeypatch, installed, wanted):
    def distribution(name: str) -> None:
        if not installed:
            raise forks.PackageNotFoundError(name)

    monkeypatch.setitem(MODULE2PACKAGE, "mmseg", "mmsegmentation")
    monkeypatch.setattr(forks, "distribution", distribution)
    forks.find_fork_configs()
    assert MODULE2PACKAGE["mmseg"] == wanted
    assert MODULE2PACKAGE["mmdet"] == "mmdet"
