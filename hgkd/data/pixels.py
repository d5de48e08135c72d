"""From an image file to upright 8-bit RGB: depth of the values, bands, transparency, orientation.

The default reads what photographs and masks hold. Measuring instruments write other things under the same extensions (12 bits
in 16, floats of any range, four and more bands): these are measured on some of the images before a run and told with the
numbers, and two options, ``value_range`` and ``use_alpha``, say what is meant.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError
from PIL.ExifTags import Base

from hgkd.data.folders import HAS_AVIF, HAS_HEIF, printable
from hgkd.errors import InvalidTypeError, InvalidValueError

READING = 2
"""Number of the rules below, raised when the same file gives other pixels: 1 did not heed the EXIF orientation."""

# What Pillow may decode, whatever the file is called: no formats that start other programs (EPS) or nest files
FORMATS = [
    *("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "JPEG2000"),
    *(("AVIF",) if HAS_AVIF else ()),
    *(("HEIF",) if HAS_HEIF else ()),
]
# Pillow refuses a PNG for a colour profile or note above 1 MB, which Photoshop and renderers write; 64 MB in all stay the limit
PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, 2**25)

if HAS_HEIF:
    import pillow_heif

    pillow_heif.register_heif_opener()

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = 5  # from this orientation on width and height are exchanged
_MAX_BANDS = 4
_ROWS = 256  # converted at once
_MEASURED_ROWS = 2048  # of an image, at most
_SAMPLE_FORMATS = {1: "unsigned integers", 2: "signed integers", 3: "floats"}
Values = NDArray[Any]
Range = tuple[float, float]


class BandsError(OSError):
    """An image of more bands than can be read."""


def as_value_range(value: Sequence[float] | None) -> Range | None:
    """``value_range`` as (low, high), or None.

    Raises:
        TypeError: not two numbers.
        ValueError: not finite, or low is not below high.
    """
    if value is None:
        return None
    numbers = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2
    if not numbers or any(isinstance(part, bool) or not isinstance(part, (int, float)) for part in value):
        raise InvalidTypeError(
            "value-range-not-a-pair",
            f"value_range must be two numbers (low, high), the values of black and white, got {value!r}",
        )
    if not all(map(math.isfinite, value)) or not value[0] < value[1]:
        raise InvalidValueError(
            "value-range-empty",
            f"value_range must be (low, high) with low < high, the values of black and white, got {value!r}",
        )
    return float(value[0]), float(value[1])


def open_image(path: str | os.PathLike[str]) -> BinaryIO:
    """A file for :func:`decode`.

    Raises:
        OSError: missing, or not a regular file.
    """
    # a named pipe would block for ever
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"not a regular file: {printable(os.fspath(path))}")
    return open(path, "rb")


FULL_SIZE = "full_size"
"""Key in ``info`` of an image that was decoded smaller: width and height of the whole one, of which crops are drawn."""

Shrink = Callable[[int, int], float]
"""From width and height of an upright image to how many times smaller it may be decoded."""


def decode(
    file: BinaryIO, value_range: Range | None = None, use_alpha: bool = True, shrink: Shrink | None = None
) -> Image.Image:
    """An open image file as 8-bit RGB, upright by its EXIF orientation; of several frames (GIF, WebP, TIFF) the first.

    Transparent places become white. Images of more than 8 bits a value: ``value_range`` gives the values of black and white;
    without it integers count as [0, 65535], and floats as [0, 1] when nothing in the image exceeds 1, else as [0, 255]. NaN
    is black.

    Args:
        value_range: (low, high); images of 8 bits are not concerned.
        use_alpha: False: a band that is tagged as transparency is left out.
        shrink: JPEGs may be given as many times smaller: they are decoded at 1/2, 1/4 or 1/8 of their sides where that is
            enough, by fewer coefficients of each block (Pillow's ``draft``). The result's ``info`` then has the upright
            size of the file under :data:`FULL_SIZE`.

    Raises:
        BandsError: more than four bands.
        OSError: not an image, truncated.
        Exception: whatever else Pillow's decoders raise on damaged content.
    """
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        values = _foreign_values(file)
        if values is None:
            _refuse_array(file)
            raise
        tags = _tiff_tags(file) or {}
        return _turned(_as_rgb(values, value_range, use_alpha), int(tags.get(Base.Orientation, 1)))
    except Image.DecompressionBombError as error:
        raise Image.DecompressionBombError(f"{error} If it is an image of yours, cut it into tiles") from error
    with image:
        _check_bands(_bands(image))
        packed = _is_packed_deep(image)  # before the orientation, for which a PNG is loaded
        turn = _orientation(image)
        if packed and value_range is not None:
            return _turned(_as_rgb(_cv2_values(file), value_range, use_alpha), turn)
        whole = image.size
        if shrink is not None and image.format in ("JPEG", "MPO"):
            _draft(image, shrink(*(whole if turn < _SIDEWAYS else whole[::-1])))
        image.load()
        deep = _is_deep(image)
        rgb = _as_rgb(_pillow_values(image), value_range, use_alpha) if deep else _flattened(image, use_alpha)
        if rgb.size != whole:
            rgb.info[FULL_SIZE] = whole if turn < _SIDEWAYS else whole[::-1]
        if deep and _is_white_zero(image):  # Pillow inverts 8 bits only
            rgb = ImageOps.invert(rgb)
        return rgb if image.format == "TIFF" else _turned(rgb, turn)  # Pillow turns TIFFs itself


def _draft(image: Image.Image, times: float) -> None:
    step = next((step for step in (8, 4, 2) if step <= times), None)
    if step is not None:
        width, height = image.size
        image.draft(None, (width // step, height // step))


def _flattened(image: Image.Image, use_alpha: bool) -> Image.Image:
    if not use_alpha or not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _orientation(image: Image.Image) -> int:
    """EXIF's number of which side is up; 1 (as stored) when it is not told, or not readable."""
    with suppress(Exception):  # damaged EXIF is no reason to lose a picture; its readers raise all sorts of errors
        return int(image.getexif().get(Base.Orientation, 1))
    return 1


def _turned(image: Image.Image, orientation: int) -> Image.Image:
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


# --- more than 8 bits a value ----------------------------------------------------------------------------------------------


def _is_deep(image: Image.Image) -> bool:
    """Whether Pillow holds more than 8 bits a value: grey of 16 or 32 bits, or floats."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _is_packed_deep(image: Image.Image) -> bool:
    """Whether Pillow gives 8 bits a value of a file that holds other ones: 16 bits in several bands, or signed ones."""
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.mode == "L" and _sample_format(image.tag_v2) == 2:
        return True
    tiles = getattr(image, "tile", None)
    raw = tiles[0][3] if tiles else ""
    return not _is_deep(image) and "16" in str(raw[0] if isinstance(raw, tuple) else raw)


def _pillow_values(image: Image.Image) -> Values:
    values = np.asarray(image)
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.mode == "I" and _sample_format(image.tag_v2) == 1:
        return values.view(np.uint32)  # Pillow has no unsigned 32 bits
    return values


def _cv2_values(file: BinaryIO) -> Values:
    """All bits of an image of one to four bands as stored, (H, W) or (H, W, bands) in the order RGBA."""
    import cv2

    file.seek(0)
    content = bytearray(file.read())
    _lay_down(content)
    values = cv2.imdecode(np.frombuffer(content, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None:
        raise OSError("OpenCV, which reads more than 8 bits a band, cannot decode this file")
    return values if values.ndim == 2 else values[..., [2, 1, 0, 3][: values.shape[2]]]


def _as_rgb(values: Values, value_range: Range | None, use_alpha: bool) -> Image.Image:
    """(H, W) or (H, W, 3 or 4) of any type as an RGB image."""
    if values.ndim == 3 and values.shape[2] == _MAX_BANDS:
        colours = _to_bytes(values[..., :3], value_range)
        if not use_alpha:
            return Image.fromarray(colours)
        alpha = _to_bytes(values[..., 3:], None)  # opaque is the type's highest value, whatever the colours' range
        return _flattened(Image.fromarray(np.concatenate([colours, alpha], axis=2)), True)
    return Image.fromarray(_to_bytes(values, value_range)).convert("RGB")


def _to_bytes(values: Values, value_range: Range | None) -> NDArray[np.uint8]:
    if values.dtype == np.uint8:
        return values
    low, high = _range(values) if value_range is None else value_range
    result = np.empty(values.shape, dtype=np.uint8)
    for row in range(0, len(values), _ROWS):  # a satellite's image is large, and would be so several times over
        part = values[row : row + _ROWS].astype(np.float32 if values.dtype.itemsize <= 2 else np.float64)
        scaled = (np.nan_to_num(part, nan=low, posinf=high, neginf=low) - low) * (255 / (high - low))
        result[row : row + _ROWS] = np.clip(np.rint(scaled), 0, 255)
    return result


def _range(values: Values) -> Range:
    """The values of black and white where nobody has said them."""
    if values.dtype.kind != "f":
        return 0.0, 65535.0
    return 0.0, 1.0 if np.max(values, where=np.isfinite(values), initial=0) <= 1 else 255.0


# --- TIFF: what Pillow does not tell ---------------------------------------------------------------------------------------


def _sample_format(tags: Mapping[int, Any]) -> int:
    found = tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))
    return int(found[0] if isinstance(found, tuple) else found)


def _is_white_zero(image: Image.Image) -> bool:
    """Whether a TIFF's values grow from white to black."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return False
    return image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0


def _bands(image: Image.Image) -> int:
    """Bands in the file, of which Pillow may give fewer."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return int(image.tag_v2.get(TiffImagePlugin.SAMPLESPERPIXEL, 1))
    return len(image.getbands())


def _check_bands(bands: int, what: str = "") -> None:
    if bands > _MAX_BANDS:
        raise BandsError(
            f"{bands} bands{what}; read are 1 (grey), 3 (red, green, blue) and 4 (with transparency): train on all of them "
            f"with in_chans={bands}, or save three of them, e.g. gdal_translate -b 3 -b 2 -b 1 IN.tif OUT.tif"
        )


def _refuse_array(file: BinaryIO) -> None:
    """Raise BandsError for a NumPy array, which is no picture until somebody says how many channels it has."""
    file.seek(0)
    if file.read(6) == b"\x93NUMPY":
        raise BandsError("a NumPy array, which is read where in_chans says the number of its channels")


def _foreign_values(file: BinaryIO) -> Values | None:
    """The values of a TIFF that Pillow does not read (floats of 64 bits, several bands of floats or signed integers).

    None: no TIFF.

    Raises:
        BandsError: more than four bands.
        OSError: cannot be read, with what it is.
    """
    tags = _tiff_tags(file)
    if tags is None:
        return None
    bands = int(tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1))
    bits = tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))[0]
    what = f" of {bits}-bit {_SAMPLE_FORMATS.get(_sample_format(tags), 'values')}"
    _check_bands(bands, what)
    width, height = (int(tags.get(key, 0)) for key in (TiffImagePlugin.IMAGEWIDTH, TiffImagePlugin.IMAGELENGTH))
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > 2 * limit:  # as Pillow guards what it reads
        raise Image.DecompressionBombError(f"Image size ({width * height} pixels) exceeds limit of {2 * limit} pixels")
    try:
        values = _cv2_values(file)
    except OSError as error:
        raise OSError(f"a TIFF with {bands} band(s){what} that neither Pillow nor OpenCV reads") from error
    return values


def _lay_down(content: bytearray) -> None:
    """Set a TIFF's orientation to 'as stored', in place: OpenCV 5.0 turns some orientations, and by other angles."""
    if not content.startswith((b"II*\0", b"MM\0*")):
        return
    order: Literal["little", "big"] = "little" if content[:1] == b"I" else "big"
    start = int.from_bytes(content[4:8], order)
    count = int.from_bytes(content[start : start + 2], order)
    for entry in range(start + 2, start + 2 + 12 * count, 12):
        if int.from_bytes(content[entry : entry + 2], order) == Base.Orientation:
            content[entry + 8 : entry + 10] = (1).to_bytes(2, order)


def _tiff_tags(file: BinaryIO) -> Mapping[int, Any] | None:
    """The first directory of a TIFF, None when it is none."""
    file.seek(0)
    header = file.read(8)
    if header[:4] not in (b"II*\0", b"MM\0*"):
        return None
    with suppress(Exception):  # a damaged file
        tags = TiffImagePlugin.ImageFileDirectory_v2(header)
        file.seek(tags.next)
        tags.load(file)
        return tags
    return None


# --- measured before a run -------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """Unusual properties of one image.

    Attributes:
        kind: of its values when they have more than 8 bits: 'uint16', 'float32', ...; '' otherwise.
        low, high: lowest and highest of these.
        nans: whether some are NaN.
        black, white: how the lowest and the highest are read without ``value_range``, in 0..255, before they are cut.
        hidden: share of the pixels that a band of transparency hides at least in part, where colours differ beneath.
        bands, passed_over: in the file, and how many of them are not read.
        frames: whether there are several (pages, an animation).
        cut: share of the values that lie beyond ``value_range``, where one was given.
    """

    kind: str = ""
    low: float = 0.0
    high: float = 0.0
    nans: bool = False
    black: float = 0.0
    white: float = 255.0
    hidden: float = 0.0
    bands: int = 3
    passed_over: int = 0
    frames: bool = False
    cut: float = 0.0


def measure(file: BinaryIO, value_range: Range | None = None) -> Measured:
    """Depth, bands and transparency of an open image file; of usual images the header alone is read.

    Args:
        value_range: with which it is going to be read.

    Raises:
        BandsError: more than four bands.
        Exception: as :func:`decode`.
    """
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        values = _foreign_values(file)
        if values is None:
            _refuse_array(file)
            raise
        return _measured(values, value_range)
    with image:
        bands = _bands(image)
        _check_bands(bands)
        found = Measured()
        if _is_packed_deep(image):
            found = _measured(_cv2_values(file), value_range)
            file.seek(0)
            image = Image.open(file, formats=FORMATS)
        elif _is_deep(image):
            found = _measured(_pillow_values(image), value_range)
        if image.mode == "RGBA":
            found.hidden = _hidden(np.asarray(image.reduce(max(1, max(image.size) // 256))))
        found.bands, found.passed_over = bands, bands - len(image.getbands())
        found.frames = image.format in ("TIFF", "GIF", "WEBP", "PNG", "AVIF") and bool(getattr(image, "is_animated", False))
        return found


def share_beyond(values: Values, value_range: Range | None) -> float:
    """Share of the values that ``value_range`` cuts off; NaN is none of them."""
    if value_range is None or not values.size:
        return 0.0
    return float(np.mean((values < value_range[0]) | (values > value_range[1])))


def _measured(values: Values, value_range: Range | None = None) -> Measured:
    colours = values[..., :3] if values.ndim == 3 else values
    colours = colours[:: -(-len(colours) // _MEASURED_ROWS)]
    finite = colours[np.isfinite(colours)] if colours.dtype.kind == "f" else colours
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    black, white = _range(colours)
    scale = 255 / (white - black)
    kind = "" if colours.dtype == np.uint8 else str(colours.dtype)
    cut = share_beyond(colours, value_range)
    return Measured(kind, low, high, finite.size < colours.size, (low - black) * scale, (high - black) * scale, cut=cut)


def _hidden(pixels: NDArray[np.uint8]) -> float:
    beneath = pixels[pixels[..., 3] < 250][:, :3]
    if not len(beneath) or beneath.std(axis=0).max() < 8:  # one colour: nothing to lose
        return 0.0
    return len(beneath) / (pixels.shape[0] * pixels.shape[1])


_DARK = 64  # of 255: where the brightest value of all is below, the files have likely more bits than their content
_MUCH = 0.5
_CUT = 0.05  # of the values: sensors have some bright points, and windows are often percentiles


def check_value_range(images: Sequence[Measured], value_range: Range | None) -> None:
    """Refuse a ``value_range`` by which each image that was looked at is all black or all white.

    Raises:
        ValueError: with the values that were found.
    """
    deep = [image for image in images if image.kind]
    if value_range is None or not deep:
        return
    low, high = min(image.low for image in deep), max(image.high for image in deep)
    if low == high:  # one colour, whatever the range
        return
    if high <= value_range[0] or low >= value_range[1]:
        colour = "black" if high <= value_range[0] else "white"
        raise InvalidValueError(
            "value-range-misses-the-data",
            f"value_range={list(value_range)} makes every image {colour}: the {len(deep)} that were looked at hold values "
            f"from {low:.6g} to {high:.6g}; set value_range to about these, e.g. value_range=[{low:.6g},{high:.6g}]",
        )


def _range_warnings(deep: Sequence[Measured], value_range: Range, count: str) -> list[str]:
    """Where a given ``value_range`` is much too wide, or much too narrow."""
    (black, white), low, high = value_range, min(image.low for image in deep), max(image.high for image in deep)
    told = []
    found = f"{len(deep)} of {count} hold values from {low:.6g} to {high:.6g}"
    highest = (high - black) / (white - black)
    if low < high and highest < _DARK / 255:
        told.append(
            f"{found}, which fill the lowest {highest:.1%} of value_range=[{black:.6g},{white:.6g}] only: the pictures are "
            f"nearly black; e.g. value_range=[{low:.6g},{high:.6g}]"
        )
    cut = float(np.mean([image.cut for image in deep]))
    if cut > _CUT:
        told.append(
            f"{found}; value_range=[{black:.6g},{white:.6g}] cuts off {cut:.0%} of them, which become black or white. If that "
            f"is not meant, set e.g. value_range=[{low:.6g},{high:.6g}]"
        )
    return told


def warnings_of(images: Sequence[Measured], value_range: Range | None, use_alpha: bool) -> list[str]:
    """Warnings about images that were looked at, for a user to read before a run trains on them.

    Values that would be nearly black, or cut, where no ``value_range`` is given; bands that are not read; transparency that
    hides half of the pictures and more.
    """
    count = f"{len(images)} images looked at"
    told = []
    deep = [image for image in images if image.kind]
    if deep and value_range is None:
        # a float image is read by its own highest value, so each can be too dark for itself
        dim = [image.white for image in deep if image.kind.startswith("float") and 1 < image.high < _DARK]
        black, white = min(image.black for image in deep), min(dim, default=max(image.white for image in deep))
        low, high = min(image.low for image in deep), max(image.high for image in deep)
        if black < -0.5 or white > 255.5 or white < _DARK:
            kinds = "/".join(sorted({image.kind for image in deep}))
            nans = ", and NaN" if any(image.nans for image in deep) else ""
            told.append(
                f"{len(deep)} of {count} hold {kinds} values from {low:.6g} to {high:.6g}{nans}; without value_range they are "
                f"read as {black:.0f} to {white:.0f}, where 0 is black, 255 white, and all beyond is cut. Say which values are "
                f"black and white, e.g. value_range=[{low:.6g},{high:.6g}]"
            )
    if deep and value_range is not None:
        told += _range_warnings(deep, value_range, count)
    partly = [image for image in images if image.passed_over]
    if partly:
        told.append(
            f"{len(partly)} of {count} have {partly[0].bands} bands and no transparency; the last "
            f"{partly[0].passed_over} of them are left out"
        )
    frames = sum(image.frames for image in images)
    if frames:
        told.append(f"{frames} of {count} have several frames or pages, of which the first is read")
    hidden = [image.hidden for image in images if image.hidden]
    if use_alpha and hidden and np.mean(hidden) >= _MUCH:
        told.append(
            f"{len(hidden)} of {count} have a fourth band that is tagged as transparency and hides {np.mean(hidden):.0%} of "
            "their pixels, which become white. If it is something else (infrared, a mask), leave it out with "
            "use_alpha=False (train_dataloader.dataset.use_alpha=False)"
        )
    return told
