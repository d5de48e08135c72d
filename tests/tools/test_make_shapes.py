"""The writer of generated data sets: every layout reads back."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from refusals import refused

from hgkd.cli import make_shapes as tool
from hgkd.data import CLASSES, LabelledImages, UnlabelledImages, render_scene

SIZE = 32


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_imagefolder(tmp_path):
    assert tool.make_shapes(tmp_path / "out", "imagefolder", train=17, test=8, image_size=SIZE) == 25
    train, test = (LabelledImages(tmp_path / "out" / split, SIZE) for split in ("train", "test"))
    assert tuple(train.classes) == tuple(test.classes) == CLASSES
    assert sorted(np.bincount(train.labels).tolist()) == [2] * 7 + [3]
    assert np.bincount(test.labels).tolist() == [1] * 8
    for item in train:
        number = int(Path(train.path(item["index"])).stem)
        scene = render_scene((0, 0, number), SIZE, label=number % 8)
        assert item["label"] == scene.label
        assert np.abs(item["inputs"].permute(1, 2, 0).numpy().astype(int) - scene.image).mean() < 12  # JPEG
    assert len(UnlabelledImages(tmp_path / "out" / "train", image_size=SIZE)) == 17


@pytest.mark.parametrize("layout", ["imagefolder", "coco", "ade20k"])
def test_same_seed_same_bytes(layout, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tool.make_shapes(tmp_path / name, layout, train=3, test=2, image_size=SIZE, seed=seed)
    first, again, other = (files(tmp_path / name) for name in "abc")
    assert first == again
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)
    pictures = [content for name, content in first.items() if name.endswith(".jpg")]
    assert len(set(pictures)) == 5  # train and test share none


def decode(counts: list[int], size: list[int]) -> np.ndarray:
    """COCO's uncompressed run lengths, written out value by value."""
    values: list[int] = []
    for n, count in enumerate(counts):
        values += [n % 2] * count
    return np.array(values).reshape(size[1], size[0]).T == 1


def test_coco(tmp_path):
    tool.make_shapes(tmp_path, "coco", train=4, test=2, image_size=SIZE)
    for place, (split, count) in enumerate((("train", 4), ("val", 2))):
        content = json.loads((tmp_path / "annotations" / f"{split}.json").read_text())
        assert [(c["id"], c["name"]) for c in content["categories"]] == list(enumerate(CLASSES, start=1))
        assert len(content["images"]) == count
        ids = [a["id"] for a in content["annotations"]]
        assert len(set(ids)) == len(ids)
        for image in content["images"]:
            with Image.open(tmp_path / "images" / split / image["file_name"]) as picture:
                assert picture.size == (image["width"], image["height"]) == (SIZE, SIZE)
            number = image["id"] - 1
            scene = render_scene((0, place, number), SIZE, label=number % 8)
            own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
            assert [a["category_id"] - 1 for a in own] == scene.labels.tolist()
            for n, annotation in enumerate(own):
                mask = decode(annotation["segmentation"]["counts"], annotation["segmentation"]["size"])
                assert np.array_equal(mask, scene.instances == n + 1)
                x, y, w, h = annotation["bbox"]
                assert mask[y : y + h, x : x + w].sum() == mask.sum() == annotation["area"]
                assert mask[y].any()
                assert mask[y + h - 1].any()
                assert mask[:, x].any()
                assert mask[:, x + w - 1].any()
                assert annotation["iscrowd"] == 0


def test_pycocotools_reads_it(tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    tool.make_shapes(tmp_path, "coco", train=3, test=0, image_size=SIZE)
    reader = coco.COCO(str(tmp_path / "annotations" / "train.json"))
    annotations = reader.loadAnns(reader.getAnnIds())
    assert annotations
    for annotation in annotations:
        assert reader.annToMask(annotation).sum() == annotation["area"]
    assert coco.COCO(str(tmp_path / "annotations" / "val.json")).getImgIds() == []


def test_ade20k(tmp_path):
    tool.make_shapes(tmp_path, "ade20k", train=9, test=1, image_size=SIZE)
    for place, (split, count) in enumerate((("training", 9), ("validation", 1))):
        pictures = sorted((tmp_path / "images" / split).glob("*.jpg"))
        labels = sorted((tmp_path / "annotations" / split).glob("*.png"))
        assert [p.stem for p in pictures] == [p.stem for p in labels]
        assert len(pictures) == count
        for path in labels:
            with Image.open(path) as image:
                assert image.mode == "L"
                values = np.asarray(image)
            number = int(path.stem)
            assert np.array_equal(values, render_scene((0, place, number), SIZE, label=number % 8).label_map)
            assert values.min() == 0
            assert values.max() <= len(CLASSES)


def test_a_full_folder_is_refused_unless_forced(tmp_path, capsys):
    keep = tmp_path / "keep.txt"
    keep.write_text("mine")
    arguments = [str(tmp_path), "--train", "2", "--test", "1", "--image-size", str(SIZE)]
    assert tool.main(arguments) == 2
    assert "is not empty; give a new folder, or --force" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [keep]
    assert tool.main([*arguments, "--force"]) == 0
    assert "3 images" in capsys.readouterr().out
    assert keep.read_text() == "mine"
    assert len(list(tmp_path.rglob("*.jpg"))) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "cocoo"}, "unknown layout 'cocoo'; did you mean 'coco'"),
        ({"train": -1}, "must be 0 or more"),
        ({"train": 0, "test": 0}, "not all 0"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
        ({"image_size": 8}, "16 x 16 pixels or more"),
    ],
)
def test_refusals(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        tool.make_shapes(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with refused(FileExistsError, "output-is-a-file"):
        tool.make_shapes(tmp_path / "out")


def test_command_line_and_function_share_their_defaults(tmp_path):
    args = vars(tool.parse_args([str(tmp_path)]))
    args.pop("out")
    defaults = dict(
        zip(list(tool.make_shapes.__annotations__)[1:-1], tool.make_shapes.__defaults__, strict=True),
    )
    assert args == defaults


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to write more into a file, as on a full disk."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("layout", ["imagefolder", "coco", "ade20k"])
@pytest.mark.parametrize("share", [0.5, 1])
def test_a_full_disk_leaves_no_half_written_file(share, layout, tmp_path, capsys):
    whole = files_of(tmp_path / "whole", layout)
    with largest_file(int(share * max(map(len, whole.values()))) - 1):
        assert tool.main([str(tmp_path / "out"), "--layout", layout, "--train", "2", "--test", "2", "--image-size", "32"]) == 2
    assert "is not complete: make room, remove it" in capsys.readouterr().err
    written = files(tmp_path / "out")
    assert len(written) < len(whole)
    assert all(content == whole[name] for name, content in written.items())


def files_of(out: Path, layout: str) -> dict[str, bytes]:
    assert tool.main([str(out), "--layout", layout, "--train", "2", "--test", "2", "--image-size", "32"]) == 0
    return files(out)
