"""Wrong data is refused with its name before anything is trained; options reach their places."""

import json
import re

import numpy as np
import pytest
from downstream_runs import FASTER_HEAD, need, shapes_ade20k, shapes_coco, tiny_detector, tiny_segmentor, train_tool
from mmengine.config import Config
from PIL import Image
from refusals import refused
from tiny_runs import ROOT

from hgkd.data.shapes import CLASSES, write_ade20k, write_coco
from hgkd.errors import DataError
from hgkd.openmmlab.config import drop_downloads, drop_teacher, merge_options, model_config, skip_unreadable_images
from hgkd.openmmlab.data_checks.checks import check_data
from hgkd.openmmlab.images import LoadReadableImage

need("mmdet", "mmseg")
DETECTOR = ROOT / "downstream/detection/faster-rcnn_r18_12e_bccd.py"
SEGMENTOR = ROOT / "downstream/segmentation/upernet_r18_1k_camvid.py"
MGD = ROOT / "downstream/detection/mgd_retinanet_r50_r18_12e_bccd.py"
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
    with refused(FileNotFoundError, "annotation-file-missing", "train_dataloader", "trian.json", "data_root"):
        check_data(cfg, BOTH)


def test_folder_missing(coco, tmp_path):
    with refused(FileNotFoundError, "data-folder-missing", "nowhere", "--cfg-options", "data_root=DIR"):
        check_data(detector(tmp_path / "nowhere"), BOTH)
    cfg = detector(coco, **{"val_dataloader.dataset.data_prefix.img": "pictures"})
    with refused(FileNotFoundError, "data-prefix-missing", "val_dataloader", "pictures", "data_prefix.img='pictures'"):
        check_data(cfg, BOTH)


def test_categories_that_the_file_calls_otherwise(coco):
    names = ("WBC", "RBC", "Platelets")
    cfg = detector(coco, **{"train_dataloader.dataset.metainfo.classes": names, "model.roi_head.bbox_head.num_classes": 3})
    with refused(DataError, "coco-categories-differ", "8", "2", "3", "WBC", "RBC"):
        check_data(cfg, BOTH)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("classes", "cell", r"metainfo.classes='cell' is a text, needed is .* for one class write \('cell',\), with the comma"),
        ("classes", {"disc": 1}, r"metainfo.classes: \{'disc': 1\} is no tuple of names like"),
        ("classes", (), r"metainfo.classes: \(\) is no tuple of names"),
        ("classes", (1, 2), r"metainfo.classes: [(\[]1, 2[)\]] is no tuple of names"),
        ("classes", ("disc", " "), "metainfo.classes: .* is no tuple of names like .*, none of them empty"),
        ("classes", ("disc", "disc"), "metainfo.classes names 'disc' more than once; give every class a name of its own"),
        ("CLASSES", ("disc",), "metainfo.CLASSES is read by nobody; call it classes"),
        ("PALETTE", [(1, 2, 3)], "metainfo.PALETTE is read by nobody; call it palette"),
        (
            "palette",
            (255, 0, 0),
            r"metainfo.palette=.*255, 0, 0.*, needed is a list of colours, one a class, like",
        ),
        ("palette", "red", r"metainfo.palette='red', needed is a list of colours"),
    ],
)
@pytest.mark.parametrize("kind", ["detection", "segmentation"])
def test_what_is_no_tuple_of_names(coco, tmp_path, kind, key, value, message):
    """https://github.com/open-mmlab/mmdetection/issues/4971 and many others: ``('cell')`` is a text."""
    cfg = detector(coco) if kind == "detection" else segmentor(shapes_ade20k(tmp_path))
    cfg.val_dataloader.dataset.metainfo[key] = value
    with pytest.raises(DataError, match=f"val_dataloader.dataset.{message}"):
        check_data(cfg, BOTH)


def test_one_class_of_a_data_set_class(coco):
    from mmdet.datasets import CocoDataset
    from mmdet.registry import DATASETS

    @DATASETS.register_module(force=True)
    class OneCell(CocoDataset):
        METAINFO = {"classes": ("cell")}  # noqa: RUF012

    cfg = detector(coco, **{"train_dataloader.dataset.type": "OneCell"})
    cfg.train_dataloader.dataset.pop("metainfo")
    with refused(DataError, "class-names-are-a-text", "OneCell.METAINFO", "classes", "cell"):
        check_data(cfg, BOTH)


