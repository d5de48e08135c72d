"""Depth, bands, transparency and orientation: what becomes of a file's values, and what is told before a run."""

import io
import struct

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from refusals import refused

from hgkd.data import LabelledImages, UnlabelledImages
from hgkd.data.images import read_rgb
from hgkd.data.pixels import _to_bytes, as_value_range, decode, measure
from hgkd.errors import DataError

RAMP = np.linspace(0, 1, 64 * 48).reshape(48, 64)
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]], axis=-1)


def write_tiff(path, values, alpha=0, orientation=1, photometric=None):
    """A plain TIFF of any type and number of bands; ``alpha=2`` tags the bands after the third as transparency."""
    values = values[..., None] if values.ndim == 2 else values
    height, width, bands = values.shape
    colours = 3 if bands >= 3 else 1
    photometric = {3: 2, 1: 1}[colours] if photometric is None else photometric
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    data, beyond, entries = values.tobytes(), b"", []
    for tag, code, numbers in (
        *((256, "I", [width]), (257, "I", [height]), (258, "H", [8 * values.dtype.itemsize] * bands), (259, "H", [1])),
        *((262, "H", [photometric]), (273, "I", [8]), (274, "H", [orientation]), (277, "H", [bands])),
        *((278, "I", [height]), (279, "I", [len(data)]), (284, "H", [1])),
        *([(338, "H", [alpha] * (bands - colours))] if bands > colours else []),
        (339, "H", [kind] * bands),
    ):
        raw = struct.pack(f"<{len(numbers)}{code}", *numbers)
        if len(raw) > 4:
            raw, beyond = struct.pack("<I", 8 + len(data) + len(beyond)), beyond + raw
        entries.append(struct.pack("<HHI", tag, {"H": 3, "I": 4}[code], len(numbers)) + raw.ljust(4, b"\0"))
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    path.write_bytes(struct.pack("<2sHI", b"II", 42, 8 + len(data) + len(beyond)) + data + beyond + directory)
    return path


def pixels(path, *options):
    return np.asarray(read_rgb(path, *options)).astype(int)


# Depth


