"""Frames of files, lists, videos and standard input, one after the other."""

import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused

from hgkd.data.frames import Frame, frames, split_jpegs
from hgkd.errors import DataError, MissingPackageError

COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]


def jpeg(colour: tuple[int, int, int], thumbnail: bytes = b"", size: tuple[int, int] = (40, 24)) -> bytes:
    """A JPEG of noise round a colour, so that its values are long; a thumbnail lies in a segment of its own."""
    noise = np.random.default_rng(0).integers(-20, 20, (size[1], size[0], 3))
    stream = io.BytesIO()
    Image.fromarray((noise + colour).clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=95)
    made = stream.getvalue()
    if not thumbnail:
        return made
    segment = b"Exif\0\0" + thumbnail
    return made[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + made[2:]


def mean_of(frame: Frame) -> list[float]:
    return np.asarray(frame.pixels).reshape(-1, 3).mean(0).tolist()


def test_files_have_names_of_their_own(tmp_path: Path) -> None:
    for name in ("a/x.png", "b/x.png", "b/y.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 6), (9, 8, 7)).save(tmp_path / name)
    (tmp_path / "b/z.jpg").write_bytes(b"no image")
    found = list(frames(tmp_path))
    assert [frame.name for frame in found] == ["a_x", "b_x", "y", "z"]
    assert found[0].pixels.getpixel((0, 0)) == (9, 8, 7)
    assert found[3].pixels is None
    assert "UnidentifiedImageError" in found[3].failed
    (tmp_path / "list.txt").write_text(f"b/y.png\n\n{tmp_path / 'a/x.png'}\n")
    assert [frame.source for frame in frames(tmp_path / "list.txt")] == [str(tmp_path / "b/y.png"), str(tmp_path / "a/x.png")]
    assert [frame.name for frame in frames(tmp_path / "a/x.png")] == ["x"]


def test_names_that_are_not_utf8_are_printable_and_stay_different(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"f\xe9")
    folder.mkdir()
    for name in (b"latin\xe9.png", rb"latin\xe9.png"):
        Image.new("RGB", (8, 6)).save(folder / os.fsdecode(name))
    (folder / os.fsdecode(b"broken\xe9.png")).write_bytes(b"no image")
    found = list(frames(folder))
    for text in (text for frame in found for text in (frame.name, frame.source, frame.failed)):
        text.encode()
    assert sorted(frame.name for frame in found) == [r"broken\xe9", r"latin\xe9", r"latin\xe9_2"]
    assert {frame.source for frame in found} == {rf"{tmp_path}/f\xe9/{name}\xe9.png" for name in ("broken", "latin")}


def test_images_of_other_channels(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full((6, 8, 2), 51, np.uint8))
    (found,) = frames(tmp_path, in_chans=2)
    torch.testing.assert_close(found.pixels, torch.full((2, 6, 8), 0.2))
    with refused(ValueError, "channels-of-a-stream", "2"):
        frames("-", in_chans=2)


def test_an_empty_text_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    with refused(ValueError, "input-empty", "'.'"):
        frames("")
    assert len(list(frames("."))) == 1


def test_a_video(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    file = tmp_path / "street.avi"
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 48))
    if not writer.isOpened():
        pytest.skip("this OpenCV writes no video")
    for colour in COLOURS:
        writer.write(np.full((48, 64, 3), colour[::-1], np.uint8))
    writer.release()
    found = list(frames(file))
    assert [frame.name for frame in found] == ["street_000000", "street_000001", "street_000002"]
    assert found[2].source == f"{file}#2"
    for frame, colour in zip(found, COLOURS, strict=True):
        assert frame.pixels.size == (64, 48)
        assert mean_of(frame) == pytest.approx(colour, abs=6)


def test_what_is_no_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused(FileNotFoundError, "video-missing", "street.mp4"):
        next(frames(tmp_path / "street.mp4"))
    (tmp_path / "street.mp4").write_bytes(b"nothing")
    pytest.importorskip("cv2")
    with refused(DataError, "video-not-opened", "street.mp4"):
        next(frames(tmp_path / "street.mp4"))
    monkeypatch.setitem(sys.modules, "cv2", None)
    with refused(MissingPackageError, "opencv-missing", "opencv-python"):
        next(frames(tmp_path / "street.mp4"))


@pytest.mark.parametrize("step", [1, 7, 1 << 16])
def test_a_stream_of_jpegs(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, other = (jpeg(colour) for colour in COLOURS[:2])
    nested = jpeg(COLOURS[2], thumbnail=jpeg((0, 0, 0), size=(8, 8)))
    content = b"--boundary\r\n\r\n" + plain + b"\r\n--\xff\xd9" + nested + other + plain[:-9]  # the last is cut off

    class Slow(io.BytesIO):
        def read1(self, size: int = -1) -> bytes:
            return self.read(min(size, step))

    assert list(split_jpegs(Slow(content))) == [plain, nested, other]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=Slow(content)))
    found = list(frames("-"))
    assert [frame.name for frame in found] == ["stdin_000000", "stdin_000001", "stdin_000002"]
    for frame, colour in zip(found, (COLOURS[0], COLOURS[2], COLOURS[1]), strict=True):
        assert mean_of(frame) == pytest.approx(colour, abs=6)


def test_wrong_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused(FileNotFoundError, "image-missing", "none.jpg"):
        frames(tmp_path / "none.jpg")
    with refused(DataError, "no-images", tmp_path):
        frames(tmp_path)
    (tmp_path / "list.txt").write_text("\n")
    with refused(DataError, "list-file-empty", "list.txt"):
        frames(tmp_path / "list.txt")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"text")))
    with refused(DataError, "stream-without-frames"):
        list(frames("-"))
