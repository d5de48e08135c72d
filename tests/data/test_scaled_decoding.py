"""JPEGs decoded at a part of their sides: nearly the same crops, the same draws, and nothing else changed."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused

from hgkd.data import LabelledImages, SeededIndex, UnlabelledImages
from hgkd.data.pixels import decode
from hgkd.data.transforms import shrink_of
from hgkd.errors import InvalidValueError


def photograph(seed: int, width: int, height: int) -> Image.Image:
    """Smooth colours with edges of all sizes, as photographs have them."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for cells in (3, 9, 27, 81):
        grid = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC)) / 4
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture
def photographs(tmp_path):
    for seed, size in enumerate([(640, 480), (480, 640), (800, 500), (90, 60)]):
        (tmp_path / "c").mkdir(exist_ok=True)
        exif = Image.Exif()
        exif[0x0112] = 6 if seed == 1 else 1
        photograph(seed, *size).save(tmp_path / f"c/{seed}.jpg", quality=92, exif=exif)
    photograph(9, 600, 600).save(tmp_path / "c/4.png")
    return tmp_path


@pytest.mark.parametrize("transform", [{"kind": "train"}, {"kind": "train", "scale": (0.3, 1.0)}, {"kind": "eval"}])
@pytest.mark.parametrize("size", [32, (24, 48)])
def test_crops_are_nearly_those_of_the_whole_image(photographs, transform, size):
    exact, scaled = (
        UnlabelledImages(photographs, image_size=size, transform=transform, scaled_decoding=on) for on in (False, True)
    )
    smaller = [scaled.image(i).size != exact.image(i).size for i in range(5)]
    assert not smaller[3]  # already small
    assert not smaller[4]  # no JPEG
    assert all(smaller[:3])
    for i in range(5):
        whole, part = (data[SeededIndex(i, 5)]["inputs"].float() for data in (exact, scaled))
        assert whole.shape == part.shape
        assert (whole - part).abs().mean() < 1.5 if smaller[i] else torch.equal(whole, part)


def test_the_sides_are_divided_by_two_four_or_eight_and_stay_long_enough(photographs):
    for size, step in ((30, 8), (59, 4), (100, 2), (121, 1)):
        dataset = LabelledImages(photographs, image_size=size, scaled_decoding=True)
        found = dataset.image(0).size
        assert found == (-(-640 // step), -(-480 // step))
        assert min(found) >= 2 * size or step == 1
    turned = LabelledImages(photographs, image_size=(59, 80), scaled_decoding=True).image(1)
    assert turned.size == (160, 120)  # stored 480 x 640, upright 640 x 480


def test_how_much_smaller_follows_from_the_smallest_crop():
    eval_shrink = shrink_of((100, 200), {"kind": "eval"})
    assert eval_shrink(800, 800) == pytest.approx(2)
    assert shrink_of(100, {"kind": "eval"}, 1.25)(800, 800) == pytest.approx(800 / 125 / 2)
    train = shrink_of(100, {"scale": (0.25, 1.0), "ratio": (1.0, 1.0)})
    assert train(800, 800) == pytest.approx(2)
    assert train(1600, 400) == pytest.approx(2)


def test_without_the_option_nothing_changes(photographs):
    file = io.BytesIO((photographs / "c/0.jpg").read_bytes())
    whole = np.asarray(Image.open(photographs / "c/0.jpg"))
    assert np.array_equal(np.asarray(decode(file)), whole)
    exact, scaled = (UnlabelledImages(photographs, image_size=16, scaled_decoding=on) for on in (False, True))
    assert "scaled_decoding" not in exact.reading
    assert scaled.reading == {**exact.reading, "scaled_decoding": True}  # stores of features are told apart
    with refused(InvalidValueError, "scaled-decoding-for-rgb", "3"):
        UnlabelledImages(photographs, image_size=16, in_chans=3, scaled_decoding=True)
    with refused(InvalidValueError, "scaled-decoding-of-other-crops", "augment"):
        LabelledImages(photographs, image_size=16, transform={"kind": "augment"}, scaled_decoding=True)
