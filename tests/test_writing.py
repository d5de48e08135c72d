"""What the disk refuses is one sentence, and nothing half-written stays."""

import errno
import os
from pathlib import Path

import pytest
import timm
import torch
from full_disk import full_disk
from PIL import Image
from refusals import refused
from safetensors.torch import save_file

from hgkd.errors import WeightsError
from hgkd.networks.mae import MaskedAutoencoder, make_arch, save_mae
from hgkd.sparse import save_sparse, sparsify
from hgkd.writing import WriteError, filled, replacing, write_text, writing, written_beside, written_whole


def test_beside_then_renamed(tmp_path: Path) -> None:
    file = tmp_path / "deep/result.json"
    with written_beside(file) as beside:
        assert beside.parent == file.parent
        assert beside.suffix == ".json"
        beside.write_text("new")
        assert not file.exists()
    assert (file.read_text(), os.listdir(file.parent)) == ("new", ["result.json"])
    mask = os.umask(0)
    os.umask(mask)
    assert file.stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize(
    "write",
    [
        lambda file: file.write_bytes(bytes(200_000)),
        lambda file: torch.save(torch.zeros(50_000), file),
        lambda file: save_file({"a": torch.zeros(50_000)}, file),
    ],
    ids=["python", "torch", "safetensors"],
)
def test_a_full_disk_keeps_the_old_file(tmp_path: Path, write: object) -> None:
    file = tmp_path / "a.bin"
    file.write_text("old")
    with full_disk(50_000), refused(WriteError, "file-not-written", "a.bin"), \
            written_beside(file) as beside:  # fmt: skip
        write(beside)
    assert (file.read_text(), os.listdir(tmp_path)) == ("old", ["a.bin"])


def test_a_full_disk_keeps_the_old_picture(tmp_path: Path) -> None:
    """Written to a path, the same picture is cut off without an error: Pillow passes over short writes."""
    file, picture = tmp_path / "a.jpg", Image.effect_noise((256, 256), 80)
    picture.save(file)
    old = file.read_bytes()
    with full_disk(10_000):
        picture.save(tmp_path / "cut.jpg")
        with refused(WriteError, "file-not-written", "a.jpg"), written_whole(file) as stream:
            picture.save(stream, format="JPEG")
    assert (tmp_path / "cut.jpg").stat().st_size == 10_000 < len(old)
    (tmp_path / "cut.jpg").unlink()
    assert (file.read_bytes(), os.listdir(tmp_path)) == (old, ["a.jpg"])
    with written_whole(file) as stream:
        stream.write(b"new")
    assert file.read_bytes() == b"new"


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with refused(WriteError, "file-not-written"), \
            written_beside(tmp_path / "file/below.json"):  # fmt: skip
        pass
    with refused(WriteError, "file-not-written", "Read-only"), writing(tmp_path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize(
    "error", [WeightsError("a weight is missing"), FileNotFoundError("head does not exist"), KeyError("a")]
)
def test_other_errors_pass(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error), match=str(error.args[0])), writing(tmp_path):
        raise error


def test_what_replaces_a_file_is_whole_and_errors_stay_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "epoch_1.pth"
    write_text(file, "\u00fc")
    assert file.read_bytes() == b"\xc3\xbc"

    def write(content: bytes, then: type[BaseException] | None = None) -> None:
        with replacing(file) as beside:
            assert beside == tmp_path / "epoch_1.pth.partial"
            beside.write_bytes(content)
            if then is not None:
                raise then

    with full_disk(1000), pytest.raises(OSError, match="File too large"):
        write(bytes(5000))
    with pytest.raises(KeyboardInterrupt):
        write(b"part", then=KeyboardInterrupt)
    assert (file.read_bytes(), os.listdir(tmp_path)) == (b"\xc3\xbc", ["epoch_1.pth"])


@pytest.mark.parametrize("kind", ["mae", "sparse"])
def test_networks_are_written_whole_or_not_at_all(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"{kind}.safetensors"
    file.write_text("old")
    sizes = {"depth": 1, "decoder_depth": 1, "image_size": (32, 32)}
    if kind == "mae":
        network = MaskedAutoencoder(make_arch("tiny", **sizes))
        with full_disk(1000), refused(WriteError, "file-not-written", "mae.safetensors"):
            save_mae(network, file, overwrite=True)
    else:
        with full_disk(1000), refused(WriteError, "file-not-written", "sparse.safetensors"):
            save_sparse(sparsify(timm.create_model("test_resnet", num_classes=0), 32), file, overwrite=True)
    assert (file.read_text(), os.listdir(tmp_path)) == ("old", [file.name])


def test_filling_changes_what_stands_between_the_markers_only() -> None:
    assert filled("a\n<!-- b -->\nold\n<!-- e -->\nz\n", "<!-- b -->\n", "<!-- e -->\n", "new\n", "p.md") == (
        "a\n<!-- b -->\nnew\n<!-- e -->\nz\n"
    )
    with refused(ValueError, "page-without-markers", "p.md", "'<!-- e -->'"):
        filled("<!-- b -->\n", "<!-- b -->\n", "<!-- e -->\n", "new\n", "p.md")
