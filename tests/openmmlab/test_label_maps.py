"""Label maps of the wrong kind or size, and settings that ignore different values, are refused before training."""

import numpy as np
import pytest
from downstream_runs import SEGMENTOR, need, shapes_ade20k, tiny_segmentor, train_tool
from mmengine.config import Config
from PIL import Image
from refusals import refused

from hgkd.data.shapes import CLASSES
from hgkd.errors import DataError
from hgkd.openmmlab.config import merge_options
from hgkd.openmmlab.data_checks.checks import check_data

need("mmseg")
BOTH = ("train_dataloader", "val_dataloader")
TRAIN = "annotations/training/000001.png"
VAL = "annotations/validation/000000.png"


@pytest.fixture
def root(tmp_path):
    return shapes_ade20k(tmp_path)


def segmentor(root, **options):
    return train_tool.load_config(SEGMENTOR, options={**tiny_segmentor(root), **options})


def save(file, *shape, value=1, dtype=np.uint8):
    Image.fromarray(np.full(shape, value, dtype)).save(file)


# maps


@pytest.mark.parametrize(("shape", "channels"), [((64, 64, 3), "RGB"), ((64, 64, 2), "LA"), ((64, 64, 4), "RGBA")])
@pytest.mark.parametrize("place", [TRAIN, VAL])
def test_a_map_of_several_channels(root, shape, channels, place):
    save(root / place, *shape)
    with refused(DataError, "label-map-channels", place, channels):
        check_data(segmentor(root), BOTH)


def test_maps_of_one_channel(root):
    save(root / TRAIN, 64, 64, dtype=np.uint16)
    Image.open(root / VAL).convert("P").save(root / VAL)
    Image.fromarray(np.ones((64, 64), bool)).save(root / "annotations/training/000000.png")
    assert check_data(segmentor(root), BOTH) == []


def test_a_map_of_another_size(root):
    save(root / VAL, 32, 32)
    with refused(DataError, "label-map-size", "val_dataloader", "000000.png", "32 x 32", "64 x 64"):
        check_data(segmentor(root), BOTH)
    save(root / VAL, 64, 64)
    save(root / TRAIN, 32, 32)
    remarks = check_data(segmentor(root), BOTH)  # resized to one scale, as here, both fit
    assert len(remarks) == 1
    assert "train_dataloader: 1 label maps are of another scale than their images" in remarks[0]
    save(root / TRAIN, 32, 64)
    with refused(DataError, "label-map-size", "train_dataloader", "000001.png", "64 x 32"):
        check_data(segmentor(root), BOTH)


def test_an_image_that_is_turned_when_it_is_read(root):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (64, 32)).save(root / "images/validation/000000.jpg", exif=exif)
    save(root / VAL, 32, 64)
    with refused(DataError, "label-map-size", "64 x 32", "32 x 64"):
        check_data(segmentor(root), BOTH)
    load = "val_dataloader.dataset.pipeline.0.color_type"
    assert check_data(segmentor(root, **{load: "color_ignore_orientation"}), BOTH) == []
    save(root / VAL, 64, 32)
    assert check_data(segmentor(root), BOTH) == []


@pytest.mark.parametrize("folder", ["training", "validation"])
def test_a_set_without_any_label(root, folder):
    for file in (root / "annotations" / folder).iterdir():
        save(file, 64, 64, value=0)  # reduce_zero_label
    with refused(DataError, "label-maps-all-ignored", "_dataloader"):
        check_data(segmentor(root), BOTH)


def test_images_of_another_suffix_are_said(root):
    (root / "images/training/000001.jpg").rename(root / "images/training/000001.JPG")
    remarks = check_data(segmentor(root), BOTH)
    assert len(remarks) == 1
    assert "train_dataloader: 1 label maps of" in remarks[0]
    assert "have no image with the suffix '.jpg' in" in remarks[0]
    assert "(000001.png); suffixes count upper and lower case" in remarks[0]