DEEP = {
    "12 bits in 16": ((RAMP * 4095).astype("u2"), (0, 4095)),
    "signed": ((RAMP * 4000 - 1000).astype("i2"), (-1000, 3000)),
    "signed bytes": ((RAMP * 255 - 128).astype("i1"), (-128, 127)),
    "uint32": ((RAMP * 4e9).astype("u4"), (0, 4e9)),
    "int32": ((RAMP * 1e5 - 5e4).astype("i4"), (-5e4, 5e4)),
    "float": ((RAMP * 3000).astype("f4"), (0, 3000)),
    "float64": ((RAMP - 0.5).astype("f8"), (-0.5, 0.5)),
    "colours of 12 bits in 16": ((COLOURS * 4095).astype("u2"), (0, 4095)),
    "colours, signed": ((COLOURS * 4000 - 1000).astype("i2"), (-1000, 3000)),
    "colours, float": ((COLOURS * 20).astype("f4"), (0, 20)),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_images_are_measured_told_and_read_by_their_range(name, tmp_path, log):
    """12 of 16 bits used to train as black images without a word (https://github.com/python-pillow/Pillow/issues/3011)."""
    values, (low, high) = DEEP[name]
    write_tiff(tmp_path / "a.tif", values)
    UnlabelledImages(tmp_path, image_size=8)
    (line,) = log.told("images looked at hold")
    kind = "int" if name == "signed" else str(values.dtype)  # Pillow has no signed 16 bits
    assert f"hold {kind}" in line.getMessage()
    assert f"values from {low:.6g} to {high:.6g}" in line.getMessage()
    assert f"value_range=[{low:.6g},{high:.6g}]" in line.getMessage()
    expected = RAMP if values.ndim == 2 else COLOURS
    expected = np.broadcast_to(expected[..., None] if values.ndim == 2 else expected, (48, 64, 3)) * 255
    assert np.abs(pixels(tmp_path / "a.tif", (low, high)) - expected).max() <= 1.01
    # and the remedy, as it was told
    log.records.clear()
    dataset = UnlabelledImages(tmp_path, image_size=[48, 64], transform={"kind": "eval"}, value_range=[low, high])
    assert not log.records
    assert np.abs(dataset[0]["inputs"].permute(1, 2, 0).numpy() - expected).max() <= 1.01


@pytest.mark.parametrize("colours", [False, True])
def test_deep_png(colours, tmp_path):
    values = ((COLOURS if colours else RAMP) * 1023).astype("u2")
    assert cv2.imwrite(str(tmp_path / "a.png"), values[..., ::-1] if colours else values)
    found = pixels(tmp_path / "a.png", (0.0, 1023.0))
    assert np.abs(found - (COLOURS if colours else RAMP[..., None]) * 255).max() <= 1.01
    assert pixels(tmp_path / "a.png").max() <= 4


@pytest.mark.parametrize("kind", ["u1", "u2"])
def test_white_is_zero(kind, tmp_path):
    """Pillow heeds it in 8 bits only; scanners and X-ray devices write it (Pillow issue 4804 for what it means)."""
    write_tiff(tmp_path / "a.tif", (RAMP * np.iinfo(kind).max).astype(kind), photometric=0)
    for options in ((), ((0.0, 65535.0),)):
        assert np.abs(pixels(tmp_path / "a.tif", *options) - (1 - RAMP[..., None]) * 255).max() <= 1


def test_pages_beyond_the_first_are_told(tmp_path, log):
    """Stacks of microscopes (https://github.com/ray-project/ray/issues/42643)."""
    pages = [Image.new("L", (8, 8), 60 * i) for i in range(4)]
    pages[1].save(tmp_path / "a.tif", save_all=True, append_images=pages)
    pages[1].save(tmp_path / "b.tif")
    UnlabelledImages(tmp_path, image_size=8)
    assert log.told("1 of 2 images looked at have several frames or pages, of which the first is read")
    assert read_rgb(tmp_path / "a.tif").getpixel((0, 0)) == (60, 60, 60)


def test_usual_images_are_told_nothing_and_have_no_range(tmp_path, log):
    Image.fromarray((COLOURS * 255).astype("u1")).save(tmp_path / "a.png")
    Image.fromarray((RAMP * 65535).astype("u2")).save(tmp_path / "b.png")
    write_tiff(tmp_path / "c.tif", RAMP.astype("f4"))
    UnlabelledImages(tmp_path, image_size=8)
    assert not log.told("looked at")
    plain, ranged = pixels(tmp_path / "a.png"), pixels(tmp_path / "a.png", (0.0, 4095.0))
    assert np.array_equal(plain, ranged)  # 8 bits are not concerned


def test_a_float_image_that_is_dark_by_its_own_rule_is_told(tmp_path, log):
    write_tiff(tmp_path / "a.tif", RAMP.astype("f4"))
    write_tiff(tmp_path / "b.tif", (RAMP * 1.2).astype("f4"))  # beyond 1, so read as 0..255
    UnlabelledImages(tmp_path, image_size=8)
    assert "value_range=[0,1.2]" in log.told("2 of 2 images looked at hold float32")[0].getMessage()


def test_not_a_number_is_black_and_told(tmp_path, log):
    values = (RAMP * 100).astype("f4")
    values[0, 0], values[1, 1] = np.nan, np.inf
    write_tiff(tmp_path / "a.tif", values)
    UnlabelledImages(tmp_path, image_size=8)
    # the range is that of the finite values, and infinity is beyond it
    assert measure(io.BytesIO((tmp_path / "a.tif").read_bytes())).nans
    found = pixels(tmp_path / "a.tif", (0.0, 100.0))
    assert found[0, 0].tolist() == [0, 0, 0]
    assert found[1, 1].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("value", "error", "refusal"),
    [
        (4095, TypeError, ("value-range-not-a-pair", "value_range")),
        ((0, 1, 2), TypeError, ("value-range-not-a-pair", "value_range")),
        (("0", "1"), TypeError, ("value-range-not-a-pair", "value_range")),
        ((5, 5), ValueError, ("value-range-empty",)),
        ((0, float("nan")), ValueError, ("value-range-empty",)),
    ],
)
def test_ranges_that_are_none(value, error, refusal, tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    with refused(error, *refusal):
        UnlabelledImages(tmp_path, value_range=value)


def test_a_range_from_a_config_is_a_list():
    assert as_value_range([0, 4095]) == (0.0, 4095.0)
    assert as_value_range(None) is None


# Bands


@pytest.mark.parametrize("kind", ["u1", "u2"])
def test_bands_are_counted(kind, tmp_path):
    """Satellites' images used to be "damaged" (https://github.com/python-pillow/Pillow/issues/1888)."""
    for n in range(3):
        write_tiff(tmp_path / f"{n}.tif", np.zeros((8, 8, 8), kind))
    with refused(DataError, "images-with-other-bands", "3", "0", "8", "gdal_translate"):
        UnlabelledImages(tmp_path)


def test_one_of_many_is_skipped_with_its_reason(tmp_path, log):
    for n in range(19):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{n:02}.png")
    write_tiff(tmp_path / "a.tif", np.zeros((8, 8, 13), "u2"))
    dataset = UnlabelledImages(tmp_path, image_size=8)
    assert dataset[19]["index"] == 0
    assert "13 bands of 16-bit unsigned integers" in log.told("skipping")[0].getMessage()


def test_bands_beyond_the_colours_are_told(tmp_path, log):
    write_tiff(tmp_path / "a.tif", (np.concatenate([COLOURS, RAMP[..., None]], axis=-1) * 255).astype("u1"))
    UnlabelledImages(tmp_path, image_size=8)
    assert log.told("1 of 1 images looked at have 4 bands and no transparency; the last 1 of them are left out")
    assert np.abs(pixels(tmp_path / "a.tif") - COLOURS * 255).max() <= 1


# Transparency


@pytest.mark.parametrize("kind", ["u1", "u2"])
def test_a_fourth_band_that_is_tagged_as_transparency(kind, tmp_path, log):
    top = np.iinfo(kind).max
    write_tiff(tmp_path / "a.tif", (np.concatenate([COLOURS, 0 * RAMP[..., None]], axis=-1) * top).astype(kind), alpha=2)
    assert pixels(tmp_path / "a.tif").min() == 255
    UnlabelledImages(tmp_path, image_size=8)
    (line,) = log.told("hides 100% of their pixels")
    assert "use_alpha=False" in line.getMessage()
    log.records.clear()
    dataset = UnlabelledImages(tmp_path, image_size=[48, 64], transform={"kind": "eval"}, use_alpha=False)
    assert not log.records
    assert np.abs(dataset[0]["inputs"].permute(1, 2, 0).numpy() - COLOURS * 255).max() <= 1.5


def test_a_cut_out_object_is_no_surprise(tmp_path, log):
    image = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    image.paste((200, 10, 10, 255), (15, 15, 25, 25))
    image.save(tmp_path / "a.png")
    UnlabelledImages(tmp_path, image_size=8)
    assert not log.told("transparency")


# Orientation


def corner(orientation, path, **options):
    """Where the bright corner of an image of 6 x 4 pixels, bright at the top left as stored, is shown."""
    image = np.zeros((4, 6, 3), dtype=np.uint8)
    image[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    tags = {"tiffinfo": {0x0112: orientation}} if path.suffix == ".tif" else {"exif": exif}
    Image.fromarray(image).save(path, **tags, **options)
    shown = pixels(path)[..., 0]
    return shown.shape, tuple(int(i) for i in np.unravel_index(shown.argmax(), shown.shape))


UPRIGHT = {1: ((4, 6), (0, 0)), 2: ((4, 6), (0, 5)), 3: ((4, 6), (3, 5)), 4: ((4, 6), (3, 0))}
UPRIGHT |= {5: ((6, 4), (0, 0)), 6: ((6, 4), (0, 3)), 7: ((6, 4), (5, 3)), 8: ((6, 4), (5, 0))}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_images_are_upright(orientation, tmp_path):
    """Photographs of telephones lay down (https://github.com/pytorch/vision/issues/7977)."""
    lossless = {"a.jpg": {"quality": 100, "subsampling": 0}, "a.png": {}, "a.webp": {"lossless": True}, "a.tif": {}}
    for name, options in lossless.items():
        assert corner(orientation, tmp_path / name, **options) == UPRIGHT[orientation], name


def test_all_ways_to_the_pixels_are_upright(tmp_path):
    from hgkd.data.images import read_crops

    (tmp_path / "ant").mkdir()
    corner(6, tmp_path / "ant/a.png")
    for dataset in (
        UnlabelledImages(tmp_path, image_size=[6, 4], transform={"kind": "eval"}),
        LabelledImages(tmp_path, [6, 4]),
    ):
        assert dataset[0]["inputs"][0, 0].tolist() == [0, 0, 0, 255]
        assert dataset.reading == {"rules": 2, "value_range": None, "use_alpha": True}
    assert read_crops([tmp_path / "ant/a.png"], [6, 4])[0, 0, 0].tolist() == [0, 0, 0, 255]


@pytest.mark.parametrize("orientation", [3, 6])
def test_deep_images_are_upright(orientation, tmp_path):
    image = np.zeros((4, 6), dtype=np.uint16)
    image[0, 0] = 65535
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    write_tiff(tmp_path / "a.tif", image, orientation=orientation)
    for name in ("a.png", "a.tif"):
        for options in ((), ((0.0, 65535.0),)):
            shown = pixels(tmp_path / name, *options)[..., 0]
            assert (shown.shape, tuple(np.argwhere(shown)[0])) == UPRIGHT[orientation]


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["u2", "f4"])
def test_deep_colours_are_upright(kind, orientation, tmp_path):
    image = np.zeros((4, 6, 3), dtype=kind)
    image[0, 0] = 1000
    write_tiff(tmp_path / "a.tif", image, orientation=orientation)
    shown = pixels(tmp_path / "a.tif", (0.0, 1000.0))[..., 0]
    assert (shown.shape, tuple(np.argwhere(shown)[0])) == UPRIGHT[orientation]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"garbage", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12"]
)
def test_damaged_exif_costs_no_picture(exif, tmp_path):
    Image.new("RGB", (6, 4), "white").save(tmp_path / "a.jpg", exif=exif)
    assert read_rgb(tmp_path / "a.jpg").size == (6, 4)


def test_a_shards_images_are_upright(tmp_path):
    content = io.BytesIO()
    corner(8, tmp_path / "a.png")
    content.write((tmp_path / "a.png").read_bytes())
    assert decode(content).size == (4, 6)


@given(
    values=arrays(np.int32, st.tuples(st.integers(1, 600), st.integers(1, 3)), elements=st.integers(-(2**31), 2**31 - 1)),
    ends=st.tuples(st.integers(-(2**31), 2**31 - 2), st.integers(1, 2**31)),
)
def test_brightness_grows_with_the_value_and_ends_where_it_is_said(values, ends):
    low, high = float(ends[0]), float(ends[0] + ends[1])
    found = _to_bytes(values, (low, high)).ravel()
    order = np.argsort(values, axis=None)
    assert (np.diff(found[order].astype(int)) >= 0).all()
    assert (found[values.ravel() <= low] == 0).all()
    assert (found[values.ravel() >= high] == 255).all()
