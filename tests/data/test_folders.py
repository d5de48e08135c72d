"""What lies in a folder: the system's is passed over, what is left out is told by kind, links and cycles end."""

import io
import logging
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from refusals import refused

from hgkd.data import LabelledImages, UnlabelledImages
from hgkd.data.folders import RUN_FILES, is_system, printable, search
from hgkd.data.images import find_images
from hgkd.errors import DataError
from hgkd.training.work_folder import LOCK_NAME
from hgkd.weights.run_folder import LIST_NAME


def save(path: Path, value: int = 9, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (value, value, value)).save(path, **options)
    return path


SYSTEM = (
    "._a.jpg",
    "__MACOSX/a.jpg",
    "__MACOSX/._a.jpg",
    ".ipynb_checkpoints/a-checkpoint.jpg",
    "#recycle/b.png",
    "@eaDir/a.jpg",
)
SYSTEM += ("sub/.Trash-1000/files/c.png", "$RECYCLE.BIN/d.bmp", "lost+found/e.jpg", ".DS_Store", "Thumbs.db", ".hidden.png")


def test_what_is_the_systems_is_passed_over_and_counted(tmp_path, log):
    """macOS writes `._x.jpg` of 4 KB beside every file on a foreign disk, and Jupyter copies what it shows.

    https://github.com/pytorch/vision/issues/109
    """
    save(tmp_path / "a.jpg")
    save(tmp_path / "sub/b.png")
    for name in SYSTEM:
        save(tmp_path / "x.png")
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x.png").rename(tmp_path / name)
    assert find_images(str(tmp_path)) == ["a.jpg", "sub/b.png"]
    dataset = UnlabelledImages(tmp_path, image_size=8)
    assert len(dataset) == 2
    (line,) = log.told("left out")
    # folders are counted once, and not searched
    assert f"2 images below {tmp_path}; left out: 11 of a system" in line.getMessage()
    assert line.levelno == logging.INFO


def test_no_user_name_is_taken_for_a_systems():
    assert not any(map(is_system, ("recycle", "images", "@home", "_MACOSX", "#1.jpg", "..", ".", "thumbs", "1.jpg")))


def test_class_folders_pass_over_the_same(tmp_path):
    for name in ("ant/1.png", "bee/1.png", "__MACOSX/ant/1.png", "@eaDir/1.png", ".ipynb_checkpoints/1.png", "ant/._1.png"):
        save(tmp_path / "x.png")
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x.png").rename(tmp_path / name)
    dataset = LabelledImages(tmp_path, 8)
    assert dataset.classes == ["ant", "bee"]
    assert len(dataset) == 2


def test_work_folders_of_trainings_are_passed_over_and_counted(tmp_path, log):
    """`cd photos; hgkd train ... data_root=.` writes its pictures below data_root, where the resume would find them."""
    save(tmp_path / "a.png")
    for run, note in (("work_dirs/x", "run.lock"), ("work_dirs/deep/y", "checkpoints.txt"), ("z", "last_checkpoint")):
        save(tmp_path / run / "pictures/step_1.png")
        (tmp_path / run / note).write_text("epoch_1.pth")
    assert find_images(str(tmp_path)) == ["a.png"]
    assert len(UnlabelledImages(tmp_path, image_size=8)) == 1
    (line,) = log.told("left out")
    assert line.getMessage().endswith("left out: 3 work folders of trainings")
    assert line.levelno == logging.INFO
    assert find_images(str(tmp_path / "z")) == ["pictures/step_1.png"]  # which is named itself
    (tmp_path / "a.png").unlink()
    with refused(DataError, "no-images", "3 work folders"):
        UnlabelledImages(tmp_path)