def test_a_list_of_images(root):
    file = root / "train.txt"
    file.write_text("000000\n000001\n")
    options = {"train_dataloader.dataset.ann_file": str(file)}
    assert check_data(segmentor(root, **options), BOTH) == []
    (root / "images/training/000001.jpg").unlink()
    with refused(FileNotFoundError, "annotated-images-missing", "1", "2", "train.txt", "000001.jpg"):
        check_data(segmentor(root, **options), BOTH)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("000000.jpg\n", "names are listed without suffix, which the data set adds, and .*train.txt has '000000.jpg'"),
        ("000000.png\n", "'000000.png' is there, without its last suffix, which the data set adds"),
        ("000000.jpg,000000.png\n", "'000000.jpg' is there, without what follows its first comma or blank"),
        ("images/000000\n", "'000000.png' is there, without its folders"),
        ("000000\n\n", "train.txt has an empty line; take it out"),
        ("\ufeff000000\n", "begins with a byte order mark"),
    ],
)
def test_a_list_that_is_none_of_names(root, lines, message):
    file = root / "train.txt"
    file.write_text(lines, encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=f"train_dataloader: label map .* does not exist.*{message}"):
        check_data(segmentor(root, **{"train_dataloader.dataset.ann_file": str(file)}), BOTH)


def test_what_is_no_image(root):
    (root / "images/validation/000000.jpg").write_text("text")
    with refused(DataError, "annotated-images-unreadable", "val_dataloader", "1", "2", "000000.jpg"):
        check_data(segmentor(root), BOTH)


@pytest.mark.parametrize("asked", ["mIOU", ["mIoU", "dice"]])
def test_a_measure_that_mmseg_lacks(root, asked):
    """https://github.com/open-mmlab/mmsegmentation/issues/180: an error after the first validation."""
    told = r"val_evaluator.iou_metrics=.*, needed is a list of some of mDice, mFscore, mIoU"
    with pytest.raises(DataError, match=told):
        check_data(segmentor(root, **{"val_evaluator.iou_metrics": asked}), BOTH)
    assert check_data(segmentor(root, **{"val_evaluator.iou_metrics": "mDice"}), BOTH) == []


def test_palettes_that_opencv_would_read_as_colours(root):
    """https://github.com/open-mmlab/mmsegmentation/issues/2486 asks how palettes are read: as numbers, by Pillow."""
    Image.open(root / VAL).convert("P").save(root / VAL)
    options = {"val_dataloader.dataset.pipeline.2.imdecode_backend": "cv2"}
    with refused(DataError, "label-map-palette", "000000.png", "imdecode_backend='cv2'", "LoadAnnotations"):
        check_data(segmentor(root, **options), BOTH)
    options["val_dataloader.dataset.pipeline.2.imdecode_backend"] = "pillow"
    assert check_data(segmentor(root, **options), BOTH) == []


def test_a_zero_label_that_the_pipeline_does_not_reduce(root):
    """https://github.com/open-mmlab/mmsegmentation/issues/932: mmseg fails on it in the first step."""
    options = {"train_dataloader.dataset.pipeline.1.reduce_zero_label": False}
    told = r"train_dataloader: the data set has reduce_zero_label=True, its pipeline's LoadAnnotations False; take it out"
    with pytest.raises(DataError, match=told):
        check_data(segmentor(root, **options), BOTH)
    options["train_dataloader.dataset.pipeline.1.reduce_zero_label"] = True
    assert check_data(segmentor(root, **options), BOTH) == []


def test_a_background_that_is_not_0(root):
    """https://github.com/open-mmlab/mmsegmentation/issues/1714: the background is ignored, and the classes are shifted."""
    cfg = segmentor(root)
    for loader in BOTH:
        cfg[loader].dataset.metainfo.classes = ("background", *CLASSES[1:])
    remarks = check_data(cfg, BOTH)
    assert len(remarks) == 2
    assert "with reduce_zero_label=True the value 0 is ignored, and 1 is 'background'; where 0 is the background" in remarks[0]


