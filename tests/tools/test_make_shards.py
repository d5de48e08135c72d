"""Shards as the webdataset library writes and reads them, and what they become here."""

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused
from tiny_runs import write_images

from hgkd.cli import make_shards as tool
from hgkd.data import UnlabelledImages
from hgkd.errors import DataError


def test_the_library_and_we_read_what_was_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    webdataset = pytest.importorskip("webdataset")
    source = write_images(tmp_path / "100% images", each=3, size=16)
    (source / "a/0.png").rename(source / "a/my.photo.png")
    out = tmp_path / "100%d shards"
    assert tool.main([str(source), str(out), "--max-images", "4"]) == 0
    assert "6 images in 2 shards" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["images-000000.tar", "images-000001.tar"]
    files = UnlabelledImages(source, image_size=16, transform={"kind": "eval"})
    shards = UnlabelledImages(out, image_size=16, transform={"kind": "eval"})
    contents = [Path(files.path(i)).read_bytes() for i in range(6)]
    for i in range(6):
        assert torch.equal(shards[i]["inputs"], files[i]["inputs"])
    stream = webdataset.WebDataset([str(path) for path in sorted(out.iterdir())], shardshuffle=False)
    assert [sample["png"] for sample in stream] == contents
    with tarfile.open(out / "images-000000.tar") as shard:
        assert {member.mtime for member in shard} == {0}


def test_a_shard_that_is_cut_short_by_an_error_never_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("webdataset")
    source = write_images(tmp_path / "images", each=3, size=16)
    read = Path.read_bytes

    def full(path: Path) -> bytes:
        if path.name == "2.png" and path.parent.name == "b":
            raise OSError("No space left on device")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", full)
    assert tool.main([str(source), str(tmp_path / "out"), "--max-images", "4"]) == 2
    assert [path.name for path in (tmp_path / "out").iterdir() if path.suffix == ".tar"] == ["images-000000.tar"]


