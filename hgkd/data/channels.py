"""From an image file to all of its channels: as many as a network takes, as floats in [0, 1], with all bits of the file.

The reading of :mod:`hgkd.data.pixels` makes 8-bit RGB of everything, which is what photographs are for. Here nothing is left
out
and nothing made up: a file must have exactly the asked number of channels, transparency is a channel like any other, and no
value
is guessed. Integers of 8 and 16 bits count as shares of their type's highest value and floats as they are; whatever else is
meant
says ``value_range``.

What reads what: Pillow what it gives without loss; OpenCV PNGs of 16 bits a band (Pillow reads these as 8 bits); tifffile
(cgohlke/tifffile, BSD-3, needs NumPy alone) TIFFs of several bands, of which Pillow refuses most and OpenCV 5 turns some, bands
that are no colours, into one of 8 bits without a word; NumPy ``.npy``.
"""

from __future__ import annotations

import io
from contextlib import suppress
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from hgkd.data.pixels import (
    FORMATS,
    BandsError,
    Measured,
    Range,
    Values,
    _bands,
    _cv2_values,
    _is_deep,
    _is_packed_deep,
    _is_white_zero,
    _orientation,
    _pillow_values,
    share_beyond,
)

READING_CHANNELS = 1
"""Number of the rules below, raised when the same file gives other values."""

_ARRAY_MAGIC = b"\x93NUMPY"
_TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MEASURED_ROWS = 2048
_FULL = {"uint8": 255.0, "uint16": 65535.0, "bool": 1.0}  # the highest value of types whose range is known
# axes of an array (H, W, C) for each EXIF orientation: transposed or not, then which axes are turned round
_TURNS: dict[int, tuple[bool, tuple[int, ...]]] = {
    2: (False, (1,)),
    3: (False, (0, 1)),
    4: (False, (0,)),
    5: (True, ()),
    6: (True, (1,)),
    7: (True, (0, 1)),
    8: (True, (0,)),
}
_INSTALL = "install tifffile, which reads all TIFFs: pip install tifffile (or hgkd's extra 'tiff')"


def decode_channels(file: BinaryIO, in_chans: int, value_range: Range | None = None) -> Tensor:
    """An open file as float32 (C, H, W) in [0, 1], upright by its EXIF orientation.

    Of ``.npy`` files arrays (H, W), (H, W, C) and (C, H, W) are read: the channels are the last axis where that has the length
    ``in_chans``, else the first. Of a TIFF with ``in_chans`` pages of one band each every page is a channel; of other TIFFs
    with
    several pages the first is read.

    Args:
        in_chans: C, which the file must have.
        value_range: (low, high), the values that become 0 and 1; what lies beyond is cut, NaN is low. None: 8 and 16 bits
            unsigned count as [0, 255] and [0, 65535], floats as [0, 1], which no value may exceed.

    Raises:
        BandsError: another number of channels, or of values whose range nobody has said.
        OSError: not an image, truncated.
        Exception: whatever else the decoders raise on damaged content.
    """
    values = channel_values(file, in_chans)
    scaled = np.empty(values.shape, dtype=np.float32)
    low, high = known_range(values) if value_range is None else value_range
    for channel in range(in_chans):  # one at a time: of a mapped array the others stay on the disk
        part: Values = values[..., channel].astype(np.float32 if values.dtype.itemsize <= 2 else np.float64)
        if values.dtype.kind == "f":
            part = np.nan_to_num(part, nan=low, posinf=high, neginf=low)
        scaled[..., channel] = np.clip((part - low) / (high - low), 0.0, 1.0)
    return torch.from_numpy(np.ascontiguousarray(scaled.transpose(2, 0, 1)))


def known_range(values: Values) -> Range:
    """The values of 0 and 1 where nobody has said them.

    Raises:
        BandsError: nothing but a guess would tell.
    """
    name = str(values.dtype)
    if name in _FULL:
        return 0.0, _FULL[name]
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if values.dtype.kind == "f" and low >= 0.0 and high <= 1.0:
        return 0.0, 1.0
    raise BandsError(
        f"{name} values from {low:.6g} to {high:.6g}, of which nothing tells what is dark and what is bright; say it with "
        f"value_range, e.g. value_range=[{low:.6g},{high:.6g}]"
    )


def channel_values(file: BinaryIO, in_chans: int) -> Values:
    """The values of an open file as stored, (H, W, C), upright; arguments and errors as for :func:`decode_channels`."""
    file.seek(0)
    magic = file.read(6)
    file.seek(0)
    if magic == _ARRAY_MAGIC:
        return _array_values(file, in_chans)
    values, turn = _tiff_values(file, in_chans) if magic.startswith(_TIFF_MAGICS) else _image_values(file)
    values = values if values.ndim == 3 else values[..., None]
    if values.shape[2] != in_chans:
        raise BandsError(_other_number(values.shape[2], in_chans))
    transposed, turned = _TURNS.get(turn, (False, ()))
    return np.flip(values.transpose(1, 0, 2) if transposed else values, turned)


