"""Annotation files that mmdet would misread, pass over or trip on are refused; what it copes with passes, with a remark."""

import json
import re
import shutil

import pytest
from downstream_runs import DETECTOR, FASTER_HEAD, need, shapes_coco, tiny_detector, train_tool
from PIL import Image
from refusals import refused

from hgkd.data.shapes import CLASSES
from hgkd.errors import DataError
from hgkd.openmmlab.config import skip_unreadable_images
from hgkd.openmmlab.data_checks import annotation_files
from hgkd.openmmlab.data_checks.checks import check_data
from hgkd.openmmlab.images import LoadReadableImage

need("mmdet")
BOTH = ("train_dataloader", "val_dataloader")
MASK_HEAD = {"model.roi_head.mask_head.type": "FCNMaskHead"}
MASKS = {f"{name}.dataset.pipeline.{step}.with_mask": True for name, step in (("train_dataloader", 1), ("val_dataloader", 2))}


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return shapes_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture
def changed(coco, tmp_path):
    """The tiny detector's config on a copy of the shapes' annotations that a function has changed in place."""

    def make(change, splits=("train", "val"), **options):
        cfg = train_tool.load_config(DETECTOR, options={**tiny_detector(coco), **FASTER_HEAD, **options})
        for split in splits:
            content = json.loads((coco / f"annotations/{split}.json").read_text())
            change(content)
            file = tmp_path / f"{split}.json"
            file.write_text(json.dumps(content))
            cfg[f"{split}_dataloader"].dataset.ann_file = str(file)
            if split == "val":
                cfg.val_evaluator.ann_file = str(file)
        return cfg

    return make


def each(key, value):
    """A change of every annotation; a value that can be called gets the old annotation, None takes the key out."""

    def change(content):
        for annotation in content["annotations"]:
            if value is None:
                annotation.pop(key)
            else:
                annotation[key] = value(annotation) if callable(value) else value

    return change


def first(kind, **values):
    """A change of the first image, annotation or category; None takes the key out."""

    def change(content):
        for key, value in values.items():
            if value is None:
                content[kind][0].pop(key)
            else:
                content[kind][0][key] = value

    return change


# classes


def test_the_order_of_the_categories(changed):
    with refused(DataError, "coco-categories-in-other-order", "disc"):
        check_data(changed(lambda content: content["categories"].reverse(), ("val",)), BOTH)


def test_a_subset_of_the_classes_keeps_the_files_order(changed):
    def more(content):
        content["categories"].insert(0, {"id": 99, "name": "unused"})

    assert all("unused" in remark for remark in check_data(changed(more), BOTH))


def test_a_category_of_a_repeated_name(changed):
    def repeat(content):
        content["categories"].insert(0, {"id": 0, "name": CLASSES[1]})

    with refused(DataError, "coco-category-name-twice", "2", CLASSES[1], "0"):
        check_data(changed(repeat), BOTH)


def test_a_repeated_category_id(changed):
    def repeat(content):
        content["categories"].append({"id": 1, "name": "other"})

    with refused(DataError, "coco-category-id-twice", "1"):
        check_data(changed(repeat), BOTH)


def test_data_sets_of_another_order(changed):
    cfg = changed(lambda content: content["categories"].reverse(), ("val",))
    cfg.val_dataloader.dataset.metainfo.classes = CLASSES[::-1]
    with refused(DataError, "classes-in-other-order", "val_dataloader"):
        check_data(cfg, BOTH)


