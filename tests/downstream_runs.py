"""Shipped downstream recipes made so small that they train in seconds on generated shapes, for tests of whole runs."""

from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_runs import ROOT, load_tool

from hgkd.data.shapes import CLASSES, write_ade20k, write_coco
from hgkd.openmmlab import register_ops

DETECTOR = ROOT / "downstream/detection/faster-rcnn_r18_12e_bccd.py"
RETINANET = ROOT / "downstream/detection/retinanet_r18_12e_bccd.py"
SEGMENTOR = ROOT / "downstream/segmentation/upernet_r18_1k_camvid.py"
RECIPES = sorted(
    str(file.relative_to(ROOT))
    for folder in ("detection", "segmentation")
    for file in (ROOT / "downstream" / folder).glob("*.py")
)


def need(*packages):
    """Skip the calling module without these packages; the operators are registered first, since both import them."""
    pytest.importorskip("mmcv")
    register_ops()
    for package in packages:
        pytest.importorskip(package)


@contextmanager
def scope(name):
    """mmdet's or mmseg's registries as the default ones."""
    from mmengine.registry import DefaultScope

    with DefaultScope.overwrite_default_scope(name):
        yield


def shapes_coco(root: Path) -> Path:
    write_coco(root, train=4, test=2, image_size=64, seed=0)
    return root


def shapes_ade20k(root: Path) -> Path:
    write_ade20k(root, train=4, test=2, image_size=64, seed=0)
    return root


def tiny_detector(root, **options):
    """Options that train a detector of BCCD's recipes for two steps on the generated shapes of ``root``."""
    found = {"data_root": str(root), "epochs": 1, "batch_size": 2, "default_hooks.logger.interval": 1}
    for loader, split in (("train", "train"), ("val", "val"), ("test", "val")):
        place = f"{loader}_dataloader.dataset"
        found[f"{place}.metainfo.classes"] = CLASSES
        found[f"{place}.ann_file"] = f"annotations/{split}.json"
        found[f"{place}.data_prefix.img"] = f"images/{split}/"
        if loader != "train":
            found[f"{loader}_evaluator.ann_file"] = f"{root}/annotations/{split}.json"
    return found | options


FASTER_HEAD = {
    "model.roi_head.bbox_head.num_classes": len(CLASSES),
    "model.roi_head.bbox_head.fc_out_channels": 32,
    "model.train_cfg.rpn_proposal.max_per_img": 20,
    "model.test_cfg.rpn.max_per_img": 20,
}


def tiny_segmentor(root, model="model", **options):
    """Options that train a segmentor of CamVid's recipes for two steps on the generated shapes of ``root``."""
    found = {"data_root": str(root), "iterations": 2, "batch_size": 2, "default_hooks.logger.interval": 1}
    for head in ("decode_head", "auxiliary_head"):
        found |= {f"{model}.{head}.num_classes": len(CLASSES), f"{model}.{head}.ignore_index": 255}
    found |= {f"{model}.decode_head.channels": 16, f"{model}.data_preprocessor.seg_pad_val": 255}
    for loader, split in (("train", "training"), ("val", "validation"), ("test", "validation")):
        place = f"{loader}_dataloader.dataset"
        found[f"{place}.metainfo"] = {"classes": CLASSES, "palette": []}
        found[f"{place}.data_prefix"] = {"img_path": f"images/{split}", "seg_map_path": f"annotations/{split}"}
        found[f"{place}.reduce_zero_label"] = True
        if loader != "train":
            found[f"{loader}_evaluator.ignore_index"] = 255
    return found | options


train_tool, measure_tool = load_tool("train"), load_tool("test")