def test_a_palette_of_too_few_colours(tmp_path):
    cfg = segmentor(shapes_ade20k(tmp_path))
    cfg.val_dataloader.dataset.metainfo.palette = [(255, 0, 0)]
    with refused(DataError, "palette-not-colours", "metainfo.palette=[(255, 0, 0)]"):
        check_data(cfg, BOTH)
    cfg.val_dataloader.dataset.metainfo.palette = []
    assert check_data(cfg, BOTH) == []


def test_classes_of_a_file(coco, tmp_path):
    file = tmp_path / "classes.txt"
    file.write_text("\n".join(CLASSES))
    place = {f"{loader}.dataset.metainfo.classes": str(file) for loader in BOTH}
    assert check_data(detector(coco, **place), BOTH) == []
    file.write_text("\n".join(CLASSES) + "\n\n")
    with refused(DataError, "class-names-not-names", "classes.txt"):
        check_data(detector(coco, **place), BOTH)


def test_metainfo_that_is_no_dict(coco):
    cfg = detector(coco)
    cfg.train_dataloader.dataset.metainfo = ("cell",)
    with refused(DataError, "metainfo-not-a-dict", "train_dataloader.dataset.metainfo", "cell", "metainfo=dict"):
        check_data(cfg, BOTH)


def test_head_with_another_number_of_classes(coco):
    cfg = detector(coco, **{"model.roi_head.bbox_head.num_classes": 80})
    with refused(DataError, "head-classes-differ", "model.roi_head.bbox_head.num_classes=80", "train_dataloader", "8"):
        check_data(cfg, BOTH)


def test_annotation_of_an_unlisted_category(coco, tmp_path):
    content = json.loads((coco / "annotations/train.json").read_text())
    content["annotations"][0]["category_id"] = 99
    (tmp_path / "bad.json").write_text(json.dumps(content))
    cfg = detector(coco, **{"train_dataloader.dataset.ann_file": str(tmp_path / "bad.json")})
    with refused(DataError, "coco-category-not-listed", "99"):
        check_data(cfg, BOTH)


def test_no_coco_file(coco, tmp_path):
    (tmp_path / "bad.json").write_text("[]")
    cfg = detector(coco, **{"train_dataloader.dataset.ann_file": str(tmp_path / "bad.json")})
    with refused(DataError, "coco-not-an-object", "bad.json"):
        check_data(cfg, BOTH)


def test_label_map_out_of_range(tmp_path):
    shapes_ade20k(tmp_path)
    cfg = segmentor(tmp_path)
    file = tmp_path / "annotations/training/000001.png"
    Image.fromarray(np.full((64, 64), 9, np.uint8)).save(file)  # 8 classes, 0 = unlabelled
    with refused(DataError, "label-map-value", "000001.png", "9", "8", "0 .. 8", "0"):
        check_data(cfg, BOTH)
    Image.fromarray(np.full((64, 64), 255, np.uint8)).save(file)
    check_data(cfg, BOTH)


def test_label_map_without_zero_label(tmp_path):
    shapes_ade20k(tmp_path)
    cfg = segmentor(tmp_path, **{"train_dataloader.dataset.reduce_zero_label": False})
    Image.fromarray(np.full((64, 64), 8, np.uint8)).save(tmp_path / "annotations/training/000000.png")
    with refused(DataError, "label-map-value", "8", "0 .. 7", "255"):
        check_data(cfg, BOTH)


def test_label_map_missing(tmp_path):
    shapes_ade20k(tmp_path)
    (tmp_path / "annotations/validation/000000.png").unlink()
    with refused(FileNotFoundError, "label-map-missing", "val_dataloader", "000000.png"):
        check_data(segmentor(tmp_path), BOTH)


def test_no_images_of_that_suffix(tmp_path):
    shapes_ade20k(tmp_path)
    with refused(FileNotFoundError, "no-images-of-suffix", "images", ".bmp"):
        check_data(segmentor(tmp_path, **{"train_dataloader.dataset.img_suffix": ".bmp"}), BOTH)


def test_every_label_map_is_read(tmp_path):
    write_ade20k(tmp_path, train=250, test=2, image_size=32, seed=0)
    file = tmp_path / "annotations/training/000248.png"
    Image.fromarray(np.full((32, 32), 77, np.uint8)).save(file)
    with refused(DataError, "label-map-value", "000248.png", "77"):
        check_data(segmentor(tmp_path), BOTH)


