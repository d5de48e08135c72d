"""The images of a config are those that the weights of its backbone were trained on, or it is said.

A public report: a detector with such weights fell from 0.73 to 0.58 AP, without an error.
"""

import logging
import re

import pytest
import timm
import torch
from downstream_runs import DETECTOR, FASTER_HEAD, need, shapes_coco, tiny_detector
from mmengine.config import Config
from refusals import refused
from student_checkpoints import write_student

from hgkd.cli import train as train_command
from hgkd.export import export
from hgkd.openmmlab.weights import Pixels, check_pixels, prepared_pixels

need("mmdet", "mmseg")
IMAGENET = Pixels((123.675, 116.28, 103.53), (58.395, 57.12, 57.375), "RGB")
CAFFE = Pixels((103.53, 116.28, 123.675), (1.0, 1.0, 1.0), "BGR")


@pytest.mark.parametrize(
    ("stock", "expected"),
    [
        ("mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", IMAGENET),
        ("mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512.py", IMAGENET),
        ("mmdet::faster_rcnn/faster-rcnn_r50-caffe_fpn_1x_coco.py", CAFFE),
        ("mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py", Pixels(IMAGENET.mean[::-1], IMAGENET.std[::-1], "BGR")),
        ("mmdet::yolox/yolox_tiny_8xb8-300e_coco.py", Pixels(None, None, "BGR")),
    ],
)
def test_how_stock_configs_prepare_images(stock, expected):
    cfg = Config.fromstring(f"_base_ = {stock!r}", ".py")
    found = prepared_pixels(cfg.model.data_preprocessor, cfg.get("train_pipeline"))
    assert found == expected
    assert found.agrees(IMAGENET) == (expected == IMAGENET)


def test_other_ways_to_prepare_images():
    usual = {"mean": IMAGENET.mean, "std": IMAGENET.std}
    assert prepared_pixels(usual, [dict(type="LoadImageFromFile", channel_order="rgb")]) == IMAGENET
    assert (
        prepared_pixels({"type": "MultiBranchDataPreprocessor", "data_preprocessor": {**usual, "bgr_to_rgb": True}}) == IMAGENET
    )
    assert prepared_pixels({}, [dict(type="mmcv.Normalize")]) is None
    assert not Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "RGB").agrees(IMAGENET)  # in [0, 1]
    assert Pixels((123.7, 116.3, 103.5), (58.4, 57.1, 57.4), "RGB").agrees(IMAGENET)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    write_student(folder / "a.pth", "resnet18")
    export(folder / "a.pth", folder / "timm", "timm")
    export(folder / "a.pth", folder / "mmdet", "mmdet")
    return folder


@pytest.mark.parametrize("target", ["timm", "mmdet"])
def test_an_export_on_other_images_is_refused_and_the_remedy_works(exported, target, tmp_path, capsys):
    data = shapes_coco(tmp_path / "data")
    options = {**tiny_detector(data), **FASTER_HEAD, "backbone": str(exported / target), "workers": 0}
    wrong = {"mean": [103.53, 116.28, 123.675], "std": [1.0, 1.0, 1.0], "bgr_to_rgb": False}
    options |= {f"model.data_preprocessor.{key}": value for key, value in wrong.items()}
    words = [f"{key}={str(value).replace(' ', '')}" for key, value in options.items()]
    assert train_command.main([str(DETECTOR), "--dry-run", "--cfg-options", *words]) == 2
    told = capsys.readouterr().err
    assert "was trained with images prepared as RGB, mean [123.675,116.28,103.53], std [58.395,57.12,57.375]" in told
    assert "this config prepares them as BGR, mean [103.53,116.28,123.675], std [1,1,1]" in told
    remedy = re.search(r"Set --cfg-options (.*) \[pixels-differ\]", told)[1].split()
    assert len(remedy) == 3
    changed = [word for word in words if "data_preprocessor" not in word]
    assert train_command.main([str(DETECTOR), "--dry-run", "--cfg-options", *changed, *remedy]) == 0


@pytest.fixture
def told(monkeypatch):
    """The warnings of the log."""
    lines = []
    monkeypatch.setattr("hgkd.openmmlab.weights.print_log", lambda text, logger, level=0: lines.append((text, level)))
    return lines


def test_weights_of_unknown_origin_are_warned_of(tmp_path, told):
    from mmdet.models import ResNet

    torch.save(timm.create_model("resnet50", num_classes=0).state_dict(), tmp_path / "net.pth")
    check_pixels(ResNet(50), tmp_path / "net.pth", IMAGENET)
    assert not told
    check_pixels(ResNet(50, style="caffe"), tmp_path / "net.pth", CAFFE)  # as it has to be for caffe's weights
    ((line, level),) = told
    assert level == logging.WARNING
    assert "is taken to want what ImageNet's usual weights do: images prepared as RGB, mean [123.675" in line
    assert "leave it where the weights are of that kind, e.g. caffe's" in line


def test_the_style_of_an_export_is_timms(exported, told):
    from mmdet.models import ResNet

    check_pixels(ResNet(18, style="caffe"), exported / "timm", IMAGENET)  # no block that it would change
    with refused(ValueError, "pixels-differ", "style='caffe", "--cfg-options", "model.backbone.style=pytorch"):
        check_pixels(ResNet(50, style="caffe"), exported / "timm", IMAGENET)
    with refused(ValueError, "pixels-differ", "model.student.data_preprocessor.bgr_to_rgb=True", "model.teacher"):
        check_pixels(ResNet(50), exported / "timm", CAFFE, "model.student")
    assert not told
    check_pixels(ResNet(50), exported / "timm", CAFFE, refuse=False)  # of a training that goes on
    assert len(told) == 1


@pytest.mark.parametrize("channels", [1, 4])
def test_channels_that_are_no_colours_have_no_order(tmp_path, channels):
    from hgkd.openmmlab.backbone import TimmBackbone

    mean, std = [0.4] * channels, [0.2] * channels
    write_student(tmp_path / "a.pth", "test_resnet", kwargs={"in_chans": channels}, pixels=(mean, std))
    export(tmp_path / "a.pth", tmp_path / "out", "timm")
    backbone = TimmBackbone("test_resnet", in_chans=channels)
    # a loader of one's own, or mmcv's of grey images, whose order nobody turns
    given = prepared_pixels({"mean": [102.0] * channels, "std": [51.0] * channels}, [dict(type="LoadImageFromFile")])
    check_pixels(backbone, tmp_path / "out", given)
    with refused(ValueError, "pixels-differ", f"model.data_preprocessor.std=[{','.join(['51'] * channels)}]") as caught:
        check_pixels(backbone, tmp_path / "out", Pixels((0.0,) * channels, (1.0,) * channels, "BGR"))
    assert "bgr_to_rgb" not in str(caught.value)
    assert "RGB" not in str(caught.value)
