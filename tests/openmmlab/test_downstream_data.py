"""Wrong data is refused with its name before anything is trained; options reach their places."""

import json

import numpy as np
import pytest
from downstream_runs import FASTER_HEAD, need, shapes_ade20k, shapes_coco, tiny_detector, tiny_segmentor, train_tool
from mmengine.config import Config
from PIL import Image
from tiny_runs import ROOT

from hgkd.errors import DataError
from hgkd.openmmlab.checks import check_data
from hgkd.openmmlab.config import drop_downloads, merge_options, model_config, skip_unreadable

need("mmdet", "mmseg")
DETECTOR = ROOT / "downstream/detection/faster-rcnn_r18_12e_bccd.py"
SEGMENTOR = ROOT / "downstream/segmentation/upernet_r18_1k_camvid.py"
BOTH = ("train_dataloader", "val_dataloader")


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return shapes_coco(tmp_path_factory.mktemp("coco"))


def detector(root, **options):
    return train_tool.load_config(DETECTOR, options={**tiny_detector(root), **FASTER_HEAD, **options})


def segmentor(root, **options):
    return train_tool.load_config(SEGMENTOR, options={**tiny_segmentor(root), **options})


def test_good_data_passes(coco, tmp_path):
    check_data(detector(coco), BOTH)
    check_data(segmentor(shapes_ade20k(tmp_path)), BOTH)


def test_annotation_file_missing(coco):
    cfg = detector(coco, **{"train_dataloader.dataset.ann_file": "annotations/trian.json"})
    with pytest.raises(
        FileNotFoundError, match=r"train_dataloader: annotation file .*trian.json does not exist; set data_root"
    ):
        check_data(cfg, BOTH)


def test_folder_missing(coco, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder .*nowhere does not exist; set --cfg-options data_root=DIR"):
        check_data(detector(tmp_path / "nowhere"), BOTH)
    cfg = detector(coco, **{"val_dataloader.dataset.data_prefix.img": "pictures"})
    with pytest.raises(
        FileNotFoundError, match=r"val_dataloader: folder .*pictures does not exist \(data_prefix.img='pictures'"
    ):
        check_data(cfg, BOTH)


def test_categories_that_the_file_calls_otherwise(coco):
    names = ("WBC", "RBC", "Platelets")
    cfg = detector(coco, **{"train_dataloader.dataset.metainfo.classes": names, "model.roi_head.bbox_head.num_classes": 3})
    with pytest.raises(DataError, match=r"has 8 categories \(crescent, .* 2 more\), the config 3 .*the file lacks WBC, RBC"):
        check_data(cfg, BOTH)


def test_head_with_another_number_of_classes(coco):
    cfg = detector(coco, **{"model.roi_head.bbox_head.num_classes": 80})
    with pytest.raises(DataError, match=r"model.roi_head.bbox_head.num_classes=80, but the data set of train_dataloader has 8"):
        check_data(cfg, BOTH)


def test_annotation_of_an_unlisted_category(coco, tmp_path):
    content = json.loads((coco / "annotations/train.json").read_text())
    content["annotations"][0]["category_id"] = 99
    (tmp_path / "bad.json").write_text(json.dumps(content))
    cfg = detector(coco, **{"train_dataloader.dataset.ann_file": str(tmp_path / "bad.json")})
    with pytest.raises(DataError, match=r"annotates objects of category 99, which it does not list"):
        check_data(cfg, BOTH)


def test_no_coco_file(coco, tmp_path):
    (tmp_path / "bad.json").write_text("[]")
    cfg = detector(coco, **{"train_dataloader.dataset.ann_file": str(tmp_path / "bad.json")})
    with pytest.raises(DataError, match=r"bad.json is no COCO annotation file"):
        check_data(cfg, BOTH)


def test_label_map_out_of_range(tmp_path):
    shapes_ade20k(tmp_path)
    cfg = segmentor(tmp_path)
    file = tmp_path / "annotations/training/000001.png"
    Image.fromarray(np.full((64, 64), 9, np.uint8)).save(file)  # 8 classes, 0 = unlabelled
    with pytest.raises(DataError, match=r"000001.png holds the value 9, but the 8 classes are 0 .. 8 \(0 = unlabelled"):
        check_data(cfg, BOTH)
    Image.fromarray(np.full((64, 64), 255, np.uint8)).save(file)
    check_data(cfg, BOTH)


def test_label_map_without_zero_label(tmp_path):
    shapes_ade20k(tmp_path)
    cfg = segmentor(tmp_path, **{"train_dataloader.dataset.reduce_zero_label": False})
    Image.fromarray(np.full((64, 64), 8, np.uint8)).save(tmp_path / "annotations/training/000000.png")
    with pytest.raises(DataError, match=r"holds the value 8, but the 8 classes are 0 .. 7 and 255 is ignored"):
        check_data(cfg, BOTH)


def test_label_map_missing(tmp_path):
    shapes_ade20k(tmp_path)
    (tmp_path / "annotations/validation/000000.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"val_dataloader: label map .*000000.png does not exist; every image needs one"
    ):
        check_data(segmentor(tmp_path), BOTH)


def test_no_images_of_that_suffix(tmp_path):
    shapes_ade20k(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no images with the suffix '.bmp'"):
        check_data(segmentor(tmp_path, **{"train_dataloader.dataset.img_suffix": ".bmp"}), BOTH)


# options


def test_data_root_reaches_every_place():
    cfg = train_tool.load_config(DETECTOR, options={"data_root": "/somewhere"})
    assert {cfg[f"{name}_dataloader"].dataset.data_root for name in ("train", "val", "test")} == {"/somewhere"}
    assert cfg.test_evaluator.ann_file == "/somewhere/annotations/test.json"


def test_data_root_inside_a_wrapper():
    cfg = train_tool.load_config(ROOT / "downstream/detection/mask-rcnn_r50_3x_coco.py", options={"data_root": "/somewhere"})
    assert cfg.train_dataloader.dataset.dataset.data_root == "/somewhere"
    assert cfg.val_evaluator.ann_file == "/somewhere/annotations/instances_val2017.json"


def test_the_schedule_is_stretched():
    cfg = train_tool.load_config(ROOT / "downstream/detection/mask-rcnn_r50_1x_coco.py", options={"epochs": 6})
    assert (cfg.train_cfg.max_epochs, cfg.param_scheduler[1].end) == (6, 6)
    assert cfg.param_scheduler[1].milestones == [4, 6]
    assert cfg.param_scheduler[0].end == 500  # a warm-up counted in steps
    cfg = train_tool.load_config(SEGMENTOR, options={"iterations": 100})
    assert (cfg.train_cfg.max_iters, cfg.train_cfg.val_interval, cfg.default_hooks.checkpoint.interval) == (100, 100, 100)
    assert [(part.begin, part.end) for part in cfg.param_scheduler] == [(0, 5), (5, 100)]


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        (DETECTOR, {"iterations": 3}, "iterations=3 has no place in this config, which counts epochs; set epochs"),
        (SEGMENTOR, {"epochs": 3}, "epochs=3 has no place in this config, which counts iterations; set iterations"),
        (DETECTOR, {"epochs": 0}, "epochs must be 1 or more, got 0"),
        (DETECTOR, {"bakbone": "a"}, "unknown config key 'bakbone'; did you mean 'backbone'"),
        (DETECTOR, {"modle.neck": 1}, "unknown config key 'modle'; did you mean 'model'"),
        (DETECTOR, {"teacher_checkpoint": "a"}, "this config trains without a teacher"),
    ],
)
def test_options_without_a_place(recipe, options, message):
    with pytest.raises(ValueError, match=message):
        train_tool.load_config(recipe, options=options)


