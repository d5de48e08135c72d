"""All channels of a file as floats: bit depths, layouts, orientation, and what is refused."""

import io
import sys
import tarfile

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from test_pixel_depth import write_tiff

from hgkd.data import LabelledImages, UnlabelledImages
from hgkd.data.channels import decode_channels
from hgkd.data.images import read_crops
from hgkd.data.pixels import BandsError
from hgkd.errors import DataError, code_of

RANDOM = np.random.default_rng(0)
RGB16 = RANDOM.integers(0, 65536, (20, 24, 3), dtype=np.uint16)


def read(path, in_chans, value_range=None):
    with open(path, "rb") as file:
        return decode_channels(file, in_chans, value_range)


def expect(values, high):
    """(H, W, C) -> what is to be read, by division alone."""
    return torch.from_numpy((values.astype(np.float64) / high).astype(np.float32)).permute(2, 0, 1)


@pytest.fixture
def folder(tmp_path):
    """Four arrays of 8 channels, 16 bits."""
    for number in range(4):
        np.save(tmp_path / f"{number}.npy", RANDOM.integers(0, 4096, (40, 48, 8), dtype=np.uint16))
    return tmp_path


# What is read


def test_a_png_of_16_bits_keeps_all_of_them_and_its_order_of_colours(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), RGB16[..., ::-1])  # OpenCV writes BGR
    torch.testing.assert_close(read(tmp_path / "a.png", 3), expect(RGB16, 65535), rtol=0, atol=1e-7)
    grey = RGB16[..., :1]
    Image.fromarray(grey[..., 0]).save(tmp_path / "b.png")
    torch.testing.assert_close(read(tmp_path / "b.png", 1), expect(grey, 65535), rtol=0, atol=1e-7)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_pictures_of_8_bits_give_every_band_as_it_is(tmp_path, mode):
    values = RANDOM.integers(0, 256, (20, 24, len(mode)), dtype=np.uint8)
    Image.fromarray(values[..., 0] if mode == "L" else values).save(tmp_path / "a.png")
    assert torch.equal(read(tmp_path / "a.png", len(mode)), expect(values, 255))


def test_arrays_in_both_orders_of_axes(tmp_path):
    values = RANDOM.integers(0, 65536, (20, 24, 8), dtype=np.uint16)
    np.save(tmp_path / "hwc.npy", values)
    np.save(tmp_path / "chw.npy", values.transpose(2, 0, 1))
    np.save(tmp_path / "hw.npy", values[..., 0])
    np.save(tmp_path / "both.npy", values[:8])  # (8, 24, 8): the last axis counts
    torch.testing.assert_close(read(tmp_path / "hwc.npy", 8), expect(values, 65535), rtol=0, atol=1e-7)
    assert torch.equal(read(tmp_path / "chw.npy", 8), read(tmp_path / "hwc.npy", 8))
    assert torch.equal(read(tmp_path / "hw.npy", 1)[0], read(tmp_path / "hwc.npy", 8)[0])
    assert torch.equal(read(tmp_path / "both.npy", 8), read(tmp_path / "hwc.npy", 8)[:, :8])


