"""Data sets in PASCAL VOC's format whose objects mmdet would leave out, or whose files it lacks, are refused."""

import pytest
from downstream_runs import DETECTOR, FASTER_HEAD, need, shapes_coco, tiny_detector, train_tool
from PIL import Image
from refusals import refused

from hgkd.errors import DataError
from hgkd.openmmlab.data_checks.checks import check_data

need("mmdet")
BOX = "<bndbox><xmin>3</xmin><ymin>3</ymin><xmax>30</xmax><ymax>40</ymax></bndbox>"
FILE = "<a><size><width>64</width><height>48</height></size>{}</a>"


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return shapes_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture
def voc(coco, tmp_path):
    """A training set of two images whose objects have these names, with the tiny detector."""

    def make(*names, listed="a\nb\n"):
        root = tmp_path / "voc2007"
        for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (root / folder).mkdir(parents=True)
        for name in ("a", "b"):
            Image.new("RGB", (64, 48)).save(root / f"JPEGImages/{name}.jpg")
            objects = "".join(f"<object><name>{label}</name>{BOX}</object>" for label in names)
            (root / f"Annotations/{name}.xml").write_text(FILE.format(objects))
        (root / "ImageSets/Main/train.txt").write_text(listed)
        cfg = train_tool.load_config(DETECTOR, options={**tiny_detector(coco), **FASTER_HEAD})
        dataset = cfg.train_dataloader.dataset
        cfg.train_dataloader.dataset = {
            "type": "VOCDataset",
            "data_root": f"{root}/",
            "ann_file": "ImageSets/Main/train.txt",
            "data_prefix": {"sub_data_root": ""},
            "metainfo": dataset.metainfo,
            "pipeline": dataset.pipeline,
        }
        return cfg, root

    return make


def test_names_that_are_classes(voc):
    assert check_data(voc("disc")[0], ("train_dataloader",)) == []


def test_some_that_are_none(voc):
    (remark,) = check_data(voc("disc", "Ring")[0], ("train_dataloader",))
    assert "Ring of" in remark
    assert "are not among the config's classes and will be left out" in remark


def test_none_that_is_a_class(voc):
    """https://github.com/open-mmlab/mmdetection/issues/3202 and others: mmdet trained on nothing, with a loss of boxes of 0."""
    told = r"no object in the 2 files of .*train.txt is one of the classes .*; they are called Disc. Blanks, and upper"
    with pytest.raises(DataError, match=told):
        check_data(voc("Disc")[0], ("train_dataloader",))


def test_a_list_with_suffixes(voc):
    with refused(FileNotFoundError, "voc-file-missing", "a.jpg.xml", "train.txt"):
        check_data(voc("disc", listed="a.jpg\n")[0], ("train_dataloader",))


def test_damaged_files(voc):
    cfg, root = voc("disc")
    (root / "Annotations/b.xml").write_text("<a>")
    with refused(DataError, "voc-file-unreadable", "train.txt", "PASCAL", "VOC", "ParseError"):
        check_data(cfg, ("train_dataloader",))


def test_missing_images(voc):
    cfg, root = voc("disc")
    (root / "JPEGImages/b.jpg").unlink()
    with refused(FileNotFoundError, "annotated-images-missing", "1", "2", "train.txt", "b.jpg"):
        check_data(cfg, ("train_dataloader",))
