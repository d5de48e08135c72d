"""Folders, lists and damaged files."""

import copy
import logging
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.dataset import default_collate
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from PIL import Image
from refusals import refused
from torch.utils.data import DataLoader

from hgkd.data import LabelledImages, UnlabelledImages
from hgkd.data.images import read_rgb, shared_images
from hgkd.errors import DataError
from hgkd.registry import DATASETS

EVAL = {"kind": "eval"}


def save(path: Path, value: int = 0, size: tuple[int, int] = (20, 16)) -> Path:
    """A flat grey image whose value names it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


def truncate(path: Path) -> None:
    noise = np.random.Generator(np.random.PCG64(0)).integers(0, 256, size=(40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_bomb(path: Path) -> None:
    """A PNG that claims 30000 x 30000 pixels."""
    Image.new("1", (8, 8)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", 30000, 30000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)


BAD_KINDS = {
    "truncated jpg": ("x.jpg", truncate, "truncated"),
    "truncated png": ("x.png", truncate, "truncated"),
    "zero bytes": ("x.jpg", lambda path: path.write_bytes(b""), "cannot identify"),
    "text": ("x.jpg", lambda path: path.write_text("not an image"), "cannot identify"),
    "damaged png": ("x.png", lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40)), "cannot identify"),
    "postscript": (
        "x.jpg",
        lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        "cannot identify",
    ),
    "dangling link": ("x.jpg", lambda path: path.symlink_to("nowhere.jpg"), "FileNotFoundError"),
    "bomb": ("x.png", make_bomb, "DecompressionBombError"),
    "named pipe": ("x.jpg", os.mkfifo, "not a regular file"),
}


class Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def log():
    handler, logger = Log(), MMLogger.get_current_instance()
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def names(dataset) -> list[str]:
    return [os.path.relpath(dataset.path(i), dataset.data_root) for i in range(len(dataset))]


# Reading


MODES = {
    "1": (1, (255, 255, 255)),
    "L": (77, (77, 77, 77)),
    "LA": ((77, 255), (77, 77, 77)),
    "P": (0, (10, 20, 30)),
    "RGB": ((1, 2, 3), (1, 2, 3)),
    "RGBA": ((1, 2, 3, 255), (1, 2, 3)),
    "I;16": (257 * 200, (200, 200, 200)),
    "I": (65535, (255, 255, 255)),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_become_rgb(mode, tmp_path):
    value, expected = MODES[mode]
    image = Image.new(mode, (5, 4), value)
    if mode == "P":
        image.putpalette([10, 20, 30] * 256)
    path = tmp_path / ("x.tiff" if mode == "I" else "x.png")
    image.save(path)
    result = read_rgb(path)
    assert result.mode == "RGB"
    assert result.size == (5, 4)
    assert result.getpixel((2, 2)) == expected


@pytest.mark.parametrize(("value", "expected"), [(0.5, 128), (1.0, 255), (200.4, 200), (-3.0, 0), (float("nan"), 0)])
def test_float_grey(value, expected, tmp_path):
    Image.new("F", (3, 3), value).save(tmp_path / "x.tiff")
    assert read_rgb(tmp_path / "x.tiff").getpixel((1, 1)) == (expected,) * 3


def test_cmyk_jpeg(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "x.jpg")
    r, g, b = read_rgb(tmp_path / "x.jpg").getpixel((8, 8))
    assert r > 240
    assert max(g, b) < 15


def test_a_png_with_a_large_colour_profile(tmp_path):
    """Pillow refuses such files by default (https://github.com/python-pillow/Pillow/issues/2445)."""
    noise = np.random.default_rng(0).integers(0, 256, 3_000_000, dtype=np.uint8).tobytes()
    Image.new("RGB", (4, 4), (9, 8, 7)).save(tmp_path / "x.png", icc_profile=noise)
    assert read_rgb(tmp_path / "x.png").getpixel((0, 0)) == (9, 8, 7)


def test_transparent_places_become_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "a.png")
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.save(tmp_path / "b.png", transparency=1)
    for name in ("a.png", "b.png"):
        assert read_rgb(tmp_path / name).getpixel((1, 1)) == (255, 255, 255)