# boxes


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        (each("bbox", lambda a: [value / 64 for value in a["bbox"]]), r"of (\d+) boxes \1 are smaller than a pixel"),
        (each("bbox", lambda a: [*a["bbox"][:2], 0, 5]), r"of (\d+) boxes \1 are smaller than a pixel"),
        (each("bbox", [100, 100, 20, 20]), r"of (\d+) boxes \1 are smaller than a pixel, without area or outside"),
        (each("area", 0), r"of (\d+) boxes \1 are smaller than a pixel"),
        (each("iscrowd", 1), r"of (\d+) boxes 0 are smaller .* and \1 are crowds"),
        (each("image_id", lambda a: a["image_id"] + 1000), r"[1-9]\d* belong to no listed image"),
        (lambda content: content.pop("annotations"), "of 0 boxes"),
    ],
)
@pytest.mark.parametrize("split", ["train", "val"])
def test_no_object_that_can_be_used(changed, change, counts, split):
    with pytest.raises(
        DataError, match=rf"{split}_dataloader: no object that mmdet can use: .*{counts}.*Boxes are x, y, width"
    ):
        check_data(changed(change, (split,)), BOTH)


def test_some_boxes_that_are_left_out(changed):
    def some(content):
        content["annotations"][0]["bbox"][2] = 0.5
        content["annotations"][1]["image_id"] = 999
        content["annotations"][2]["iscrowd"] = 1

    remarks = check_data(changed(some, ("train",)), BOTH)
    assert len(remarks) == 2
    assert "leaves out 1 of the" in remarks[0]
    assert "1 annotations belong to no listed image" in remarks[1]


def test_one_of_several_data_sets_may_be_without_objects(changed):
    cfg = changed(lambda content: content.pop("annotations"), ("train",))
    full = train_tool.load_config(DETECTOR, options={**tiny_detector(cfg.data_root), **FASTER_HEAD})
    both = [cfg.train_dataloader.dataset, full.train_dataloader.dataset]
    cfg.train_dataloader.dataset = {"type": "RepeatDataset", "times": 2, "dataset": {"type": "ConcatDataset", "datasets": both}}
    assert check_data(cfg, BOTH) == []


def test_a_test_set_without_labels(changed):
    cfg = changed(lambda content: content.pop("annotations"), ("val",))
    cfg.val_evaluator.format_only = True
    assert check_data(cfg, BOTH) == []
    cfg.val_evaluator = None
    assert check_data(cfg, BOTH) == []


def test_an_object_that_the_evaluation_would_count_as_missed(changed):
    remarks = check_data(changed(first("annotations", id=0)), BOTH)
    assert len(remarks) == 1  # of the validation alone
    assert "counts the object of annotation 0 as missed; number annotations from 1" in remarks[0]


# entries


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (first("annotations", bbox=None), r"annotation 1 has bbox=None, needed are four numbers"),
        (first("annotations", bbox=[1, 2, 3]), r"annotation 1 has bbox=\[1, 2, 3\], needed are four numbers"),
        (first("annotations", bbox=[1, 2, 3, float("nan")]), r"annotation 1 has bbox=\[1, 2, 3, nan\]"),
        (first("annotations", area=None), r"annotation 1 has area=None, needed is a number"),
        (first("annotations", id=None), r"annotation number 0 has no 'id'"),
        (first("annotations", image_id=None), r"annotation number 0 has no 'image_id'"),
        (first("annotations", id=2), r"several annotations with the id 2; give each"),
        (first("images", id=None), r"image number 0 has no 'id'"),
        (first("images", id=2), r"several images with the id 2; give every image"),
        (first("images", width=None), r"image 1 has width=None, needed is a number of pixels"),
        (first("images", height="64"), r"image 1 has height='64', needed is a number of pixels"),
        (first("images", file_name=None), r"image 1 has file_name=None, needed is a name"),
        (first("annotations", category_id=None), r"is no COCO annotation file \(KeyError: 'category_id'\)"),
    ],
)
def test_entries_that_mmdet_trips_on(changed, change, message):
    with pytest.raises(DataError, match=rf"train_dataloader: .*train.json.*{message}"):
        check_data(changed(change), BOTH)


