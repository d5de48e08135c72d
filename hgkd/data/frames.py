"""Frames to look at, one after the other: image files, a video, a camera, or JPEGs on standard input.

Nothing is read ahead, so a camera may run for ever. Files are read as everywhere in hgkd (upright, 8-bit RGB); videos and
cameras by OpenCV, which mmcv brings.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from torch import Tensor

from hgkd.data.channels import decode_channels
from hgkd.data.folders import printable
from hgkd.data.images import find_images, read_rgb
from hgkd.data.lists import _list_lines
from hgkd.data.pixels import as_value_range, open_image
from hgkd.errors import DataError, InvalidValueError, MissingFileError, MissingPackageError

VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".m4v", ".mjpeg", ".mjpg", ".ts", ".wmv")
_ADDRESSES = ("rtsp://", "http://", "https://", "udp://", "rtmp://")
_CHUNK = 1 << 16
_NO_LENGTH = (0x01, *range(0xD0, 0xD9))  # markers of JPEG that stand alone


@dataclass(frozen=True)
class Frame:
    """One picture of a source.

    Attributes:
        name: for files that are made of it, unique within the source.
        source: where it is from, printable: the file, or the stream and its number, from 0.
        pixels: PIL's 8-bit RGB; or float (C, H, W) in [0, 1] of other channels; None: an image file that cannot be read.
        failed: why it cannot be read.
    """

    name: str
    source: str
    pixels: Image.Image | Tensor | None
    failed: str = ""


def frames(
    source: str | os.PathLike[str], *, value_range: Sequence[float] | None = None, in_chans: int | None = None
) -> Iterator[Frame]:
    """The frames of a source, which is looked at at once and read as they are asked for.

    Args:
        source: an image; a folder, searched at any depth; a .txt list of images; a video; a camera by its number or device;
            an address (``rtsp://...``); or '-', JPEGs one after the other on standard input (MJPEG).
        value_range, in_chans: as for :class:`hgkd.data.UnlabelledImages`; of image files alone.

    Raises:
        FileNotFoundError: it does not exist.
        DataError: no image in it, or a stream that cannot be opened or is no MJPEG.
        MissingPackageError: a video or camera, and OpenCV is not installed.
        ValueError: ``in_chans`` with a stream; an empty text, which the system would take for the current folder.
    """
    text = os.fspath(source)
    if not text:
        raise InvalidValueError(
            "input-empty",
            "the input is an empty text (an unset variable?); give an image, a folder, a .txt list, a video, a camera's number "
            "or -; '.' is the current folder",
        )
    stream = _stream(text)
    if stream is None:
        return _of_files(_files(Path(text).expanduser(), in_chans), value_range, in_chans)
    if in_chans is not None:
        raise InvalidValueError(
            "channels-of-a-stream", f"{text} is a stream of RGB frames, the network takes {in_chans} channels; give image files"
        )
    return _mjpeg(sys.stdin.buffer) if text == "-" else _video(stream)


def picture_names(files: Sequence[Path]) -> list[str]:
    """A printable name for each file, all different: its stem; where that occurs again its folders, too, and at last a
    number."""
    stems = Counter(file.stem for file in files)
    common = os.path.commonpath([file.absolute().parent for file in files])
    names: list[str] = []
    taken: set[str] = set()
    for file in files:
        folders = file.absolute().parent.relative_to(common).parts if stems[file.stem] > 1 else ()
        name = chosen = printable("_".join([*folders, file.stem]))
        number = 1
        while chosen in taken:
            number += 1
            chosen = f"{name}_{number}"
        taken.add(chosen)
        names.append(chosen)
    return names


def _stream(text: str) -> str | int | None:
    """What OpenCV opens, or '-'; None: image files."""
    if text == "-" or text.lower().startswith(_ADDRESSES):
        return text
    if text.isdecimal() and not Path(text).exists():
        return int(text)
    is_device = os.name == "posix" and text.startswith("/dev/video")
    return text if is_device or (text.lower().endswith(VIDEOS) and not Path(text).is_dir()) else None


def _files(path: Path, in_chans: int | None) -> list[Path]:
    if path.is_dir():
        found = [path / name for name in find_images(str(path), arrays=in_chans is not None)]
        if not found:
            raise DataError("no-images", f"no images below {printable(str(path))}; give the folder that holds them")
        return found
    if not path.is_file():
        raise MissingFileError(
            "image-missing", f"{path} does not exist; give an image, a folder, a .txt list, a video, a camera's number, or -"
        )
    if path.suffix.lower() == ".txt":
        listed = [path.parent / line for line in _list_lines(str(path)) if line]
        if not listed:
            raise DataError(
                "list-file-empty", f"list {path} names no images; write one path a line, relative to it or absolute"
            )
        return listed
    return [path]


def _of_files(files: Sequence[Path], value_range: Sequence[float] | None, in_chans: int | None) -> Iterator[Frame]:
    limits = as_value_range(value_range)
    for file, name in zip(files, picture_names(files), strict=True):
        pixels: Image.Image | Tensor | None = None
        failed = ""
        try:
            if in_chans is None:
                pixels = read_rgb(file, limits)
            else:
                with open_image(file) as opened:
                    pixels = decode_channels(opened, in_chans, limits)
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
            failed = printable(f"{type(error).__name__}: {error}")
        yield Frame(name, printable(str(file)), pixels, failed)


def _video(source: str | int) -> Iterator[Frame]:
    if isinstance(source, str) and not source.lower().startswith(_ADDRESSES):
        source = str(Path(source).expanduser())
        if not Path(source).exists():
            raise MissingFileError("video-missing", f"video {source} does not exist")
    try:
        cv2: Any = importlib.import_module("cv2")
    except ImportError as error:
        raise MissingPackageError(
            "opencv-missing", f"{source} is read by OpenCV, which does not import ({error}); pip install opencv-python"
        ) from error
    capture = cv2.VideoCapture(source)
    if not capture.isOpened():
        raise DataError("video-not-opened", f"OpenCV cannot open {source}; give a video that it reads, or a camera")
    return _captured(capture, cv2, source)


def _captured(capture: Any, cv2: Any, source: str | int) -> Iterator[Frame]:
    stem = f"camera{source}" if isinstance(source, int) else Path(source).stem or "stream"
    number = 0
    try:
        while True:
            read, pixels = capture.read()
            if not read:
                break
            image = Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
            yield Frame(f"{stem}_{number:06d}", f"{source}#{number}", image)
            number += 1
    finally:
        capture.release()
    if not number:
        raise DataError("video-without-frames", f"{source} has no frame that OpenCV can read")


def _mjpeg(stream: BinaryIO) -> Iterator[Frame]:
    number = 0
    for content in split_jpegs(stream):
        try:
            image = Image.open(io.BytesIO(content), formats=["JPEG"]).convert("RGB")
        except Exception as error:  # as above
            raise DataError("stream-frame-unreadable", f"frame {number} on standard input cannot be read: {error}") from error
        yield Frame(f"stdin_{number:06d}", f"-#{number}", image)
        number += 1
    if not number:
        raise DataError("stream-without-frames", "standard input ended without a JPEG; pipe MJPEG into it (ffmpeg -f mjpeg -)")


def split_jpegs(stream: BinaryIO) -> Iterator[bytes]:
    """The JPEGs that follow each other in a stream, by their markers (ITU-T T.81, B.1.1); bytes between them are passed over.

    The length of each segment is heeded: a preview in EXIF, itself a JPEG, ends nothing. A last, unfinished one is left out.
    """
    buffer = bytearray()

    def more() -> bool:
        content = stream.read1(_CHUNK) if hasattr(stream, "read1") else stream.read(_CHUNK)
        buffer.extend(content)
        return bool(content)

    while True:
        while (start := buffer.find(b"\xff\xd8\xff")) < 0:
            del buffer[:-2]
            if not more():
                return
        del buffer[:start]
        while (end := _end_of_jpeg(buffer)) is None:
            if not more():
                return
        yield bytes(buffer[:end])
        del buffer[:end]


def _end_of_jpeg(content: bytearray) -> int | None:
    """Length of the JPEG at the beginning; None: more bytes are needed."""
    at = 2
    while True:
        at = content.find(b"\xff", at)  # of compressed values, and of padding
        if at < 0 or at + 3 >= len(content):
            return at + 2 if at >= 0 and content[at + 1 : at + 2] == b"\xd9" else None
        marker = content[at + 1]
        if marker == 0xD9:
            return at + 2
        if marker in (0x00, *_NO_LENGTH):
            at += 2
        elif marker == 0xFF:
            at += 1
        else:
            at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