@pytest.mark.parametrize("content", [b"no image", None])
def test_a_damaged_label_map_is_named(tmp_path, content):
    shapes_ade20k(tmp_path)
    file = tmp_path / "annotations/training/000001.png"
    file.write_bytes(content or file.read_bytes()[:-40])  # cut off
    with refused(DataError, "label-map-unreadable", "000001.png"):
        check_data(segmentor(tmp_path), BOTH)


def test_a_label_map_of_16_bits(tmp_path):
    shapes_ade20k(tmp_path)
    Image.fromarray(np.full((64, 64), 700, np.uint16)).save(tmp_path / "annotations/training/000001.png")
    with refused(DataError, "label-map-value", "700"):
        check_data(segmentor(tmp_path), BOTH)


def test_some_of_the_classes_of_a_known_data_set(tmp_path):
    shapes_ade20k(tmp_path)
    cfg = segmentor(tmp_path)
    for name in BOTH:
        cfg[name].dataset.type = "ADE20KDataset"
        cfg[name].dataset.metainfo = dict(classes=("wall", "floor"))
    for head in ("decode_head", "auxiliary_head"):
        cfg.model[head].num_classes = 2
    check_data(cfg, BOTH)  # the maps hold 0 .. 8: wall, other classes, floor
    Image.fromarray(np.full((64, 64), 151, np.uint8)).save(tmp_path / "annotations/training/000001.png")
    with refused(DataError, "label-map-value", "151", "150", "0 .. 150", "0"):
        check_data(cfg, BOTH)
    cfg.model.decode_head.ignore_index = 7  # then the classes that are left out, 255 in the end, would reach the loss
    with refused(DataError, "label-map-value", "7"):
        check_data(cfg, BOTH)


def test_images_missing(tmp_path):
    write_coco(tmp_path, train=30, test=20, image_size=32, seed=0)
    cfg = detector(tmp_path)
    assert check_data(cfg, BOTH) == []
    (tmp_path / "images/train/000003.jpg").unlink()
    remarks = check_data(cfg, BOTH)
    assert len(remarks) == 1
    assert re.match(r"train_dataloader: 1 of the 30 images of .*train.json are not in .*train .*000003.jpg", remarks[0])
    for i in range(4, 8):
        (tmp_path / f"images/train/{i:06}.jpg").unlink()
    with refused(FileNotFoundError, "annotated-images-missing", "5", "30", "2", "data_root", "data_prefix"):
        check_data(cfg, BOTH)
    (tmp_path / "images/val/000000.jpg").unlink()  # one is too many: the measure would be another
    cfg.train_dataloader = None
    with refused(FileNotFoundError, "annotated-images-missing", "val_dataloader", "1", "20"):
        check_data(cfg, BOTH)


def test_images_that_a_training_filters_out_may_be_missing(coco, tmp_path):
    content = json.loads((coco / "annotations/train.json").read_text())
    content["images"] += [{**content["images"][0], "id": 1000 + i, "file_name": f"none{i}.jpg"} for i in range(9)]
    (tmp_path / "more.json").write_text(json.dumps(content))
    cfg = detector(coco, **{"train_dataloader.dataset.ann_file": str(tmp_path / "more.json")})
    assert check_data(cfg, BOTH) == []  # filter_empty_gt
    cfg.train_dataloader.dataset.filter_cfg = None
    with refused(FileNotFoundError, "annotated-images-missing", "9", "13"):
        check_data(cfg, BOTH)


def test_more_categories_than_the_config_has_are_said(coco):
    cfg = detector(coco)
    for name in BOTH:
        cfg[name].dataset.metainfo.classes = CLASSES[:2]
    cfg.model.roi_head.bbox_head.num_classes = 2
    remarks = check_data(cfg, BOTH)
    assert len(remarks) == 2
    assert "of val_dataloader" not in remarks[0]
    assert remarks[0].endswith("are not among the config's classes and will be left out")