def test_a_value_range_holds_for_every_type_and_cuts_what_is_beyond(tmp_path):
    values = np.array([[[-100.0], [0.0], [50.0], [100.0], [1e9], [np.nan]]])
    np.save(tmp_path / "a.npy", values)
    assert read(tmp_path / "a.npy", 1, (0, 100)).flatten().tolist() == [0, 0, 0.5, 1, 1, 0]
    np.save(tmp_path / "b.npy", np.array([[-1000, 1000]], dtype=np.int16))
    assert read(tmp_path / "b.npy", 1, (-1000, 3000)).flatten().tolist() == [0, 0.5]
    np.save(tmp_path / "c.npy", np.array([[0, 51]], dtype=np.uint8))
    assert read(tmp_path / "c.npy", 1, (0, 102)).flatten().tolist() == [0, 0.5]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_that_of_pillow(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    values = RANDOM.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png", exif=exif)
    from hgkd.data.images import read_rgb

    assert torch.equal(read(tmp_path / "a.png", 3), expect(np.asarray(read_rgb(tmp_path / "a.png")), 255))


def test_pages_of_one_band_are_channels_where_there_are_as_many(tmp_path):
    values = RANDOM.integers(0, 65536, (20, 24, 4), dtype=np.uint16)
    pages = [Image.fromarray(np.ascontiguousarray(values[..., i])) for i in range(4)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    torch.testing.assert_close(read(tmp_path / "a.tif", 4), expect(values, 65535), rtol=0, atol=1e-7)
    torch.testing.assert_close(read(tmp_path / "a.tif", 1), expect(values[..., :1], 65535), rtol=0, atol=1e-7)
    with pytest.raises(BandsError, match="4 pages of one band each, but in_chans=8"):
        read(tmp_path / "a.tif", 8)


@pytest.mark.parametrize("kind", ["u1", "u2", "f4"])
@pytest.mark.parametrize("bands", [1, 2, 4, 8])
def test_tiffs_of_any_number_of_bands(tmp_path, kind, bands):
    if bands > 1:
        pytest.importorskip("tifffile")
    values = RANDOM.random((20, 24, bands))
    values = (values * {"u1": 255, "u2": 65535, "f4": 1}[kind]).astype(kind)
    high = {"u1": 255, "u2": 65535, "f4": 1}[kind]
    file = write_tiff(tmp_path / "a.tif", values, photometric=1)
    torch.testing.assert_close(read(file, bands), expect(values, high), rtol=0, atol=1e-7)


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_tiffs_as_tifffile_writes_them(tmp_path, planar, compression):
    tifffile = pytest.importorskip("tifffile")
    values = RANDOM.integers(0, 65536, (20, 24, 5), dtype=np.uint16)
    stored = values if planar == "contig" else values.transpose(2, 0, 1)
    options = dict(planarconfig=planar, photometric="minisblack", compression=compression)
    tifffile.imwrite(tmp_path / "a.tif", stored, **options)
    torch.testing.assert_close(read(tmp_path / "a.tif", 5), expect(values, 65535), rtol=0, atol=1e-7)


def test_without_tifffile_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tifffile", None)
    file = write_tiff(tmp_path / "a.tif", np.zeros((4, 4, 8), np.uint16), photometric=1)
    with pytest.raises(BandsError, match="pip install tifffile"):
        read(file, 8)


# What is refused


@pytest.mark.parametrize(
    ("values", "in_chans", "told"),
    [
        (np.zeros((5, 6, 3), np.uint8), 4, r"shape \(5, 6, 3\), but in_chans=4 needs \(H, W, 4\) or \(4, H, W\)"),
        (np.zeros((2, 4, 6, 3), np.uint8), 3, r"shape \(2, 4, 6, 3\)"),
        (np.zeros((4, 6), complex), 1, "array of complex128, which are no pixels"),
        (np.array([[0.0, 300.0]]), 1, r"float64 values from 0 to 300.*value_range=\[0,300\]"),
        (np.array([[-5, 7]]), 1, r"int64 values from -5 to 7.*value_range"),
    ],
)
def test_arrays_that_are_no_such_images(tmp_path, values, in_chans, told):
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(BandsError, match=told):
        read(tmp_path / "a.npy", in_chans)


def test_an_array_of_python_objects_is_not_opened(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"Python objects|allow_pickle=False"):
        read(tmp_path / "a.npy", 1)


def test_pictures_of_another_number_of_channels(tmp_path):
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    with pytest.raises(BandsError, match=r"3 channels, but in_chans=4"):
        read(tmp_path / "a.png", 4)
    with pytest.raises(DataError, match=r"with in_chans=4, e.g. .*3 channels, but in_chans=4") as error:
        UnlabelledImages(tmp_path, in_chans=4)
    assert code_of(error.value) == "images-of-other-channels"


@pytest.mark.parametrize("in_chans", [0, -1, 2.0, "4", True])
def test_a_number_of_channels_that_is_none(folder, in_chans):
    with pytest.raises(ValueError, match="in_chans is the number of channels of the images, a whole number from 1"):
        UnlabelledImages(folder, in_chans=in_chans)


def test_an_array_without_a_number_of_channels(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 6, 8)))
    (tmp_path / "a.npy").rename(tmp_path / "a.png")
    with pytest.raises(DataError, match="NumPy array, which is read where in_chans says"):
        UnlabelledImages(tmp_path)


# Data sets


def test_a_data_set_gives_floats_of_all_channels(folder):
    data = UnlabelledImages(folder, image_size=32, in_chans=8, value_range=(0, 4095))
    inputs = data[0]["inputs"]
    assert (inputs.shape, inputs.dtype) == ((8, 32, 32), torch.float32)
    assert 0 <= inputs.min() < 0.1 < 0.9 < inputs.max() <= 1
    assert data.reading == {"channels": 8, "rules": 1, "value_range": (0.0, 4095.0)}
    again = read_crops([folder / "0.npy"], 40, (0, 4095), in_chans=8)
    values = np.load(folder / "0.npy")[:, 4:44]  # the centre of 40 x 48
    torch.testing.assert_close(again[0], expect(values, 4095), rtol=0, atol=1e-6)