def test_a_full_disk_leaves_a_part_that_is_refused_as_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("webdataset")
    resource = pytest.importorskip("resource")
    source = write_images(tmp_path / "images", each=3, size=16)
    (source / "b/2.png").write_bytes((source / "b/2.png").read_bytes() + bytes(60_000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # the system refuses to write more into a file
    try:
        assert tool.main([str(source), str(tmp_path / "out"), "--max-images", "4"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "make room, remove the folder and pack again" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["images-000000.tar", "packing.tar.partial"]
    with refused(DataError, "shards-unfinished", "packing.tar.partial"):
        UnlabelledImages(tmp_path / "out", image_size=16)


def test_what_cannot_be_read_is_left_out_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("webdataset")
    source = write_images(tmp_path / "images", each=9, size=16)
    (source / "a/link.png").symlink_to("nowhere.png")
    assert tool.main([str(source), str(tmp_path / "out")]) == 0
    out = capsys.readouterr()
    assert "18 images in 1 shards" in out.out
    assert "1 files cannot be read and are left out, e.g." in out.err
    assert "a/link.png" in out.err
    os.mkfifo(source / "a/pipe.png")  # would block for ever
    assert tool.main([str(source), str(tmp_path / "more")]) == 0
    (source / "a/link2.png").symlink_to("nowhere.png")
    assert tool.main([str(source), str(tmp_path / "too many")]) == 2
    assert "3 of 21 images cannot be read" in capsys.readouterr().err


def test_a_list_may_name_images_anything(tmp_path: Path) -> None:
    """The kind of a member follows from the content, or it could not be read again."""
    pytest.importorskip("webdataset")
    source = write_images(tmp_path / "images", each=2, size=16)
    (source / "a/0.png").rename(source / "a/0f3c")
    (tmp_path / "list.txt").write_text("a/0f3c\na/1.png\n")
    count, _ = tool.make_shards(source, tmp_path / "out", list_file=tmp_path / "list.txt")
    assert count == 2
    assert len(list(UnlabelledImages(tmp_path / "out", image_size=16, max_bad_share=0))) == 2
    again, _ = tool.make_shards(tmp_path / "out", tmp_path / "again", max_images=1)  # shards are packed anew
    assert again == 2
    assert len(list(UnlabelledImages(tmp_path / "again", image_size=16, max_bad_share=0))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/gone", "{}/out"], "gone does not exist"),
        (["{}/images", "{}/images"], "is in use; give a new folder"),
        (["{}/images", "{}/out", "--max-mb", "0"], "max_mb and max_images must be positive, got 0.0 and 100000"),
    ],
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    pytest.importorskip("webdataset")
    write_images(tmp_path / "images", each=1, size=16)
    assert tool.main([text.format(tmp_path) for text in arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "webdataset", None)
    with refused(ValueError, "webdataset-missing", "hgkd[shards]"):
        tool.make_shards(tmp_path, tmp_path / "out")


def test_shrunk_images_are_upright_jpegs_of_that_shorter_side(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    (tmp_path / "images").mkdir()
    down, right = np.mgrid[0:1:90j, 0:1:60j] * 255
    upright = Image.fromarray(np.stack([down, right, 255 - down], axis=-1).astype(np.uint8))  # 60 wide
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "images/turned.jpg", exif=exif, quality=100)
    upright.save(tmp_path / "images/plain.png")
    upright.resize((20, 30)).save(tmp_path / "images/small.png")
    (tmp_path / "images/damaged.jpg").write_bytes((tmp_path / "images/turned.jpg").read_bytes()[:1500])
    for i in range(16):
        upright.resize((8, 8)).save(tmp_path / f"images/tiny{i}.png")
    count, shards = tool.make_shards(tmp_path / "images", tmp_path / "out", size=30, quality=95)
    assert count == 19  # the damaged one is left out
    packed = UnlabelledImages(tmp_path / "out", image_size=16)
    images = {Path(packed.path(i)).name.partition("_")[2]: packed.image(i) for i in range(19)}
    expected = np.asarray(upright.resize((30, 45), Image.Resampling.BICUBIC), dtype=float)
    for name in ("turned.jpg", "plain.jpg"):
        assert images[name].size == (30, 45)
        assert np.abs(np.asarray(images[name], dtype=float) - expected).mean() < 4
    assert images["small.png"].size == (20, 30)
    with tarfile.open(shards[0]) as shard:
        members = {member.name.partition("_")[2]: shard.extractfile(member).read() for member in shard}
    assert members["small.png"] == (tmp_path / "images/small.png").read_bytes()
    tool.make_shards(tmp_path / "images", tmp_path / "rough", size=30, quality=5)
    assert sum(p.stat().st_size for p in (tmp_path / "rough").iterdir()) <= sum(p.stat().st_size for p in shards)


def test_bytes_of_other_channels_are_copied(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    (tmp_path / "arrays").mkdir()
    for i in range(3):
        np.save(tmp_path / f"arrays/{i}.npy", np.full((8, 8, 5), i, dtype=np.uint16))
    count, _ = tool.make_shards(tmp_path / "arrays", tmp_path / "out", in_chans=5)
    assert count == 3
    packed = UnlabelledImages(tmp_path / "out", image_size=8, in_chans=5, transform={"kind": "eval"}, value_range=(0, 2))
    assert [float(item["inputs"].mean()) for item in packed] == pytest.approx([0, 0.5, 1])


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"size": 0}, ("size-or-quality-out-of-range", "0", "90")),
        ({"size": 8, "quality": 101}, ("size-or-quality-out-of-range", "8", "101")),
        ({"size": 8, "in_chans": 4}, ("packing-options-exclude", "8", "in_chans=4")),
        ({"value_range": (0, 9)}, ("packing-options-exclude", "value_range")),
    ],
)
def test_options_that_exclude_each_other(tmp_path: Path, options: dict[str, object], refusal: tuple[str, ...]) -> None:
    with refused(ValueError, *refusal):
        tool.make_shards(tmp_path, tmp_path / "out", **options)


def test_tables_are_packed_too(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    source = write_images(tmp_path / "images", each=3, size=16)
    contents = [path.read_bytes() for path in sorted(source.rglob("*.png"))]
    pq.write_table(pa.table({"image": contents}), tmp_path / "images.parquet")
    count, _ = tool.make_shards(tmp_path / "images.parquet", tmp_path / "out")
    packed = UnlabelledImages(tmp_path / "out", image_size=16)
    assert count == 6
    assert [packed.open(i).read() for i in range(6)] == contents