@pytest.mark.parametrize(
    "name",
    [
        "htc/htc_r50_fpn_1x_coco.py",
        "scnet/scnet_r50_fpn_1x_coco.py",
        "detectors/detectors_htc-r50_1x_coco.py",
        "panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py",
        "mm_grounding_dino/coco/grounding_dino_swin-t_finetune_16xb4_1x_coco.py",  # matches texts: 256 tokens
    ],
)
def test_stock_configs_with_other_heads(name, tmp_path):
    from mmdet.datasets import CocoDataset

    cfg = Config.fromstring(f"_base_ = 'mmdet::{name}'", ".py")
    merge_options(cfg, {"data_root": str(tmp_path)})
    labels = CocoDataset.METAINFO["classes"]
    content = {
        "categories": [{"id": i, "name": label} for i, label in enumerate(labels)],
        "images": [{"id": 1, "file_name": "a.jpg", "width": 64, "height": 48}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 30, 20], "area": 600, "iscrowd": 0}
            | {"segmentation": [[1, 2, 31, 2, 31, 22, 1, 22]]}
        ],
    }
    if "panoptic" in name:
        content["annotations"] = [{"image_id": 1, "segments_info": []}]  # no category_id
    for loader in BOTH:
        dataset = cfg[loader].dataset
        for folder in dataset.data_prefix.values():
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 48)).save(tmp_path / folder / "a.jpg")
        (tmp_path / dataset.ann_file).parent.mkdir(exist_ok=True)
        (tmp_path / dataset.ann_file).write_text(json.dumps(content))
    assert check_data(cfg, BOTH) == []
    if "scnet" in name:  # heads of the data set's own classes are still looked at
        cfg.model.roi_head.mask_head.num_classes = 7
        with refused(DataError, "head-classes-differ", "model.roi_head.mask_head.num_classes=7", "80"):
            check_data(cfg, BOTH)


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
    ("recipe", "options", "refusal"),
    [
        (DETECTOR, {"iterations": 3}, ("schedule-option-without-place", "iterations=3", "epochs")),
        (SEGMENTOR, {"epochs": 3}, ("schedule-option-without-place", "epochs=3", "iterations")),
        (DETECTOR, {"epochs": 0}, ("option-not-a-whole-number", "epochs=0", "1")),
        (DETECTOR, {"epochs": 1.5}, ("option-not-a-whole-number", "epochs=1.5", "1")),
        (DETECTOR, {"epochs": "abc"}, ("option-not-a-whole-number", "epochs='abc'", "1")),
        (SEGMENTOR, {"iterations": True}, ("option-not-a-whole-number", "iterations=True")),
        (DETECTOR, {"batch_size": 0}, ("option-not-a-whole-number", "batch_size=0", "1")),
        (DETECTOR, {"workers": -1}, ("option-not-a-whole-number", "workers=-1", "0")),
        (DETECTOR, {"seed": "x"}, ("option-not-a-whole-number", "seed='x'", "0")),
        (DETECTOR, {"lr": "fast"}, ("option-not-a-number", "lr='fast'", "number")),
        (
            DETECTOR,
            {"image_scale": (9, 9)},
            ("option-changes-nothing", "image_scale=(9, 9)", "image_scale", "train_dataloader.dataset.pipeline.2.scale"),
        ),
        (
            DETECTOR,
            {"metainfo.classes": ("a",)},
            ("option-changes-nothing", "train_dataloader.dataset.metainfo.classes", "val_dataloader.dataset.metainfo.classes"),
        ),
        (SEGMENTOR, {"data_preprocessor.size": (9, 9)}, ("option-changes-nothing", "data_preprocessor")),
        (
            DETECTOR,
            {"param_scheduler.5.end": 4},
            ("list-index-out-of-range", "param_scheduler", "2", "5"),
        ),
        (DETECTOR, {"param_scheduler.end": 4}, ("list-index-out-of-range", "param_scheduler", "2", "end")),
        (DETECTOR, {"load_from.x": 4}, ("config-value-without-parts", "load_from", "x", "load_from._delete_=True")),
        (DETECTOR, {"bakbone": "a"}, ("config-key-unknown", "bakbone", "backbone")),
        (DETECTOR, {"modle.neck": 1}, ("config-key-unknown", "modle", "model")),
        (DETECTOR, {"teacher_checkpoint": "a"}, ("teacher-option-without-teacher",)),
    ],
)
def test_options_without_a_place(recipe, options, refusal):
    with refused(ValueError, *refusal):
        train_tool.load_config(recipe, options=options)


