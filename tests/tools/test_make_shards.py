"""Shards as the webdataset library writes and reads them, and what they become here."""

import os
import tarfile
from pathlib import Path

import pytest
import torch
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