def test_crowds_must_be_told_for_the_evaluation_alone(changed):
    change = each("iscrowd", None)
    assert check_data(changed(change, ("train",)), BOTH) == []
    cfg = changed(change)
    with refused(DataError, "coco-annotation-wrong", "val.json", "1", "iscrowd", "iscrowd=0"):
        check_data(cfg, BOTH)
    cfg.val_evaluator.ann_file = None  # then it measures by what the data set hands on
    assert check_data(cfg, BOTH) == []


def test_annotation_ids_of_an_evaluation_are_numbers(changed):
    change = each("id", lambda a: f"a{a['id']}")
    assert check_data(changed(change, ("train",)), BOTH) == []
    with refused(DataError, "coco-annotation-wrong", "a1"):
        check_data(changed(change), BOTH)


def test_masks_where_they_are_read(changed):
    for change in (first("annotations", segmentation=None), first("annotations", segmentation=[])):
        assert check_data(changed(change), BOTH) == []
        with refused(DataError, "coco-annotation-wrong", "1", "segmentation"):
            check_data(changed(change, **MASKS), BOTH)
    with refused(DataError, "coco-annotation-wrong", "val_dataloader", "1", "segmentation"):
        check_data(changed(change, **{"val_evaluator.metric": ["bbox", "segm"]}), BOTH)
    assert check_data(changed(lambda content: None, **MASKS), BOTH) == []
    other_size = first("annotations", segmentation={"size": [32, 64], "counts": [2048]})
    with refused(DataError, "coco-annotation-wrong", "1", "RLE", "[32, 64]", "[64, 64]"):
        check_data(changed(other_size, **MASKS), BOTH)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, float("nan"), 1, 4, 4]], "has nan in a polygon"),
        ([[1, 1, 9, 9]], "has a polygon of 4 numbers"),
        ({"size": [64, 64], "counts": "nonsense"}, r"has a mask \(RLE\) "),
    ],
)
def test_masks_that_cannot_be_drawn(changed, mask, message):
    """Refused before training where masks are used; https://github.com/facebookresearch/detectron2/issues/5027 is one such."""
    change = first("annotations", segmentation=mask)
    assert check_data(changed(change), BOTH) == []
    with pytest.raises(DataError, match=rf"train_dataloader: .*train.json: annotation 1 {message}"):
        check_data(changed(change, **MASKS), BOTH)
    cfg = changed(change, ("val",), **MASK_HEAD, **{"val_evaluator.metric": "segm"})
    cfg.val_evaluator.ann_file = None  # the masks of the data set's own instances are measured
    with pytest.raises(DataError, match=rf"val_dataloader: .*val.json: annotation 1 {message}"):
        check_data(cfg, BOTH)


def test_the_number_of_faulty_annotations(changed):
    with refused(DataError, "coco-annotation-wrong", "1", "bbox=[]", "annotation"):
        check_data(changed(each("bbox", [])), BOTH)


def test_rle_where_the_pipeline_takes_polygons_alone(changed):
    """mmdet ignores such objects: a training on nothing."""
    runs = each("segmentation", {"size": [64, 64], "counts": [4096]})
    options = {**MASKS, "train_dataloader.dataset.pipeline.1.poly2mask": False}
    with refused(DataError, "no-usable-boxes", "RLE", "poly2mask=False"):
        check_data(changed(runs, ("train",), **options), BOTH)

    def some(content):
        each("segmentation", [[1, 1, 9, 1, 9, 9]])(content)
        content["annotations"][0]["segmentation"] = {"size": [64, 64], "counts": [4096]}

    (remark,) = check_data(changed(some, ("train",), **options), BOTH)
    assert "1 objects have RLE masks, which poly2mask=False leaves out; set poly2mask=True" in remark
    assert check_data(changed(some, ("train",), **MASKS), BOTH) == []


@pytest.mark.parametrize("key", ["iscrowd", "ignore"])
def test_flags_that_are_texts(changed, key):
    """``"0"`` would be a crowd, and every object left out."""
    with refused(DataError, "coco-annotation-wrong", "1", key, "0"):
        check_data(changed(each(key, "0")), BOTH)