def test_keys_that_are_read_may_be_new():
    new = {
        "find_unused_parameters": True,
        "auto_scale_lr.enable": True,
        "experiment_name": "x",
        "model_wrapper_cfg.type": "MMFullyShardedDataParallel",
        "optim_wrapper.accumulative_counts": 2,
        "train_dataloader.dataset.indices": 4,
        "model.backbone.init_cfg._delete_": True,
        "model.backbone.init_cfg.type": "Pretrained",
    }
    cfg = train_tool.load_config(DETECTOR, options=new)
    assert (cfg.find_unused_parameters, cfg.auto_scale_lr.enable, cfg.experiment_name) == (True, True, "x")
    assert (cfg.optim_wrapper.accumulative_counts, cfg.train_dataloader.dataset.indices) == (2, 4)
    assert cfg.model.backbone.init_cfg == {"type": "Pretrained"}
    assert train_tool.load_config(DETECTOR, options={"epochs": "2"}).train_cfg.max_epochs == 2


def test_a_schedule_of_one_part_is_stretched():
    cfg = Config.fromfile(SEGMENTOR)
    cfg.param_scheduler = dict(type="PolyLR", by_epoch=False, begin=0, end=1000)
    merge_options(cfg, {"iterations": 100})
    assert cfg.param_scheduler.end == 100


def test_data_root_reaches_every_path_in_it():
    cfg = Config.fromstring("_base_ = 'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py'", ".py")
    merge_options(cfg, {"data_root": "/somewhere"})
    assert cfg.val_evaluator[0].seg_prefix == "/somewhere/annotations/panoptic_val2017/"
    assert cfg.val_evaluator[0].ann_file == "/somewhere/annotations/panoptic_val2017.json"
    assert "data/coco" not in str({key: cfg[key] for key in (*BOTH, "val_evaluator", "test_evaluator", "test_dataloader")})


def test_a_folder_of_a_longer_name_is_another():
    cfg = Config.fromfile(DETECTOR)
    cfg.val_evaluator.ann_file = "data/bccd2/val.json"
    merge_options(cfg, {"data_root": "/somewhere"})
    assert cfg.val_evaluator.ann_file == "data/bccd2/val.json"


def test_other_options():
    given = {"lr": 0.5, "workers": 2, "batch_size": 3, "seed": 4, "backbone": "x"}
    cfg = train_tool.load_config(DETECTOR, options=given, amp=True)
    assert (cfg.optim_wrapper.optimizer.lr, cfg.train_dataloader.batch_size, cfg.randomness.seed) == (0.5, 3, 4)
    assert (cfg.val_dataloader.num_workers, cfg.val_dataloader.persistent_workers, cfg.backbone) == (2, True, "x")
    assert cfg.optim_wrapper.type in ("hgkd.BFloat16OptimWrapper", "AmpOptimWrapper")


def test_nothing_is_downloaded():
    model = model_config("mmdet::retinanet/retinanet_x101-64x4d_fpn_1x_coco.py")
    assert model.backbone.init_cfg.checkpoint == "open-mmlab://resnext101_64x4d"
    said = drop_downloads(model)
    assert said == [
        "model.backbone.init_cfg: open-mmlab://resnext101_64x4d is not downloaded; backbone=FILE loads local weights"
    ]
    assert model.backbone.init_cfg is None
    local = {"backbone": {"init_cfg": {"type": "Pretrained", "checkpoint": "a.pth"}}, "pretrained": "open-mmlab://a"}
    drop_downloads(local)
    assert local["pretrained"] is None
    assert local["backbone"]["init_cfg"]["checkpoint"] == "a.pth"
    norms = {"type": "Constant", "layer": "BatchNorm2d", "val": 1}
    several = {"neck": {"init_cfg": [norms, {"type": "Pretrained", "checkpoint": "https://a.org/b.pth"}]}}
    assert drop_downloads(several) == [
        "model.neck.init_cfg: https://a.org/b.pth is not downloaded; backbone=FILE loads local weights"
    ]
    assert several["neck"]["init_cfg"] == [norms]


def test_model_config_refusals(tmp_path):
    with refused(FileNotFoundError, "model-config-missing", "x.py"):
        model_config(str(tmp_path / "x.py"))
    (tmp_path / "x.py").write_text("a = 1")
    with refused(ValueError, "config-without-model", "model"):
        model_config(str(tmp_path / "x.py"))


def test_training_images_alone_may_be_skipped(tmp_path):
    cfg = Config.fromfile(DETECTOR)
    merge_options(cfg, {})
    skip_unreadable_images(cfg, str(tmp_path))
    first = cfg.train_dataloader.dataset.pipeline[0]
    assert first == {"type": "hgkd.LoadReadableImage", "report": f"{tmp_path}/unreadable_files.txt"}
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.pipeline[0] == {"type": "hgkd.LoadReadableImage", "required": True}