def test_other_options():
    given = {"lr": 0.5, "workers": 2, "batch_size": 3, "seed": 4, "backbone": "x"}
    cfg = train_tool.load_config(DETECTOR, options=given, amp=True)
    assert (cfg.optim_wrapper.optimizer.lr, cfg.train_dataloader.batch_size, cfg.randomness.seed) == (0.5, 3, 4)
    assert (cfg.val_dataloader.num_workers, cfg.val_dataloader.persistent_workers, cfg.backbone) == (2, True, "x")
    assert cfg.optim_wrapper.type in ("hgkd.BFloat16OptimWrapper", "AmpOptimWrapper")


def test_nothing_is_downloaded():
    model = model_config("mmdet::retinanet/retinanet_x101-64x4d_fpn_1x_coco.py")
    assert model.backbone.init_cfg.checkpoint == "open-mmlab://resnext101_64x4d"
    drop_downloads(model)
    assert model.backbone.init_cfg is None
    local = {"backbone": {"init_cfg": {"type": "Pretrained", "checkpoint": "a.pth"}}, "pretrained": "open-mmlab://a"}
    drop_downloads(local)
    assert local["pretrained"] is None
    assert local["backbone"]["init_cfg"]["checkpoint"] == "a.pth"


def test_model_config_refusals(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model config .*x.py does not exist; give a path, or one like 'mmdet::"):
        model_config(str(tmp_path / "x.py"))
    (tmp_path / "x.py").write_text("a = 1")
    with pytest.raises(ValueError, match="has no 'model'"):
        model_config(str(tmp_path / "x.py"))


def test_training_images_alone_may_be_skipped(tmp_path):
    cfg = Config.fromfile(DETECTOR)
    merge_options(cfg, {})
    skip_unreadable(cfg, str(tmp_path))
    first = cfg.train_dataloader.dataset.pipeline[0]
    assert first == {"type": "hgkd.LoadReadableImage", "report": f"{tmp_path}/unreadable_files.txt"}
    assert cfg.val_dataloader.dataset.pipeline[0].type == "LoadImageFromFile"