def test_work_folders_of_trainings_are_no_classes(tmp_path, log):
    for run, note in (("work_dirs/x", "run.lock"), ("work_dirs/deep/y", "checkpoints.txt"), ("z", "last_checkpoint")):
        save(tmp_path / run / "pictures/step_1.png")
        (tmp_path / run / note).write_text("epoch_1.pth")
    with refused(DataError, "no-class-folders"):
        LabelledImages(tmp_path, 8)
    for name in ("train/ant/1.png", "test/ant/1.png"):
        save(tmp_path / name)
    with refused(DataError, "splits-as-classes", "test, train"):
        LabelledImages(tmp_path, 8)
    save(tmp_path / "bee/1.png")
    dataset = LabelledImages(tmp_path, 8)
    assert dataset.classes == ["bee", "test", "train"]
    assert len(dataset) == 3
    assert "3 work folders of trainings" in log.told("left out")[-1].getMessage()


def test_what_a_training_left_that_failed_before_its_first_checkpoint_is_no_image(tmp_path, log):
    save(tmp_path / "a/1.png")
    save(tmp_path / "b/1.png")
    for start in ("run/20261201_095004", "a/run/20261201_095004_378", "20261202_000000"):
        save(tmp_path / start / "vis_data/vis_image/step_1.png")
    assert find_images(str(tmp_path)) == ["a/1.png", "b/1.png"]
    dataset = LabelledImages(tmp_path, 8)
    assert log.told("left out")[-1].getMessage().endswith("left out: 3 work folders of trainings")
    assert dataset.classes == ["a", "b"]
    assert len(dataset) == 2
    save(tmp_path / "20250803_101500/1.png")  # a camera's folder
    assert len(find_images(str(tmp_path))) == 3


def test_the_files_of_a_work_folder_are_called_as_its_writers_call_them():
    assert {LOCK_NAME, LIST_NAME} < RUN_FILES


