"""Annotation files that mmdet would misread, pass over or trip on are refused; what it copes with passes, with a remark."""

import json

import pytest
from downstream_runs import DETECTOR, FASTER_HEAD, need, shapes_coco, tiny_detector, train_tool

from hgkd.data.shapes import CLASSES
from hgkd.errors import DataError
from hgkd.openmmlab.checks import check_data

need("mmdet")
BOTH = ("train_dataloader", "val_dataloader")
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
    with pytest.raises(
        DataError, match=r"lists the classes in the order \(.*'disc'.*\), the config in the order .*file's order"
    ):
        check_data(changed(lambda content: content["categories"].reverse(), ("val",)), BOTH)


def test_a_subset_of_the_classes_keeps_the_files_order(changed):
    def more(content):
        content["categories"].insert(0, {"id": 99, "name": "unused"})

    assert all("unused" in remark for remark in check_data(changed(more), BOTH))


def test_a_category_of_a_repeated_name(changed):
    def repeat(content):
        content["categories"].insert(0, {"id": 0, "name": CLASSES[1]})

    with pytest.raises(DataError, match=rf"has 2 categories called '{CLASSES[1]}' \(ids 0, 2\).*shifted. Take out or rename"):
        check_data(changed(repeat), BOTH)


def test_a_repeated_category_id(changed):
    def repeat(content):
        content["categories"].append({"id": 1, "name": "other"})

    with pytest.raises(DataError, match="lists category 1 more than once; give every category an id"):
        check_data(changed(repeat), BOTH)


def test_data_sets_of_another_order(changed):
    cfg = changed(lambda content: content["categories"].reverse(), ("val",))
    cfg.val_dataloader.dataset.metainfo.classes = CLASSES[::-1]
    with pytest.raises(DataError, match=r"val_dataloader has the classes .*another data set the same in the order"):
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
        (each("image_id", lambda a: str(a["image_id"])), r"[1-9]\d* belong to no listed image"),
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
    with pytest.raises(DataError, match=r"val.json: annotation 1 has no 'iscrowd', .*add iscrowd=0"):
        check_data(cfg, BOTH)
    cfg.val_evaluator.ann_file = None  # then it measures by what the data set hands on
    assert check_data(cfg, BOTH) == []


def test_annotation_ids_of_an_evaluation_are_numbers(changed):
    change = each("id", lambda a: f"a{a['id']}")
    assert check_data(changed(change, ("train",)), BOTH) == []
    with pytest.raises(DataError, match=r"annotation 'a1' has no whole number as its id"):
        check_data(changed(change), BOTH)


def test_masks_where_they_are_read(changed):
    for change in (first("annotations", segmentation=None), first("annotations", segmentation=[])):
        assert check_data(changed(change), BOTH) == []
        with pytest.raises(DataError, match="annotation 1 has no 'segmentation', but the config reads masks"):
            check_data(changed(change, **MASKS), BOTH)
    with pytest.raises(DataError, match=r"val_dataloader: .*annotation 1 has no 'segmentation'"):
        check_data(changed(change, **{"val_evaluator.metric": ["bbox", "segm"]}), BOTH)
    assert check_data(changed(lambda content: None, **MASKS), BOTH) == []
    other_size = first("annotations", segmentation={"size": [32, 64], "counts": [2048]})
    with pytest.raises(
        DataError, match=r"annotation 1 has a mask \(RLE\) of size \[32, 64\], but .* height and width \[64, 64\]"
    ):
        check_data(changed(other_size, **MASKS), BOTH)


# evaluators


def test_an_evaluator_of_another_file(changed, coco):
    cfg = changed(lambda content: None)
    assert check_data(cfg, BOTH) == []
    cfg.val_evaluator.ann_file = str(coco / "annotations/val.json")  # a copy
    assert check_data(cfg, BOTH) == []
    cfg.val_evaluator = [cfg.val_evaluator, {"type": "CocoMetric", "ann_file": str(coco / "annotations/train.json")}]
    with pytest.raises(DataError, match=r"val_evaluator.ann_file='.*train.json' lists other images .* set both to the same"):
        check_data(cfg, BOTH)
    cfg.val_evaluator[1].ann_file = "nowhere.json"
    with pytest.raises(FileNotFoundError, match=r"val_evaluator.ann_file: nowhere.json does not exist; set it to .*val.json"):
        check_data(cfg, BOTH)


def test_other_data_sets_are_let_through(changed, tmp_path):
    (tmp_path / "list.json").write_text('[{"any": "content"}]')
    cfg = changed(lambda content: None)
    cfg.train_dataloader.dataset.update(type="BaseDetDataset", ann_file=str(tmp_path / "list.json"))
    assert check_data(cfg, BOTH) == []