def test_content_counts_not_the_extension(tmp_path):
    Image.new("RGB", (4, 4), (9, 8, 7)).save(tmp_path / "x", format="PNG")
    (tmp_path / "x").rename(tmp_path / "x.jpg")
    assert read_rgb(tmp_path / "x.jpg").getpixel((0, 0)) == (9, 8, 7)


# Finding


def test_search_is_recursive_sorted_and_by_extension(tmp_path):
    wanted = ["a.JPG", "b/c/d.png", "b/e.Webp", "f.jpeg", "g.bmp", "h.TIF", "i i ü.tiff"]
    for name in wanted:
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "jpg").write_text("no image")
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    dataset = UnlabelledImages(tmp_path, image_size=8)
    assert names(dataset) == wanted


def test_linked_folders_are_followed(tmp_path):
    save(tmp_path / "elsewhere" / "x.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere")
    assert names(UnlabelledImages(tmp_path / "root", image_size=8)) == ["link/x.png"]


def test_items(tmp_path):
    save(tmp_path / "a.png", 10)
    save(tmp_path / "b.png", 20)
    dataset = UnlabelledImages(str(tmp_path), image_size=(8, 12))
    item = dataset[1]
    assert set(item) == {"inputs", "index"}
    assert item["index"] == 1
    assert item["inputs"].dtype == torch.uint8
    assert item["inputs"].shape == (3, 8, 12)
    assert item["inputs"].unique().tolist() == [20]
    assert dataset[torch.tensor(0)]["index"] == 0
    assert [i["index"] for i in dataset] == [0, 1]
    with pytest.raises(IndexError, match="index 2 of a data set of 2"):
        dataset[2]


def test_limit_is_a_prefix_of_one_shuffle(tmp_path):
    for n in range(12):
        save(tmp_path / f"{n:02d}.png")
    few = names(UnlabelledImages(tmp_path, image_size=8, limit=5))
    many = names(UnlabelledImages(tmp_path, image_size=8, limit=50))
    assert len(few) == 5
    assert few == many[:5]
    assert few != sorted(many)[:5]
    assert sorted(many) == names(UnlabelledImages(tmp_path, image_size=8))


def test_list_file(tmp_path):
    root = tmp_path / "root"
    save(root / "sub" / "a.jpg")
    save(root / "b.png")
    absolute = save(root / "other" / "c.png")
    listing = tmp_path / "list.txt"
    listing.write_bytes(f"\ufeffsub/a.jpg\r\n\r\n  ./sub/../b.png \r\n{absolute}".encode())
    dataset = UnlabelledImages(root, list_file=listing, image_size=8)
    assert [dataset.path(i) for i in range(3)] == [str(root / "sub" / "a.jpg"), str(root / "b.png"), str(absolute)]
    assert len(list(dataset)) == 3