# images


def resized(content):
    content["images"][0].update(width=32, height=48)


def test_sizes_that_are_not_the_images(changed):
    with refused(DataError, "coco-image-sizes-differ", "1", "4", "train.json", "64 x 64", "32 x 48"):
        check_data(changed(resized, ("train",)), BOTH)


def test_sizes_before_the_turn_of_exif(changed, coco, tmp_path):
    folder = tmp_path / "turned"
    shutil.copytree(coco / "images/train", folder)
    content = json.loads((coco / "annotations/train.json").read_text())
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (64, 48)).save(folder / content["images"][0]["file_name"], exif=exif)
    change = first("images", width=64, height=48)
    place = "train_dataloader.dataset"
    options = {f"{place}.data_root": "", f"{place}.data_prefix.img": str(folder)}
    with refused(DataError, "coco-image-sizes-differ", "48 x 64", "64 x 48", "EXIF", "color_type='color_ignore_orientation'"):
        check_data(changed(change, ("train",), **options), BOTH)
    options[f"{place}.pipeline.0.color_type"] = "color_ignore_orientation"
    cfg = changed(change, ("train",), **options)
    check_data(cfg, BOTH)
    # the advice works: the image is read as it lies
    skip_unreadable_images(cfg, str(tmp_path))
    load = {key: value for key, value in cfg.train_dataloader.dataset.pipeline[0].items() if key != "type"}
    image = LoadReadableImage(**load)({"img_path": str(folder / content["images"][0]["file_name"])})["img"]
    assert image.shape == (48, 64, 3)


def test_an_image_that_is_listed_twice(changed):
    """As merged files have it: each entry has its own objects alone, and what it lacks is background to it."""

    def twice(content):
        content["images"].append({**content["images"][0], "id": 999})
        content["annotations"][0]["image_id"] = 999

    (remark,) = check_data(changed(twice, ("train",)), BOTH)
    assert "train.json lists 1 images under several ids, each with a part of their objects (" in remark


def test_what_is_no_image(changed, tmp_path):
    (tmp_path / "a.txt").write_text("no image")
    change = first("images", file_name=str(tmp_path / "a.txt"))
    told = r"_dataloader: 1 of \d images cannot be opened: cut off, or no images \(.*a.txt"
    with pytest.raises(DataError, match=f"val{told}.*replace them, or take them out"):
        check_data(changed(change, ("val",)), BOTH)
    (remark,) = check_data(changed(change, ("train",)), BOTH)
    assert re.search(f"train{told}.*training goes on without them", remark)


def test_boxes_of_another_order(changed):
    def order(annotation):
        x, y, width, height = annotation["bbox"]
        return [x, y, x + width, y + height]

    with refused(DataError, "coco-boxes-misplaced", "train.json", "x1", "y1", "x2", "y2"):
        check_data(changed(each("bbox", order), ("train",)), BOTH)


# the file


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xef\xbb\xbf{}", r"it begins with a byte order mark \(BOM\); save it as UTF-8 without one"),
        ('{"a": 1}'.encode("utf-16"), "it begins with a byte order mark"),
        (b'{"a": "\xe4"}', "it is not UTF-8"),
        (b"image,x,y\n", r"which is JSON: .*; it begins with b'image,x,y"),
        (b"", "which is JSON: "),
        (
            b'[{"image_id": 1, "bbox": [1, 2, 3, 4], "score": 1}]',
            "it holds a list, needed is an object with images, annotations",
        ),
        (b'{"images": [], "annotations": []}', "it has no 'categories'; its keys are annotations, images"),
        (b'{"images": {"1": {}}, "categories": []}', "'images' is a dict, needed is a list of objects"),
        (b'{"images": ["a.jpg"], "categories": []}', "number 0 of 'images' is 'a.jpg', needed is an object"),
        (b'{"images": [], "categories": ["disc"]}', "number 0 of 'categories' is 'disc', needed is an object"),
        (b'{"images": [], "categories": [{"id": 1, "name": 2}]}', "has no 'id', or no text as its 'name'"),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "csv"])
