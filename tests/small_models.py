"""Any config of mmdet or mmseg made an eighth of its size, and tiny data sets in the layouts that the shipped recipes expect.

What makes a run is left as the config has it: loops, hooks, schedules, evaluators, kinds of transforms and losses.
"""

import copy
import itertools
import json
from pathlib import Path

import numpy as np
from mmengine.config import Config
from PIL import Image

from hgkd.data.shapes import CLASSES
from hgkd.openmmlab.config import model_config

_NARROW = {  # of a backbone that is 64 channels wide in its first stage
    "ResNet": dict(base_channels=8, stem_channels=8),
    "ResNetV1c": dict(base_channels=8, stem_channels=8),
    "ResNeXt": dict(base_channels=8, stem_channels=8, groups=2),
    "hgkd.TimmBackbone": dict(dims=(12, 24, 48, 96), depths=(1, 1, 2, 1)),
}
_SIDES = ("scale", "scales", "crop_size", "img_scale", "size", "random_size_range", "pad_size")
_WIDTHS = ("num_groups", "embed_dims", "num_feats")
# something is found, and not much, by a detector that has learnt nothing
_FEW = dict(score_thr=0.0, nms_pre=50, max_per_img=10, mask_thr=0.0, filter_thr=0.0, update_thr=0.0, min_bbox_size=-1)


def shrink(cfg: Config) -> Config:
    """A copy with networks, images and crops of an eighth; teachers given by name become their (shrunk) config."""
    cfg = copy.deepcopy(cfg)
    for part in ("student", "teacher"):
        if part in cfg.model:
            cfg.model[part] = model_config(cfg.model[part])
    for part in ("model", "train_dataloader", "val_dataloader", "test_dataloader"):
        cfg[part] = _shrunk(cfg[part])
    return cfg


def _shrunk(part, key=""):
    if isinstance(part, dict):
        found = {name: _shrunk(value, name) for name, value in part.items()}
        if key == "backbone":
            found.update(_NARROW.get(part["type"].removeprefix("mmdet.").removeprefix("mmseg."), {}))
        found.update({name: few for name, few in _FEW.items() if name in part})
        return type(part)(found)
    if isinstance(part, (list, tuple)):
        return type(part)(_shrunk(value, key) for value in part)
    if key == "widen_factor":
        return part / 8
    if type(part) is int and (key.endswith("channels") or key in _WIDTHS) and part > 3:
        return part // 8
    if type(part) is int and key in _SIDES and part >= 64:
        return 32 * max(1, round(part / 8 / 32))  # some networks need whole cells
    return part


def write_images(root: Path, names, size=(48, 64)) -> None:
    rng = np.random.default_rng(0)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / name)


def _write_coco(root: Path, splits, classes) -> None:
    """``splits``: annotation file -> (folder of the images, number). Boxes, polygons, ids with gaps, one crowd region."""
    categories = [{"id": 2 * number + 1, "name": name} for number, name in enumerate(classes)]
    for file, (folder, number) in splits.items():
        names = [f"{Path(file).stem}_{index:03d}.jpg" for index in range(number)]
        write_images(root / folder, names)
        images = [{"id": n + 1, "file_name": name, "height": 48, "width": 64} for n, name in enumerate(names)]
        annotations = []
        for image, (x, y, w, h) in itertools.product(images, [(4, 4, 20, 24), (30, 10, 30, 30), (8, 20, 36, 20)]):
            crowd = len(annotations) == 2
            corners = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": categories[len(annotations) % len(categories)]["id"],
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(crowd),
                    "segmentation": {"size": [48, 64], "counts": [500, 1500, 1072]} if crowd else corners,
                }
            )
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
        (root / file).write_text(json.dumps(content))


def write_coco_2017(root: Path) -> None:
    """COCO as it is downloaded: 80 categories, ``{train,val}2017`` and ``annotations/instances_*2017.json``."""
    from mmdet.datasets import CocoDataset

    splits = {f"annotations/instances_{split}2017.json": (f"{split}2017", n) for split, n in (("train", 2), ("val", 1))}
    _write_coco(root, splits, CocoDataset.METAINFO["classes"])


def write_bccd(root: Path, train: int = 2) -> None:
    splits = {f"annotations/{split}.json": ("images", n) for split, n in (("train", train), ("val", 1), ("test", 1))}
    _write_coco(root, splits, ("WBC", "RBC", "Platelets"))


def write_shapes_coco(root: Path) -> None:
    """As ``hgkd make-shapes --layout coco`` writes."""
    splits = {f"annotations/{split}.json": (f"images/{split}", n) for split, n in (("train", 2), ("val", 1))}
    _write_coco(root, splits, CLASSES)


def _write_label_maps(root: Path, pairs, values) -> None:
    rng = np.random.default_rng(1)
    write_images(root, [image for image, _ in pairs], (64, 128))
    for _, name in pairs:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        blocks = rng.choice(values, (8, 16)).astype(np.uint8)
        Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)).save(root / name)


def write_ade20k(root: Path) -> None:
    """ADE20K (``ADEChallengeData2016``): 150 classes from 1, 0 is ignored."""
    parts = [("training", 1), ("training", 2), ("validation", 1)]
    pairs = [(f"images/{split}/ADE_{n:08d}.jpg", f"annotations/{split}/ADE_{n:08d}.png") for split, n in parts]
    _write_label_maps(root, pairs, range(151))


def write_cityscapes(root: Path) -> None:
    """Cityscapes: a folder a city, label maps of 19 training ids, 255 is ignored."""
    parts = [("train", "aachen", 0), ("train", "ulm", 1), ("val", "lindau", 0)]
    stems = [(split, f"{split}/{city}/{city}_{n:06d}_000019") for split, city, n in parts]
    pairs = [(f"leftImg8bit/{stem}_leftImg8bit.png", f"gtFine/{stem}_gtFine_labelTrainIds.png") for _, stem in stems]
    _write_label_maps(root, pairs, [*range(19), 255])


def write_camvid(root: Path) -> None:
    parts = [("train", 0), ("train", 1), ("val", 2), ("test", 3)]
    pairs = [(f"images/{split}/{n}.jpg", f"annotations/{split}/{n}.png") for split, n in parts]
    _write_label_maps(root, pairs, range(12))


LAYOUTS = {
    "coco": write_coco_2017,
    "bccd": write_bccd,
    "shapes": write_shapes_coco,
    "ade20k": write_ade20k,
    "cityscapes": write_cityscapes,
    "camvid": write_camvid,
}