@pytest.mark.parametrize(
    "entry", ["../x.jpg", "a/../../x.jpg", "ROOT/../x.jpg", "../root2/x.jpg", "/etc/passwd", "ROOT2/x.jpg"]
)
def test_list_file_must_not_leave_the_root(entry, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    save(tmp_path / "x.jpg")
    listing = tmp_path / "list.txt"
    listing.write_text("fine.jpg\n" + entry.replace("ROOT", str(root)))
    with refused(DataError, "listed-path-leaves-root", "2", "data_root", "root"):
        UnlabelledImages(root, list_file=listing)


def test_the_whole_machine_may_be_the_root(tmp_path):
    path = save(tmp_path / "x.png")
    (tmp_path / "list.txt").write_text(str(path))
    assert UnlabelledImages("/", list_file=tmp_path / "list.txt", image_size=8).path(0) == str(path)


@pytest.mark.parametrize(
    ("options", "error", "refusal"),
    [
        ({"data_root": "ROOT/none"}, FileNotFoundError, ("data-root-missing", "data_root", "none")),
        ({"data_root": "ROOT/list.txt"}, FileNotFoundError, ("data-root-missing",)),
        ({"data_root": ""}, ValueError, ("data-root-empty", "data_root", "''", "'.'")),
        ({"data_root": "file://"}, ValueError, ("data-root-empty",)),
        ({"data_root": "", "list_file": "ROOT/list.txt"}, ValueError, ("data-root-empty",)),
        ({"data_root": "ROOT/empty"}, DataError, ("no-images", "empty")),
        ({"list_file": "ROOT/none.txt"}, FileNotFoundError, ("list-file-missing", "list_file", "none.txt")),
        ({"list_file": "ROOT/list.txt"}, DataError, ("list-file-empty",)),
        ({"list_file": "ROOT/binary.txt"}, DataError, ("list-file-not-text", "1")),
        ({"limit": 0}, ValueError, ("limit-not-positive", "limit", "1", "0")),
        ({"limit": 2.5}, ValueError, ("limit-not-positive", "limit")),
        ({"max_bad_share": 5}, ValueError, ("bad-share-out-of-range", "max_bad_share", "[0, 1]", "5")),
        ({"image_size": "large"}, TypeError, ("image-size-not-a-size", "image_size")),
        ({"transform": {"hflop": 1}}, ValueError, ("transform-option-unknown", "hflip")),
    ],
)
def test_refusals(options, error, refusal, tmp_path):
    (tmp_path / "empty").mkdir()
    save(tmp_path / "full" / "x.png")
    (tmp_path / "list.txt").write_text("\n\n")
    (tmp_path / "binary.txt").write_bytes(b"\0\1\2")
    options = {k: v.replace("ROOT", str(tmp_path)) if isinstance(v, str) else v for k, v in options.items()}
    with refused(error, *refusal):
        UnlabelledImages(**{"data_root": tmp_path / "full", **options})


def test_an_empty_data_root_is_not_the_current_folder(tmp_path, monkeypatch):
    save(tmp_path / "ant" / "a.png")
    monkeypatch.chdir(tmp_path)
    with refused(ValueError, "data-root-empty"):
        LabelledImages("")
    assert len(LabelledImages(".")) == 1


# Damaged files


@pytest.mark.parametrize("kind", BAD_KINDS)
def test_bad_file_is_replaced_counted_and_logged_once(kind, tmp_path, log):
    name, make, reason = BAD_KINDS[kind]
    save(tmp_path / "a.png", 1)
    make(tmp_path / name)
    save(tmp_path / "y.png", 2)
    dataset = UnlabelledImages(tmp_path, image_size=8, max_bad_share=0.5)
    assert dataset.bad_files() == []
    asked = [dataset.path(i) for i in range(3)].index(str(tmp_path / name))
    for _ in range(2):
        item = dataset[asked]
        assert dataset.path(item["index"]) == str(tmp_path / "y.png")
        assert item["inputs"].unique().tolist() == [2]
    assert dataset.bad_files() == [str(tmp_path / name)]
    assert len(log.lines) == 1
    assert "skipping unreadable image" in log.lines[0]
    assert str(tmp_path / name) in log.lines[0]
    assert reason in log.lines[0]


def test_file_that_vanished(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    dataset = UnlabelledImages(tmp_path, image_size=8, max_bad_share=0.5)
    (tmp_path / "b.png").unlink()
    assert dataset[1]["index"] == 0  # counting goes round
    assert dataset.bad_files() == [str(tmp_path / "b.png")]


def test_an_image_that_changes_while_the_run_goes_on(tmp_path):
    save(tmp_path / "a.png", 1)
    dataset = UnlabelledImages(tmp_path, image_size=8, transform=EVAL)
    assert dataset[0]["inputs"].unique().tolist() == [1]
    save(tmp_path / "a.png", 7, size=(400, 30))
    assert dataset[0]["inputs"].unique().tolist() == [7]
    assert dataset.bad_files() == []


def test_a_data_folder_is_only_read(tmp_path):
    save(tmp_path / "ant/a.png")
    os.chmod(tmp_path / "ant", 0o555)
    before = sorted((path, path.stat().st_mtime_ns) for path in [tmp_path, *tmp_path.rglob("*")])
    list(UnlabelledImages(tmp_path, image_size=8))
    list(LabelledImages(tmp_path, 8))
    assert sorted((path, path.stat().st_mtime_ns) for path in [tmp_path, *tmp_path.rglob("*")]) == before


def test_a_path_of_the_longest_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["d" * 250] * ((4090 - len(str(tmp_path)) - 251) // 251)
    path = tmp_path.joinpath(*names, "e" * 246 + ".png")
    save(path, 3)
    assert UnlabelledImages(tmp_path, image_size=8, max_bad_share=0)[0]["inputs"].unique().tolist() == [3]


def test_failing_transform_is_not_taken_for_a_bad_file(tmp_path):
    save(tmp_path / "a.png")
    dataset = UnlabelledImages(tmp_path, image_size=8, max_bad_share=1.0)
    dataset.transform = lambda image: 1 / 0
    with pytest.raises(ZeroDivisionError):
        dataset[0]
    assert dataset.bad_files() == []


@pytest.mark.parametrize(
    ("total", "bad", "share", "stops"),
    [(10, 1, 0.1, False), (9, 1, 0.1, True), (10, 2, 0.1, True), (4, 1, 0.0, True), (4, 2, 0.5, False)],
)
def test_share_of_bad_files(total, bad, share, stops, tmp_path):
    for n in range(total):
        path = save(tmp_path / f"{n}.png")
        if n < bad:
            path.write_bytes(b"")
    dataset = UnlabelledImages(tmp_path, image_size=8, max_bad_share=share)
    if not stops:
        assert [item["index"] for item in dataset][:bad] == [bad] * bad
        return
    with refused(DataError, "too-many-bad-images", bad, total, "max_bad_share", share, "0.png"):
        list(dataset)


def test_message_names_share_and_the_first_files(tmp_path):
    for n in range(8):
        save(tmp_path / f"{n}.png").write_bytes(b"")
    dataset = UnlabelledImages(tmp_path, image_size=8, max_bad_share=0.5)
    with pytest.raises(DataError) as caught:
        dataset[2]
    message = str(caught.value)
    assert message.startswith(f"5 of 8 images (62.50%) in {tmp_path} cannot be read")
    assert all(str(tmp_path / f"{n}.png") in message for n in (2, 3, 4))
    assert "and 2 more" in message
    assert "5.png" not in message
    with refused(DataError, "too-many-bad-images", "5", "8"):
        dataset[2]


def test_nothing_readable_ends_even_when_all_may_be_bad(tmp_path):
    save(tmp_path / "a.png").write_bytes(b"")
    save(tmp_path / "b.png").write_bytes(b"")
    with refused(DataError, "no-readable-images", "2"):
        UnlabelledImages(tmp_path, image_size=8, max_bad_share=1.0)[0]


@pytest.fixture
def damaged_folder(tmp_path):
    for n in range(16):
        path = save(tmp_path / f"{n:02d}.png", n)
        if n in (1, 6, 7, 12):
            path.write_bytes(b"")
    return tmp_path


def expected_bad(folder: Path) -> list[str]:
    return [str(folder / f"{n:02d}.png") for n in (1, 6, 7, 12)]


@pytest.mark.parametrize(("context", "workers"), [("fork", 2), ("spawn", 1)])
def test_bad_files_are_counted_across_workers(context, workers, damaged_folder):
    dataset = UnlabelledImages(damaged_folder, image_size=8, transform=EVAL, max_bad_share=0.25)
    loader = DataLoader(dataset, batch_size=2, num_workers=workers, multiprocessing_context=context, collate_fn=default_collate)
    batches = list(loader)
    assert batches[0]["inputs"].shape == (2, 3, 8, 8)
    shown = torch.cat([batch["inputs"][:, 0, 0, 0] for batch in batches]).tolist()
    assert shown == [0, 2, 2, 3, 4, 5, 8, 8, 8, 9, 10, 11, 13, 13, 14, 15]
    assert torch.cat([batch["index"] for batch in batches]).tolist() == shown
    assert dataset.bad_files() == expected_bad(damaged_folder)


def test_share_is_summed_over_workers(damaged_folder):
    dataset = UnlabelledImages(damaged_folder, image_size=8, max_bad_share=0.25)
    list(DataLoader(dataset, batch_size=2, num_workers=2, multiprocessing_context="fork"))
    dataset.max_bad_share = 0.2  # an error inside a worker would do, but torch then takes 5 s a worker to shut down
    with refused(DataError, "too-many-bad-images", "4", "16", "25.00%"):
        dataset[1]


def test_copies_share_the_count_and_pickles_keep_it(damaged_folder):
    dataset = UnlabelledImages(damaged_folder, image_size=8, max_bad_share=0.25)
    twin = copy.deepcopy(dataset)
    list(twin)
    assert dataset.bad_files() == expected_bad(damaged_folder)
    again = pickle.loads(pickle.dumps(dataset))
    assert again.bad_files() == dataset.bad_files()
    list(DataLoader(again, num_workers=1))


def test_mmengine_loader(damaged_folder):
    loader = Runner.build_dataloader(
        {
            "dataset": {
                "type": "hgkd.UnlabelledImages",
                "data_root": str(damaged_folder),
                "image_size": 8,
                "max_bad_share": 0.25,
            },
            "batch_size": 4,
            "num_workers": 0,
            "sampler": {"type": "DefaultSampler", "shuffle": True},
            "collate_fn": {"type": "default_collate"},
        },
        seed=0,
    )
    assert isinstance(loader.dataset, UnlabelledImages)
    batches = list(loader)
    assert [batch["inputs"].shape for batch in batches] == [(4, 3, 8, 8)] * 4
    assert batches[0]["inputs"].dtype == torch.uint8
    assert loader.dataset.bad_files() == expected_bad(damaged_folder)


# Class folders


def class_folders(root: Path, counts: dict[str, int]) -> Path:
    for label, (name, count) in enumerate(counts.items()):
        for n in range(count):
            save(root / name / "sub" / f"{n:02d}.png", 100 * label + n)
    return root


def test_labelled_items(tmp_path):
    class_folders(tmp_path, {"ant": 2, "bee": 3})
    (tmp_path / ".hidden").mkdir()
    save(tmp_path / "stray.png")
    dataset = DATASETS.build({"type": "LabelledImages", "data_root": str(tmp_path), "image_size": 8, "split": "memory"})
    assert dataset.classes == ["ant", "bee"]
    assert dataset.metainfo == {"classes": ("ant", "bee")}
    assert dataset.labels.tolist() == [0, 0, 1, 1, 1]
    items = list(dataset)
    assert [item["label"] for item in items] == [0, 0, 1, 1, 1]
    assert [int(item["inputs"][0, 0, 0]) for item in items] == [0, 1, 100, 101, 102]
    assert items[4]["index"] == 4
    assert items[4]["split"] == "memory"
    batch = default_collate(items)
    assert batch["inputs"].shape == (5, 3, 8, 8)
    assert batch["label"].tolist() == [0, 0, 1, 1, 1]
    assert batch["split"] == ["memory"] * 5


def test_labelled_reading_is_repeatable(tmp_path):
    noise = np.random.Generator(np.random.PCG64(1)).integers(0, 256, size=(30, 50, 3), dtype=np.uint8)
    (tmp_path / "ant").mkdir()
    Image.fromarray(noise).save(tmp_path / "ant" / "x.png")
    dataset = LabelledImages(tmp_path, image_size=16, resize_ratio=1.2)
    assert torch.equal(dataset[0]["inputs"], dataset[0]["inputs"])
    assert not torch.equal(dataset[0]["inputs"], LabelledImages(tmp_path, image_size=16)[0]["inputs"])


def test_limit_per_class(tmp_path):
    class_folders(tmp_path, {"ant": 9, "bee": 2})
    few, all_of_them = LabelledImages(tmp_path, 8, limit_per_class=3), LabelledImages(tmp_path, 8)
    assert few.labels.tolist() == [0, 0, 0, 1, 1]
    assert set(names(few)) <= set(names(all_of_them))
    assert names(few) == names(LabelledImages(tmp_path, 8, limit_per_class=3))


def test_classes_are_numbered_by_their_sorted_names(tmp_path):
    """'10' comes before '2' (https://github.com/modestyachts/ImageNetV2/issues/10); the names are kept."""
    class_folders(tmp_path, {"0": 1, "2": 1, "10": 1})
    assert LabelledImages(tmp_path, 8).classes == ["0", "10", "2"]


def test_class_names_can_be_shown(tmp_path):
    class_folders(tmp_path, {"ant": 1, os.fsdecode(b"b\xe9e"): 1})
    dataset = LabelledImages(tmp_path, 8)
    assert dataset.classes == ["ant", r"b\xe9e"]
    assert len(list(dataset)) == 2


def test_images_that_two_data_sets_share(tmp_path):
    class_folders(tmp_path / "data", {"ant": 3, "bee": 2})
    (tmp_path / "link").symlink_to(tmp_path / "data")
    (tmp_path / "data/few.csv").write_text("ant/sub/00.png,ant\nbee/sub/01.png,bee\n")
    every = LabelledImages(tmp_path / "data", 8)
    few = LabelledImages(tmp_path / "link", 8, list_file=tmp_path / "data/few.csv")
    assert shared_images(every, few) == 2
    class_folders(tmp_path / "other", {"ant": 3, "bee": 2})
    assert shared_images(every, LabelledImages(tmp_path / "other", 8)) == 0


def test_a_replacement_brings_its_own_label(tmp_path):
    class_folders(tmp_path, {"ant": 1, "bee": 1})
    (tmp_path / "ant" / "sub" / "00.png").write_bytes(b"")
    dataset = LabelledImages(tmp_path, 8, max_bad_share=0.5)
    item = dataset[0]
    assert (item["label"], item["index"]) == (1, 1)
    assert dataset.bad_files() == [str(tmp_path / "ant" / "sub" / "00.png")]


def test_labelled_refusals(tmp_path):
    with refused(FileNotFoundError, "data-root-missing"):
        LabelledImages(tmp_path / "none")
    save(tmp_path / "flat" / "x.png")
    with refused(DataError, "no-class-folders", "flat"):
        LabelledImages(tmp_path / "flat")
    class_folders(tmp_path / "hole", {"ant": 1})
    (tmp_path / "hole" / "bee").mkdir()
    with refused(DataError, "class-folder-empty", "bee"):
        LabelledImages(tmp_path / "hole")
    with refused(ValueError, "limit-not-positive", "limit_per_class"):
        LabelledImages(tmp_path / "hole", limit_per_class=0)


def label_list(root, name, text):
    (root / name).write_text(text, encoding="utf-8")
    return LabelledImages(root, 8, list_file=root / name)


def test_lists_with_labels(tmp_path):
    class_folders(tmp_path, {"ant": 2, "bee": 1})
    save(tmp_path / "two words.png")
    expected = [("ant", "ant/sub/01.png"), ("ant", "two words.png"), ("wild bee", "bee/sub/00.png")]
    tsv = "ant/sub/01.png\tant\n\nbee/sub/00.png\twild bee\ntwo words.png\tant\n"
    csv = f'path,label\nant/sub/01.png, ant\nbee/sub/00.png,wild bee\n"{tmp_path}/two words.png",ant\n'
    for name, text in (("a.tsv", tsv), ("a.csv", csv)):
        dataset = label_list(tmp_path, name, text)
        assert dataset.classes == ["ant", "wild bee"]
        found = [(dataset.classes[label], dataset.path(i)) for i, label in enumerate(dataset.labels)]
        assert found == [(label, str(tmp_path / path)) for label, path in expected]
    numbered = label_list(tmp_path, "a.txt", "two words.png 1\nant/sub/00.png   0\n")
    assert numbered.classes == ["0", "1"]
    assert numbered[1]["label"] == 1
    assert numbered.path(1) == str(tmp_path / "two words.png")


@pytest.mark.parametrize(
    ("name", "text", "refusal"),
    [
        ("a.json", "{}", ("label-list-suffix", "a.json")),
        (
            "a.txt",
            "x.png cat\ny.png\n",
            ("label-list-line", "a.txt", "2", "y.png", "txt", "a/1.jpg cat"),
        ),
        ("a.csv", "x.png,cat,3\n", ("label-list-line", "1", "x.png,cat,3")),
        ("a.csv", "x.png,\n", ("label-list-line", "1", "x.png,")),
        ("a.tsv", "../x.png\tcat\n", ("listed-path-leaves-root", "1", "../x.png", "data_root")),
        ("a.csv", "path,label\n", ("label-list-empty", "a.csv")),
    ],
)
def test_lists_with_labels_refusals(tmp_path, name, text, refusal):
    with refused(DataError, *refusal):
        label_list(tmp_path, name, text)


def test_a_list_with_labels_that_is_absent(tmp_path):
    with refused(FileNotFoundError, "list-file-missing", "list_file", "none.txt"):
        LabelledImages(tmp_path, list_file=tmp_path / "none.txt")