def test_what_is_no_coco_file(changed, tmp_path, content, message, suffix):
    cfg = changed(lambda content: None, ("val",))
    file = tmp_path / f"other.{suffix}"
    file.write_bytes(content)
    cfg.train_dataloader.dataset.ann_file = str(file)
    with pytest.raises(DataError, match=rf"train_dataloader: .*other.{suffix} is no COCO annotation file.*{message}"):
        check_data(cfg, BOTH)


@pytest.mark.parametrize("key", ["image_id", "category_id"])
def test_ids_that_are_texts(changed, key):
    with refused(DataError, "coco-id-text-and-number", key, key[:-3]):
        check_data(changed(each(key, lambda a: str(a[key]))), BOTH)


def test_a_category_that_differs_by_a_blank(changed):
    change = first("categories", name=f"{CLASSES[0].title()} ")
    with refused(DataError, "coco-categories-differ", CLASSES[0]):
        check_data(changed(change), BOTH)


def test_pycocotools_that_need_info(changed, monkeypatch):
    """https://github.com/pytorch/vision/issues/9092: 2.0.9 and 2.0.10 end an evaluation with ``KeyError: 'info'``."""
    monkeypatch.setattr(annotation_files, "_pycocotools", lambda: "2.0.10")
    with refused(DataError, "coco-info-missing", "val.json", "info", "2.0.10"):
        check_data(changed(lambda content: content.pop("info", None)), BOTH)
    assert check_data(changed(lambda content: content.update(info={})), BOTH) == []


# evaluators


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"val_evaluator.metric_items": "mAP"}, ("metric-items-unknown", "val_evaluator.metric_items='mAP'", "mAP_50")),
        ({"val_evaluator.metric_items": ["AP50"]}, ("metric-items-unknown", "metric_items=['AP50']")),
        (
            {"val_evaluator.metric": ["bbox", "segm"]},
            ("metric-needs-masks", "val_evaluator.metric='bbox'"),
        ),
    ],
)
def test_measures_that_end_a_run_after_its_first_epoch(changed, options, refusal):
    """https://github.com/open-mmlab/mmdetection/issues/5650: ``KeyError: 'segm is not in results'``."""
    with refused(DataError, *refusal):
        check_data(changed(lambda content: None, **options), BOTH)
    assert check_data(changed(lambda content: None, **{"val_evaluator.metric_items": ["mAP", "mAP_50", "AR@100"]}), BOTH) == []


def test_an_evaluator_of_another_file(changed, coco):
    cfg = changed(lambda content: None)
    assert check_data(cfg, BOTH) == []
    cfg.val_evaluator.ann_file = str(coco / "annotations/val.json")  # a copy
    assert check_data(cfg, BOTH) == []
    cfg.val_evaluator = [cfg.val_evaluator, {"type": "CocoMetric", "ann_file": str(coco / "annotations/train.json")}]
    with refused(DataError, "evaluated-file-differs", "val_evaluator.ann_file=", "train.json"):
        check_data(cfg, BOTH)
    cfg.val_evaluator[1].ann_file = "nowhere.json"
    with refused(FileNotFoundError, "evaluated-file-missing", "val_evaluator.ann_file", "nowhere.json", "val.json"):
        check_data(cfg, BOTH)


def test_other_data_sets_are_let_through(changed, tmp_path):
    (tmp_path / "list.json").write_text('[{"any": "content"}]')
    cfg = changed(lambda content: None)
    cfg.train_dataloader.dataset.update(type="BaseDetDataset", ann_file=str(tmp_path / "list.json"))
    assert check_data(cfg, BOTH) == []
