"""Options, sizes and randomness of the image transforms."""

import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused
from torchvision.transforms import v2

from hgkd.data.transforms import as_size, augment_transform, build_transform, eval_transform, train_transform


def noise_image(width: int = 80, height: int = 60) -> Image.Image:
    pixels = np.random.Generator(np.random.PCG64(3)).integers(0, 256, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("given", "expected"), [(32, (32, 32)), ((16, 48), (16, 48)), ([8, 4], (8, 4))])
def test_as_size(given, expected):
    assert as_size(given) == expected


@pytest.mark.parametrize("given", [True, 3.5, "32", (1, 2, 3), (1.5, 2), None, (True, 4)])
def test_as_size_refuses_other_types(given):
    with refused(TypeError, "image-size-not-a-size"):
        as_size(given)


@pytest.mark.parametrize("given", [0, (16, -1)])
def test_as_size_refuses_empty_images(given):
    with refused(ValueError, "image-size-not-positive", "1"):
        as_size(given)


@pytest.mark.parametrize("size", [(32, 32), (24, 40)])
@pytest.mark.parametrize("shape", [(80, 60), (60, 80), (10, 10), (1, 1), (32, 1)])
def test_results_are_uint8_of_the_asked_size(size, shape):
    for transform in (train_transform(size, color_jitter=0.4), eval_transform(size, resize_ratio=1.2)):
        result = transform(noise_image(*shape))
        assert result.dtype == torch.uint8
        assert result.shape == (3, *size)


def test_only_torchs_generator_decides():
    transform, image = train_transform(32, color_jitter=0.4), noise_image()
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        random.seed(len(results))
        np.random.seed(len(results))
        results.append(transform(image))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_train_options_act():
    image = noise_image(40, 40)
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    plain = train_transform(40, hflip=0.0, **whole)(image)
    assert torch.equal(plain, v2.functional.pil_to_tensor(image))  # bicubic to the same size changes nothing
    assert torch.equal(train_transform(40, hflip=1.0, **whole)(image), plain.flip(-1))
    assert not torch.equal(train_transform(40, hflip=0.0, color_jitter=0.4, **whole)(image), plain)


def test_crop_scale_is_a_share_of_the_area():
    # columns hold their own number, so the range of a crop tells its width
    ramp = Image.fromarray(np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (200, 200, 3)).copy())
    crop = train_transform(100, scale=(0.25, 0.25), ratio=(1.0, 1.0), hflip=0.0)
    for _ in range(5):
        result = crop(ramp).int()
        assert int(result.max() - result.min()) in range(98, 101)


@pytest.mark.parametrize("shape", [(80, 60), (60, 80), (33, 57)])
@pytest.mark.parametrize("resize_ratio", [1.0, 1.25])
def test_eval_agrees_with_torchvision(shape, resize_ratio):
    image = noise_image(*shape)
    resize = v2.Resize(round(24 * resize_ratio), interpolation=v2.InterpolationMode.BICUBIC)
    expected = v2.Compose([resize, v2.CenterCrop(24), v2.PILToTensor()])(image)
    assert torch.equal(eval_transform(24, resize_ratio)(image), expected)


def test_eval_of_a_long_strip_shows_its_centre():
    strip = np.zeros((2, 20000, 3), dtype=np.uint8)
    strip[:, 9900:10100] = 255
    assert eval_transform(16)(Image.fromarray(strip)).min() == 255


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"hflp": 0.1}, ("transform-option-unknown", "train", "hflp", "hflip")),
        ({"image_size": 3}, ("transform-option-unknown", "image_size")),
        ({"kind": "eval", "resize_ration": 1.1}, ("transform-option-unknown", "eval", "resize_ration", "resize_ratio")),
        ({"kind": "evl"}, ("transform-kind-unknown", "evl", "eval")),
        ({"scale": (0.0, 1.0)}, ("range-empty", "scale")),
        ({"scale": (0.5, 1.5)}, ("crop-scale-out-of-range", "1")),
        ({"ratio": (2.0, 1.0)}, ("range-empty", "ratio")),
        ({"hflip": 1.5}, ("flip-out-of-range",)),
        ({"color_jitter": -0.1}, ("color-jitter-negative", "color_jitter", "0")),
        ({"kind": "eval", "resize_ratio": 0.5}, ("resize-ratio-too-small", "resize_ratio", "1")),
    ],
)
def test_refusals(options, refusal):
    kept = dict(options)
    with refused(ValueError, *refusal):
        build_transform(32, options)
    assert options == kept


def test_a_pair_is_two_numbers():
    with refused(TypeError, "range-not-a-pair", "scale"):
        build_transform(32, {"scale": 0.5})


def test_build_transform_kinds():
    image = noise_image()
    assert torch.equal(build_transform(32, {"kind": "eval"})(image), eval_transform(32)(image))
    torch.manual_seed(5)
    expected = train_transform(32)(image)
    torch.manual_seed(5)
    assert torch.equal(build_transform(32)(image), expected)


@pytest.mark.parametrize("policy", [None, "rand-m9-mstd0.5-inc1", "trivial", "augmix-m5-w2"])
def test_augmentation_follows_torchs_generator_and_leaves_the_others_alone(policy):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8))
    transform = build_transform((32, 48), dict(kind="augment", auto_augment=policy))
    before = random.getstate(), np.random.get_state()[1].tolist()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(transform(picture))
    assert results[0].shape == (3, 32, 48)
    assert results[0].dtype == torch.uint8
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_augmentation_that_is_unknown_or_contradictory_is_refused():
    with refused(ValueError, "augmentation-policy-unknown", "randd-m9"):
        build_transform(32, dict(kind="augment", auto_augment="randd-m9"))
    with refused(ValueError, "color-jitter-without-effect", "color_jitter=0.4", "auto_augment='trivial'"):
        build_transform(32, dict(kind="augment", auto_augment="trivial", color_jitter=0.4))


@pytest.mark.parametrize("policy", ["rand-m10-n9-inc1", "rand-m9-mstd0.5-inc1", "originalr", "augmix-m10-w9"])
def test_the_strongest_levels_of_posterize(policy):
    """timm asks Pillow for 0 bits, a black image, which Pillow 13 refuses."""
    transform = augment_transform(16, auto_augment=policy)
    (steps,) = transform.steps.transforms[1].transforms
    operations = [*getattr(steps, "ops", []), *itertools.chain.from_iterable(getattr(steps, "policy", []))]
    found = [operation for operation in operations if "Posterize" in operation.name]
    assert found
    image = Image.new("RGB", (16, 16), (200, 100, 50))
    for operation in found:
        operation.prob, operation.magnitude = 1.0, 10
        assert operation(image).size == (16, 16)
        assert np.asarray(operation.aug_fn(image, 0)).max() == 0
        assert np.asarray(operation.aug_fn(image, 1))[0, 0].tolist() == [128, 0, 0]
