"""Shards as the webdataset library writes and reads them, and what they become here."""

import tarfile
from pathlib import Path

import pytest
import torch
from tiny_runs import load_tool, write_images

from hgkd.data import UnlabelledImages

tool = load_tool("make_shards")


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
    with pytest.raises(ValueError, match=r"needs webdataset .*pip install 'hgkd\[shards\]'"):
        tool.make_shards(tmp_path, tmp_path / "out")