def test_further_kinds_are_read(tmp_path):
    for name, kind in (
        ("a.jfif", "JPEG"),
        ("b.JPE", "JPEG"),
        ("c.gif", "GIF"),
        ("d.ppm", "PPM"),
        ("e.pgm", "PPM"),
        ("f.jp2", None),
    ):
        save(tmp_path / name, format=kind)
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("white", "black", "black")]
    frames[0].save(tmp_path / "g.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "h.webp", save_all=True, append_images=frames[1:], lossless=True)
    dataset = UnlabelledImages(tmp_path, image_size=8, transform={"kind": "eval"}, max_bad_share=0)
    assert len(dataset) == 8
    values = [int(item["inputs"].float().mean().round()) for item in dataset]
    assert values == [9] * 6 + [255] * 2  # of several frames the first


@pytest.mark.skipif(".avif" not in __import__("hgkd").data.folders.IMAGE_EXTENSIONS, reason="Pillow without AVIF")
def test_avif(tmp_path):
    save(tmp_path / "a.avif")
    assert len(list(UnlabelledImages(tmp_path, image_size=8, max_bad_share=0))) == 1


def test_what_is_left_out_is_told_by_kind_and_pictures_among_it_are_a_warning(tmp_path, log):
    save(tmp_path / "a.png")
    for name in ("notes.txt", "b.txt", "LICENCE", "c.NEF", "d.tar.gz"):
        (tmp_path / name).write_bytes(b"x")
    UnlabelledImages(tmp_path, image_size=8)
    (line,) = log.told("left out")
    text = line.getMessage().partition("left out: ")[2]
    assert sorted(text.split(", ")) == ["1 .nef", "1 .tar.gz", "1 without an extension", "2 .txt"]
    assert line.levelno == logging.WARNING
    (tmp_path / "c.NEF").rename(tmp_path / "c.heic")
    told = search(str(tmp_path))
    assert ("pip install pillow-heif" in told.told()) == (told.left_out[".heic"] == 1)


def test_an_empty_folder_says_what_there_is(tmp_path):
    (tmp_path / "scan.nef").write_bytes(b"x")
    with refused(DataError, "no-images", "1", "data_root"):
        UnlabelledImages(tmp_path)


def test_links_to_folders_of_shards_are_followed_and_cycles_end(tmp_path):
    far = tmp_path / "far"
    far.mkdir()
    with tarfile.open(far / "a.tar", "w") as shard:
        for name in ("0.png", "._0.png", "__MACOSX/1.png", "2.seg.png", "3.json", "b/4.jfif"):
            buffer = io.BytesIO()
            Image.new("RGB", (6, 6)).save(buffer, format="PNG")
            info = tarfile.TarInfo(name)
            info.size = buffer.tell()
            buffer.seek(0)
            shard.addfile(info, buffer)
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(far)
    (far / "back").symlink_to(root)
    (root / "self").symlink_to("self")
    assert search(str(root)).shards == ["link/a.tar"]
    dataset = UnlabelledImages(root, image_size=8, max_bad_share=0)
    assert [os.path.relpath(dataset.path(i), root) for i in range(len(dataset))] == ["link/a.tar/0.png", "link/a.tar/b/4.jfif"]
    assert len(list(dataset)) == 2


def test_members_that_are_left_out_are_told(tmp_path, log):
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for name in ("IMG.2021.jpg", "IMG.2022.jpg", "0.jpg", "0.txt"):
            shard.addfile(tarfile.TarInfo(name))
    UnlabelledImages(tmp_path, image_size=8, max_bad_share=1)
    (line,) = log.told("left out")
    assert (
        "2 images with a further dot in their names, as in key.seg.png (to read them, rename them), 1 .txt" in line.getMessage()
    )


def test_links_between_class_folders_give_no_image_two_classes(tmp_path):
    for name in ("ant", "bee"):
        save(tmp_path / name / "1.png")
    (tmp_path / "ant/others").symlink_to(tmp_path / "bee")
    (tmp_path / "ant/all").symlink_to(tmp_path)
    dataset = LabelledImages(tmp_path, 8)
    assert dataset.labels.tolist() == [0, 1]
    (tmp_path / "emmet").symlink_to(tmp_path / "ant")
    with refused(DataError, "class-folder-linked-twice", "emmet", "ant"):
        LabelledImages(tmp_path, 8)


def test_splits_are_no_classes(tmp_path, log):
    for name in ("train/ant", "train/bee", "Val/ant"):
        save(tmp_path / name / "1.png")
    with refused(DataError, "splits-as-classes", "train", "data_root", "/train"):
        LabelledImages(tmp_path, 8)
    assert LabelledImages(tmp_path / "train", 8).classes == ["ant", "bee"]
    assert not log.told("one class folder only")
    LabelledImages(tmp_path / "Val", 8)
    assert log.told("one class folder only (ant)")[0].levelno == logging.WARNING


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    """`os.walk` says nothing of it, and its images would be missing."""
    save(tmp_path / "a.png")
    save(tmp_path / "closed/b.png")
    scan = os.scandir

    def denied(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", denied)
    with refused(DataError, "folder-not-listable", "closed"):
        UnlabelledImages(tmp_path)


def test_a_path_beyond_the_systems_longest_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(Path("top.png").absolute())
    for _ in range(20):
        os.mkdir("d" * 220)
        os.chdir("d" * 220)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save("deep.png")
    monkeypatch.chdir(tmp_path)
    with refused(DataError, "folder-not-listable"):
        UnlabelledImages(tmp_path)


def test_names_that_are_not_utf8(tmp_path, log):
    name = os.fsdecode(b"caf\xe9.png")
    folder = os.fsdecode(b"cl\xffass")
    save(tmp_path / folder / "x.png").rename(tmp_path / folder / name)
    (tmp_path / folder / os.fsdecode(b"\xe9.jpg")).write_bytes(b"damaged")
    dataset = UnlabelledImages(tmp_path, image_size=8, max_bad_share=0.5)
    assert len(list(dataset)) == 2
    assert dataset.path(0) == str(tmp_path / folder / name)
    text = log.told("skipping")[0].getMessage()
    assert text.encode("utf-8")  # every log can show it
    assert r"cl\xffass/\xe9.jpg" in text
    assert printable(folder) == r"cl\xffass"