def test_crops_and_flips_are_the_same_for_all_channels(tmp_path):
    one = RANDOM.random((40, 48, 1)).astype(np.float32)
    np.save(tmp_path / "a.npy", np.repeat(one, 5, axis=2))
    data = UnlabelledImages(tmp_path, image_size=16, in_chans=5, transform=dict(scale=(0.2, 0.5), hflip=0.5))
    inputs = torch.stack([data[0]["inputs"] for _ in range(4)])
    assert torch.equal(inputs, inputs[:, :1].expand_as(inputs))
    assert len({tuple(image[0, 0].tolist()) for image in inputs}) > 1  # drawn anew each time


def test_labelled_arrays_and_arrays_in_shards(folder, tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        np.save(tmp_path / "classes" / name / "a.npy", RANDOM.random((8, 8, 2)))
    data = LabelledImages(tmp_path / "classes", image_size=8, in_chans=2)
    assert (data.classes, data[1]["inputs"].shape, data[1]["label"]) == (["ant", "bee"], (2, 8, 8), 1)
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards/0.tar", "w") as shard:
        for file in sorted(folder.glob("*.npy")):
            shard.add(file, arcname=file.name)
    options = dict(image_size=32, in_chans=8, value_range=(0, 4095), transform=dict(kind="eval"))
    packed = UnlabelledImages(tmp_path / "shards", **options)
    plain = UnlabelledImages(folder, list_file=_list(folder), **options)
    assert torch.equal(packed[2]["inputs"], plain[2]["inputs"])


def _list(folder):
    (folder / "list.txt").write_text("".join(f"{number}.npy\n" for number in range(4)))
    return folder / "list.txt"


def test_a_damaged_array_is_replaced_and_counted(folder):
    content = (folder / "1.npy").read_bytes()
    (folder / "1.npy").write_bytes(content[: len(content) // 2])
    data = UnlabelledImages(folder, image_size=32, in_chans=8, max_bad_share=0.5)
    assert data[1]["index"] == 2
    assert data.bad_files() == [str(folder / "1.npy")]


@pytest.mark.parametrize(
    ("options", "told"),
    [(dict(kind="augment"), "kind 'augment' is timm's"), (dict(color_jitter=0.4), "color_jitter=0.4 changes colours")],
)
def test_augmentation_that_is_for_rgb(folder, options, told):
    with pytest.raises(ValueError, match=told) as error:
        UnlabelledImages(folder, in_chans=8, transform=options)
    assert code_of(error.value) == "augmentation-for-rgb"


# Values that are dark, or beyond the range


def test_nearly_black_pictures_are_told_before_a_run(folder, log):
    def told(value_range):
        log.records.clear()
        UnlabelledImages(folder, in_chans=8, value_range=value_range)
        return " ".join(record.getMessage() for record in log.records)

    assert "hold uint16 values from 0 to 409" in told(None)  # 12 bits in 16
    assert told((0, 4095)) == ""
    assert "fill the lowest 6.8% of value_range=[0,60000] only: the pictures are nearly black" in told((0, 60000))
    assert "value_range=[0,2048] cuts off 50% of them" in told((0, 2048))


@pytest.mark.parametrize(("value_range", "colour"), [((5000, 9000), "black"), ((-9, -1), "white")])
def test_a_value_range_that_the_data_never_reaches(folder, value_range, colour):
    with pytest.raises(ValueError, match=f"makes every image {colour}: .* values from 0 to 409.; set value_range") as error:
        UnlabelledImages(folder, in_chans=8, value_range=value_range)
    assert code_of(error.value) == "value-range-misses-the-data"


def test_the_same_of_grey_images_that_are_read_as_rgb(tmp_path, log):
    Image.fromarray(RANDOM.integers(0, 4096, (20, 24), dtype=np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"makes every image black"):
        UnlabelledImages(tmp_path, value_range=(5000, 9000))
    UnlabelledImages(tmp_path, value_range=(0, 65535))
    assert log.told("nearly black")


def test_an_array_from_memory_is_the_one_of_the_file(folder):
    content = io.BytesIO((folder / "0.npy").read_bytes())
    assert torch.equal(decode_channels(content, 8), read(folder / "0.npy", 8))