def test_a_test_set_without_maps(root):
    cfg = segmentor(root)
    cfg.val_dataloader.dataset.data_prefix.pop("seg_map_path")
    assert check_data(cfg, BOTH) == []
    save(root / VAL, 64, 64, value=77)
    cfg = segmentor(root, **{"val_evaluator.format_only": True})
    assert check_data(cfg, BOTH) == []


# what is ignored


def test_a_value_that_the_evaluation_does_not_ignore(root):
    save(root / VAL, 64, 64, value=9)  # 8 after reduce_zero_label, one more than the classes
    heads = {"model.decode_head.ignore_index": 8, "model.auxiliary_head.ignore_index": 8}
    options = {**heads, "model.data_preprocessor.seg_pad_val": 8, "train_dataloader.dataset.reduce_zero_label": False}
    for file in (root / "annotations/training").iterdir():
        save(file, 64, 64)
    with refused(DataError, "label-map-value", "9", "255", "val_evaluator.ignore_index"):
        check_data(segmentor(root, **options), BOTH)
    cfg = segmentor(root, **options)
    del cfg.val_evaluator["ignore_index"]
    with refused(DataError, "label-map-value", "9", "255", "val_evaluator.ignore_index"):
        check_data(cfg, BOTH)
    save(root / "annotations/validation/000001.png", 64, 64, value=0)
    with refused(DataError, "label-map-value", "0", "8", "val_evaluator.ignore_index"):
        check_data(segmentor(root, **options, **{"val_evaluator.ignore_index": 8}), BOTH)
    save(root / "annotations/validation/000001.png", 64, 64)
    assert check_data(segmentor(root, **options, **{"val_evaluator.ignore_index": 8}), BOTH) == []


def test_heads_that_ignore_different_values_are_said(root):
    cfg = segmentor(root)
    for file in (root / "annotations/training").iterdir():
        save(file, 64, 64)
    cfg.model.auxiliary_head = [cfg.model.auxiliary_head, {**cfg.model.auxiliary_head, "ignore_index": -100}]
    cfg.model.data_preprocessor.size = None
    assert check_data(cfg, BOTH) == ["val_evaluator.ignore_index=255, but model.auxiliary_head.1.ignore_index=-100"]
    save(root / TRAIN, 64, 64, value=0)
    with refused(DataError, "label-map-value", "-100", "model.auxiliary_head.1.ignore_index"):
        check_data(cfg, BOTH)


def test_padding_that_no_head_ignores(root):
    for file in (root / "annotations/training").iterdir():
        save(file, 64, 64)
    options = {f"model.{head}.ignore_index": 11 for head in ("decode_head", "auxiliary_head")}
    with refused(DataError, "padding-value-not-ignored", "seg_pad_val=255", "8", "model.decode_head.ignore_index=11"):
        check_data(segmentor(root, **options), BOTH)
    options["model.data_preprocessor.seg_pad_val"] = 0  # the first class
    assert check_data(segmentor(root, **options), BOTH)[0].startswith("val_evaluator.ignore_index=255, but")


def test_a_stock_config_with_a_boundary_head(tmp_path):
    cfg = Config.fromstring("_base_ = 'mmseg::stdc/stdc1_4xb12-80k_cityscapes-512x1024.py'", ".py")
    merge_options(cfg, {"data_root": str(tmp_path)})
    for loader in BOTH:
        images, maps = (tmp_path / folder for folder in cfg[loader].dataset.data_prefix.values())
        images.mkdir(parents=True)
        maps.mkdir(parents=True)
        Image.new("RGB", (16, 8)).save(images / "a_leftImg8bit.png")
        save(maps / "a_gtFine_labelTrainIds.png", 8, 16)
    assert check_data(cfg, BOTH) == []
    cfg.model.auxiliary_head[1].num_classes = 2
    with refused(DataError, "head-classes-differ", "model.auxiliary_head.1.num_classes=2", "19"):
        check_data(cfg, BOTH)