def measure_channels(file: BinaryIO, in_chans: int, value_range: Range | None = None) -> Measured:
    """Lowest and highest value of an open file; raises as :func:`decode_channels`."""
    values = channel_values(file, in_chans)
    if value_range is None:
        known_range(values)  # refuses what nobody can know
    values = values[:: -(-len(values) // _MEASURED_ROWS)]
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    full = _FULL.get(str(values.dtype), 1.0)
    nans, cut = finite.size < values.size, share_beyond(values, value_range)
    return Measured(str(values.dtype), low, high, nans, low / full * 255, high / full * 255, bands=in_chans, cut=cut)


def _other_number(found: int, wanted: int) -> str:
    return (
        f"{found} channel{'s' if found > 1 else ''}, but in_chans={wanted}; set in_chans to the number that your files have, "
        "for data and student alike, or sort the files by it"
    )


# --- NumPy -----------------------------------------------------------------------------------------------------------------


def _array_values(file: BinaryIO, in_chans: int) -> Values:
    # a file is mapped, so that a large array is read as far as it is used; a member of a shard is in memory already
    name = getattr(file, "name", None)
    if isinstance(file, io.BytesIO) or not isinstance(name, (str, bytes)):
        values = np.load(file, allow_pickle=False)
    else:
        values = np.load(name, mmap_mode="r", allow_pickle=False)
    shape = values.shape
    if values.dtype.kind not in "buif":
        raise BandsError(f"an array of {values.dtype}, which are no pixels; save integers or floats")
    if values.ndim == 2:
        values = values[..., None]
    elif values.ndim == 3 and shape[2] != in_chans and shape[0] == in_chans:
        values = np.moveaxis(values, 0, 2)
    if values.ndim != 3 or values.shape[2] != in_chans or not values.size:
        raise BandsError(
            f"an array of shape {shape}, but in_chans={in_chans} needs (H, W, {in_chans}) or ({in_chans}, H, W)"
            + (", or (H, W)" if in_chans == 1 else "")
        )
    return values


# --- TIFF ------------------------------------------------------------------------------------------------------------------


def _tiff_values(file: BinaryIO, in_chans: int) -> tuple[Values, int]:
    """All bands, or one page a channel, and the orientation."""
    try:
        image = Image.open(file, formats=["TIFF"])
    except UnidentifiedImageError:
        return _by_tifffile(file, in_chans), 1
    with image:
        bands, frames = _bands(image), int(getattr(image, "n_frames", 1))
        paged = bands == 1 and in_chans > 1 and frames > 1
        if paged and frames != in_chans:
            raise BandsError(f"{frames} pages of one band each, but in_chans={in_chans}; every page would be a channel")
        whole = len(image.getbands()) == bands and not _is_packed_deep(image)
        if not whole or image.mode in ("P", "PA", "YCbCr", "CMYK", "LAB"):
            return _image_values(file) if image.mode in ("P", "PA", "YCbCr") else (_by_tifffile(file, in_chans), 1)
        pages = []
        for page in range(frames if paged else 1):
            image.seek(page)
            pages.append(_page_values(image))
        if len({(page.shape, page.dtype) for page in pages}) > 1:
            raise BandsError("pages of different sizes or types, which are no channels of one image")
        # Pillow has turned the pages upright itself
        return (np.stack(pages, axis=-1) if paged else pages[0]), 1


def _page_values(image: Image.Image) -> Values:
    values = _pillow_values(image.convert("L") if image.mode == "1" else image)
    if _is_white_zero(image) and _is_deep(image) and values.dtype.kind == "u":  # Pillow inverts 8 bits only
        values = np.iinfo(values.dtype).max - values
    return values


def _by_tifffile(file: BinaryIO, in_chans: int) -> Values:
    """Bands of a TIFF as stored, (H, W, C).

    Raises:
        BandsError: another number of bands; tifffile is not installed.
        OSError: cannot be read.
    """
    try:
        import tifffile
    except ImportError as error:
        raise BandsError(f"a TIFF that Pillow does not read without loss; {_INSTALL}") from error
    file.seek(0)
    try:
        with tifffile.TiffFile(file) as opened:
            pages = opened.pages
            first: Any = pages[0]
            paged = first.samplesperpixel == 1 and in_chans > 1 and len(pages) > 1
            if paged and len(pages) != in_chans:
                raise BandsError(f"{len(pages)} pages of one band each, but in_chans={in_chans}; every page would be a channel")
            # asked before it is decoded: a wrong file is told from its header
            if not paged and first.samplesperpixel != in_chans:
                raise BandsError(_other_number(int(first.samplesperpixel), in_chans))
            axes, values = ("SYX", opened.asarray(key=range(in_chans))) if paged else (first.axes, first.asarray())
    except BandsError:
        raise
    except Exception as error:  # its own errors, and imagecodecs, which some compressions need, by ValueError
        raise OSError(f"a TIFF that tifffile cannot read: {error}") from error
    if values.ndim == 2:
        values = values[..., None]
    elif axes.startswith("S"):
        values = np.moveaxis(values, 0, -1)
    orientation = 1
    with suppress(Exception):
        orientation = int(first.tags["Orientation"].value)
    transposed, turned = _TURNS.get(orientation, (False, ()))
    return np.flip(values.transpose(1, 0, 2) if transposed else values, turned)


# --- all others ------------------------------------------------------------------------------------------------------------


def _image_values(file: BinaryIO) -> tuple[Values, int]:
    """All bands of what Pillow knows, (H, W) or (H, W, C) in the order RGBA, and the orientation."""
    file.seek(0)
    with Image.open(file, formats=FORMATS) as image:
        packed = _is_packed_deep(image)  # before the orientation, for which a PNG is loaded
        turn = 1 if isinstance(image, TiffImagePlugin.TiffImageFile) else _orientation(image)
        if packed:
            return _cv2_values(file), turn
        image.load()
        if _is_deep(image):
            return _pillow_values(image), turn
        if image.mode in ("P", "PA", "1", "YCbCr"):  # numbers of colours, or another coding of RGB
            plain = image.convert("L" if image.mode == "1" else "RGBA" if image.has_transparency_data else "RGB")
            return np.asarray(plain), turn
        return np.asarray(image), turn
