"""Whole detectors and segmentors as graphs: what they say is what mmdet and mmseg say, and what has no graph is named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from downstream_runs import measure_tool, need, scope, shapes_ade20k, shapes_coco, tiny_detector, tiny_segmentor, train_tool
from PIL import Image
from refusals import refused
from tiny_runs import ROOT
from torch import nn

from hgkd.data.shapes import CLASSES
from hgkd.errors import StoppedError, WeightsError
from hgkd.export import ExportError, export
from hgkd.openmmlab.deployment import proof, writers
from hgkd.openmmlab.deployment.graphs import AnySizePool
from hgkd.openmmlab.models import build_model

need("mmdet", "mmseg")
pytest.importorskip("onnxruntime", reason="pip install 'hgkd[export]'")
WIDTHS = [32, 48, 192, 96]  # of timm's test_resnet
TIMM = dict(type="hgkd.TimmBackbone", name="test_resnet")
CLASSIFY = ("retina_cls", "rtm_cls", "rpn_cls", "fc_cls", "conv_cls", "conv_obj", "conv_seg", "centerness")


def recipe(path, **options):
    return train_tool.load_config(ROOT / "downstream" / path, options=options)


def retinanet():
    cfg = recipe("detection/retinanet_r18_12e_bccd.py")
    cfg.model.backbone = TIMM
    cfg.model.neck.update(in_channels=WIDTHS, out_channels=16)
    cfg.model.bbox_head.update(in_channels=16, feat_channels=16, stacked_convs=1)
    return cfg


def faster_rcnn():
    cfg = recipe("detection/faster-rcnn_r18_12e_bccd.py")
    cfg.model.backbone = TIMM
    cfg.model.neck.update(in_channels=WIDTHS, out_channels=16)
    cfg.model.rpn_head.update(in_channels=16, feat_channels=16)
    cfg.model.roi_head.bbox_roi_extractor.out_channels = 16
    cfg.model.roi_head.bbox_head.update(in_channels=16, fc_out_channels=32)
    cfg.model.test_cfg.rpn.update(nms_pre=100, max_per_img=40)
    return cfg


def rtmdet():
    cfg = recipe("detection/rtmdet_cspnext-tiny_24e_bccd.py")
    cfg.model.backbone.update(widen_factor=0.125)
    cfg.model.neck.update(in_channels=[32, 64, 128], out_channels=16)
    cfg.model.bbox_head.update(in_channels=16, feat_channels=16, stacked_convs=1)
    cfg.model.test_cfg.update(max_per_img=50)
    return cfg


def yolox():
    cfg = recipe("detection/yolox_cspdarknet-tiny_300e_coco.py")
    cfg.model.backbone.update(widen_factor=0.125)
    cfg.model.neck.update(in_channels=[32, 64, 128], out_channels=16)
    cfg.model.bbox_head.update(in_channels=16, feat_channels=16, stacked_convs=1)
    return cfg


def upernet():
    cfg = recipe("segmentation/upernet_r18_1k_camvid.py")
    cfg.model.backbone = TIMM
    cfg.model.decode_head.update(in_channels=WIDTHS, channels=16)
    cfg.model.auxiliary_head.update(in_channels=192, channels=8)
    return cfg


MODELS = {build.__name__: build for build in (retinanet, faster_rcnn, rtmdet, yolox, upernet)}


def written(folder: Path, cfg, classes=None) -> Path:
    """A checkpoint of an untrained model whose scores are spread and differ from each other."""
    from mmengine.registry import MODELS

    torch.manual_seed(0)
    with scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and any(part in name for part in CLASSIFY):
                layer.weight.normal_(std=0.5)
                nn.init.zeros_(layer.bias)
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.uniform_(-0.2, 0.2)
    kept = {key: cfg[key].to_dict() for key in ("model", "test_dataloader")} | {"default_scope": cfg.default_scope}
    text = "".join(f"{key} = {value!r}\n" for key, value in kept.items())
    meta = {"cfg": text, "dataset_meta": {"classes": classes or cfg.test_dataloader.dataset.metainfo.classes}}
    torch.save({"meta": meta, "state_dict": model.state_dict()}, folder / "model.pth")
    return folder / "model.pth"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, size in enumerate(((120, 160), (96, 128))):
        smooth = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(smooth).resize(size[::-1]).save(folder / f"{number}.png")
    return folder