def test_a_required_image_is_refused_by_name(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    for name in ("a.jpg", "b.jpg"):
        assert LoadReadableImage()({"img_path": str(tmp_path / name)}) is None
        with refused(DataError, "image-unreadable", name):
            LoadReadableImage(required=True)({"img_path": str(tmp_path / name)})


def test_loading_keeps_a_pipelines_other_arguments(tmp_path):
    Image.new("L", (4, 3)).save(tmp_path / "a.png")
    load = LoadReadableImage(imdecode_backend="cv2", ignore_empty=False, color_type="grayscale", to_float32=True)
    image = load({"img_path": str(tmp_path / "a.png")})["img"]
    assert (image.shape, image.dtype) == ((3, 4), np.float32)


def test_deep_grey_images_are_scaled(tmp_path):
    """https://github.com/open-mmlab/mmdetection/issues/9188 loads grey images; Pillow alone cuts those of 16 bits at 255."""
    values = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    for options, shape in (({}, (48, 64, 3)), ({"color_type": "grayscale"}, (48, 64))):
        image = LoadReadableImage(**options)({"img_path": str(tmp_path / "a.png")})["img"]
        assert (image.shape, image.dtype) == (shape, np.uint8)
        grey = image[..., 0] if image.ndim == 3 else image
        assert np.abs(grey.astype(int) - values.astype(int) // 257).max() <= 1
    as_float = LoadReadableImage(to_float32=True)({"img_path": str(tmp_path / "a.png")})["img"]
    assert (as_float.dtype, as_float.max()) == (np.float32, 255)
    unchanged = LoadReadableImage(color_type="unchanged")({"img_path": str(tmp_path / "a.png")})["img"]
    assert (unchanged == values).all()


def test_readers_that_cannot_stay(coco):
    """https://github.com/open-mmlab/mmsegmentation/issues/2514."""
    options = {"train_dataloader.persistent_workers": True, "train_dataloader.num_workers": 0}
    told = r"train_dataloader.persistent_workers=True, but num_workers=0.*set train_dataloader.persistent_workers=False"
    with pytest.raises(DataError, match=told):
        check_data(detector(coco, **options), BOTH)
    options["train_dataloader.persistent_workers"] = False
    assert check_data(detector(coco, **options), BOTH) == []


def test_a_measure_of_all_images(coco):
    with refused(DataError, "test-loader-drops-images", "val_dataloader.drop_last=True"):
        check_data(detector(coco, **{"val_dataloader.drop_last": True}), BOTH)
    with refused(DataError, "indices-leave-images-out", "val_dataloader", "indices=1"):
        check_data(detector(coco, **{"val_dataloader.dataset.indices": 1}), BOTH)


def test_a_home_folder_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    cfg = train_tool.load_config(DETECTOR, options={"data_root": "~/bccd"})
    assert cfg.train_dataloader.dataset.data_root == "/home/me/bccd"
    assert cfg.test_evaluator.ann_file == "/home/me/bccd/annotations/test.json"
    cfg = train_tool.load_config(MGD, options={"teacher_checkpoint": "~/a.pth"})
    assert cfg.model.teacher_checkpoint == "/home/me/a.pth"


def test_a_student_without_its_teacher():
    cfg = train_tool.load_config(MGD)
    drop_teacher(cfg)
    assert cfg.model.type == "RetinaNet"
    before = cfg.model
    drop_teacher(cfg)
    assert cfg.model == before


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("model.test_cfg.rpn.max_perimg", "max_per_img"),
        ("val_evaluator.metrik", "metric"),
        ("train_dataloader.batchsize", "batch_size"),
        ("param_scheduler.1.Tmax", "T_max"),
    ],
)
def test_a_misspelt_key_is_refused(key, near):
    with refused(ValueError, "config-part-unknown", key, key.split(".")[-1], near):
        train_tool.load_config(DETECTOR, options={key: 3})


def test_a_key_with_a_default_may_be_set():
    options = {"model.backbone.with_cp": True, "val_evaluator.classwise": True, "model.new.part": 1}
    cfg = train_tool.load_config(DETECTOR, options=options)
    assert (cfg.model.backbone.with_cp, cfg.val_evaluator.classwise, cfg.model.new.part) == (True, True, 1)
