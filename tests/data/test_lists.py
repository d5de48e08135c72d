"""Lists of images: what is no image is told with its line and cause, before a run."""

import codecs
import logging
import os

import pytest
from PIL import Image
from refusals import refused

from hgkd.data import LabelledImages, UnlabelledImages
from hgkd.errors import DataError


@pytest.fixture
def root(tmp_path):
    for name in ("a", "b", "c d"):
        (tmp_path / "data/sub").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / f"data/sub/{name}.png")
    return tmp_path / "data"


def read(root, content, name="list.txt"):
    (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return UnlabelledImages(root, root / name, image_size=8)


@pytest.mark.parametrize(
    "content",
    [
        codecs.BOM_UTF8 + b"sub/a.png\r\nsub/b.png  \r\n",
        codecs.BOM_UTF16_LE + "sub/a.png\r\nsub/b.png\r\n".encode("utf-16-le"),
        codecs.BOM_UTF16_BE + "sub/a.png\nsub/b.png".encode("utf-16-be"),
        b"  sub/a.png\t\n\n\nsub/b.png\r",
    ],
)
def test_marks_blanks_and_line_ends(root, content):
    """PowerShell's `>` writes UTF-16."""
    dataset = read(root, content)
    assert [os.path.relpath(dataset.path(i), root) for i in range(len(dataset))] == ["sub/a.png", "sub/b.png"]
    assert len(list(dataset)) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path\nsub/a.png\n", r"line 1: 'path' is no image \(a heading: remove this line\)"),
        ("filename,label\nsub/a.png,cat", r"line 1: 'filename,label' is no image \(a heading"),
        (
            "sub/a.png,cat\nsub/b.png,dog",
            r"line 1: 'sub/a\.png,cat' is no image \(the path 'sub/a\.png' is followed by something",
        ),
        ("sub/a.png 0\n", r"line 1: .*followed by something else"),
        ("sub/a.png\tcat\n", r"line 1: .*followed by something else"),
        ('["sub/a.png",\n"sub/b.png"]', r"line 1: .*\(the file seems to be JSON\)"),
        ('"sub/a.png"\n', r"line 1: .*\(remove the quotes\)"),
        ("sub/a.png\nnotes.txt", r"line 2: 'notes\.txt' is no image"),
        ("sub/a.png\nsub", r"line 2: 'sub' is no image"),
        ("shards/a.tar", r"line 1: .*\(a list names images, or shards, and not both"),
        (
            "https://host/a.png",
            r"1 of 1 images .* do not exist, e\.g\. line 1: .*\(an address: set data_root to",
        ),
        ("sub\\a.png\nsub\\b.png", r"2 of 2 images .*\(write / instead of \\\)"),
        ("data/sub/a.png", r"1 of 1 images .*\(it lies one folder higher: set data_root=.*\)"),
        (
            "none/a.png\nnone/b.png",
            r"2 of 2 images .*e\.g\. line 1: .*none/a\.png; write paths relative to data_root",
        ),
        (b"caf\xe9.png", r"1 of 1 images .*caf\\xe9\.png \(the list is not UTF-8"),
    ],
)
def test_what_is_no_list_of_images_is_told_with_its_line_and_cause(root, content, message):
    with pytest.raises(DataError, match=message):
        read(root, content)


def test_the_remedies_work(root, tmp_path):
    (root / "sub/list.txt").write_text("a.png\nb.png\n")
    with refused(DataError, "listed-images-missing", "data_root"):
        UnlabelledImages(root, root / "sub/list.txt", image_size=8)
    assert len(list(UnlabelledImages(root / "sub", root / "sub/list.txt", image_size=8))) == 2


def test_an_image_may_be_called_anything_in_a_list(root):
    (root / "sub/a.png").rename(root / "0f3c")
    assert len(list(read(root, "0f3c\nsub/b.png\nsub/c d.png"))) == 3


def test_some_absent_files_are_a_warning(root, log):
    dataset = read(root, "sub/a.png\nsub/none.png\nsub/b.png\n")
    (line,) = log.told("were looked for do not exist")
    assert "1 of 3 images" in line.getMessage()
    assert "line 2" in line.getMessage()
    assert line.levelno == logging.WARNING
    assert len(dataset) == 3


@pytest.mark.parametrize(
    ("name", "content", "refusal"),
    [
        ("a.csv", "image,class\nsub/a.png,cat", ("listed-path-no-image", "1", "image")),
        ("a.txt", "cat sub/a.png\n", ("label-list-columns-swapped", "1", "cat sub/a.png", "txt", "a/1.jpg cat")),
        (
            "a.csv",
            "sub/a.png,cat\nsub/b.png,dog\nsub/a.png,dog",
            ("label-list-two-classes", "3", "sub/a.png", "dog", "1", "cat"),
        ),
        ("a.csv", "sub/a.png;cat\n", ("label-list-line", "1", "sub/a.png;cat")),
        ("a.csv", "x/a.png,cat\nx/b.png,dog", ("listed-images-missing", "2", "a.csv")),
    ],
)
def test_lists_with_labels(root, name, content, refusal):
    (root / name).write_text(content)
    with refused(DataError, *refusal):
        LabelledImages(root, 8, list_file=root / name)


def test_lists_with_labels_of_excel(root):
    (root / "a.csv").write_bytes(codecs.BOM_UTF8 + b"path,label\r\nsub/a.png,cat \r\n sub/c d.png , dog\r\n")
    dataset = LabelledImages(root, 8, list_file=root / "a.csv")
    assert dataset.classes == ["cat", "dog"]
    assert len(list(dataset)) == 2
