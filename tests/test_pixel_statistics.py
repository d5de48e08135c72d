"""Pixel statistics and channels are checked alike wherever a user gives them."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from refusals import refused
from safetensors.torch import save_file
from teaching import ARCH

from hgkd.distillers import ClassifierTraining, MAEPretraining, MaskedDistiller
from hgkd.evaluation.extract import load_extractor
from hgkd.networks import ImageClassifier
from hgkd.networks.mae import MaskedAutoencoder, make_arch, save_mae
from hgkd.pixels import PixelNormalisation, check_channels, check_normalize, check_pixels, pixels_text
from hgkd.students import MaskedViT, SparseUNet
from hgkd.teachers import ClassifierTeacher, MAETeacher, TimmTeacher

IMAGENET_255 = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))  # as OpenMMLab's configs write them
VIT: dict[str, Any] = {"allow_random": True, "depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 64}


def overlaid(mean: Any, std: Any) -> dict[str, Any]:
    return {"pretrained_cfg_overlay": {"mean": mean, "std": std}}


def mae_teacher(folder: Path, mean: Any, std: Any) -> None:
    file = folder / "mae.safetensors"
    MAEPretraining(ARCH, 64).save_teacher(file, overwrite=True)
    MAETeacher(file, allow_random=True, normalize=(mean, std))


PLACES: dict[str, Callable[[Path, Any, Any], object]] = {
    "timm teacher": lambda folder, mean, std: TimmTeacher("vit_tiny_patch16_224", normalize=(mean, std), **VIT),
    "MAE teacher": mae_teacher,
    "classifier": lambda folder, mean, std: ImageClassifier("test_resnet", 2, normalize=(mean, std)),
    "teacher of a classifier": lambda folder, mean, std: ClassifierTeacher(
        name="test_resnet", normalize=(mean, std), allow_random=True
    ),
    "CNN student": lambda folder, mean, std: SparseUNet("test_resnet", encoder_kwargs=overlaid(mean, std)),
    "ViT student": lambda folder, mean, std: MaskedViT(ARCH, mean=mean, std=std),
    "MAE": lambda folder, mean, std: MAEPretraining(ARCH, 64, mean=mean, std=std),
}


@pytest.mark.parametrize("place", PLACES)
def test_statistics_of_pixels_up_to_255_are_refused_everywhere(place: str, tmp_path: Path) -> None:
    """OpenMMLab's own convention."""
    with refused(ValueError, "pixels-of-255", "255", "0.485", "0.456", "0.406", "0.229", "0.224", "0.225"):
        PLACES[place](tmp_path, *IMAGENET_255)
    with refused(ValueError, "pixels-out-of-range", "0", "1"):
        PLACES[place](tmp_path, (0.5, 0.5, 0.5), (0.2, 0.0, 0.2))
    PLACES[place](tmp_path, (0.0, 0.5, 1.0), (0.2, 0.3, 1.0))


def test_an_export_s_config_is_checked(tmp_path: Path) -> None:
    spec = {"name": "test_resnet", "stem": "default", "kwargs": {}, "pixels": IMAGENET_255}
    (tmp_path / "config.json").write_text(json.dumps({"hgkd": {"format": 1, "encoder": spec}}))
    model = timm.create_model("test_resnet", num_classes=0)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    with refused(ValueError, "pixels-of-255", "255"):
        load_extractor(tmp_path)


@pytest.mark.parametrize(
    "wrong", [0.5, "imagenet", (0.5, 0.5), ((0.5, 0.5, 0.5),), ((0.5,), (0.5,)), (("a", "b", "c"), (1, 1, 1)), {"mean": 1}]
)
def test_what_is_no_pair_of_triples_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"^model\.teacher\.normalize.* three (finite )?numbers.* got "):
        check_normalize(wrong, "model.teacher.normalize")


unit = st.floats(0.0, 1.0)


@given(st.lists(unit, min_size=3, max_size=3), st.lists(st.floats(1e-6, 1.0), min_size=3, max_size=3))
def test_what_is_right_comes_back(mean: list[float], std: list[float]) -> None:
    for given_as in (list, tuple, torch.tensor):
        found = check_pixels(given_as(mean), given_as(std), "here")
        torch.testing.assert_close(torch.tensor(found), torch.tensor([mean, std]))
    assert pixels_text(mean, std).startswith("pixels normalised by mean (")


def test_nan_is_refused() -> None:
    with refused(ValueError, "pixels-no-numbers"):
        check_pixels((0.5, float("nan"), 0.5), (0.2, 0.2, 0.2), "here")


def test_a_teacher_of_timm_for_other_than_rgb_images_is_refused_when_built() -> None:
    with pytest.raises(ValueError, match=r"in_chans.* is 1, but it must be 3: .* which model\.teacher_channels names"):
        TimmTeacher("vit_tiny_patch16_224", in_chans=1, **VIT)


def test_a_file_for_other_channels_needs_their_statistics(tmp_path: Path) -> None:
    file = save_mae(MaskedAutoencoder(make_arch({**ARCH, "in_chans": 6})), tmp_path / "six.safetensors")
    with pytest.raises(ValueError, match=r"in_chans=6 needs the mean .* set model\.teacher\.normalize"):
        MAETeacher(file, allow_random=True)
    assert MAETeacher(file, allow_random=True, normalize=([0.5] * 6, [0.2] * 6)).in_chans == 6
    check_channels(3, "here")


def test_every_network_normalises_by_the_same_formula_and_keeps_its_buffers_out_of_the_state() -> None:
    pixels = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    images = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in pixels)
    made: list[PixelNormalisation] = [
        SparseUNet("test_resnet", encoder_kwargs=overlaid(*pixels)),
        MaskedViT(ARCH, mean=pixels[0], std=pixels[1]),
        MAEPretraining(ARCH, 32, 8, mean=pixels[0], std=pixels[1]),
        ImageClassifier("test_resnet", 2, 32, normalize=pixels),
        TimmTeacher("test_vit", allow_random=True, normalize=pixels, dtype="float16"),
    ]
    for module in made:
        torch.testing.assert_close(module.normalise(images), (images - mean) / std, rtol=0, atol=0)
        torch.testing.assert_close(module.denormalise(module.normalise(images)), images)
        assert {"mean", "std"} <= dict(module.named_buffers()).keys()
        assert not {"mean", "std"} & module.state_dict().keys()


NETWORKS: dict[str, Callable[[], Any]] = {
    "cnn student": lambda: SparseUNet("test_resnet", decoder_width=16, min_decoder_width=8),
    "vit student": lambda: MaskedViT({**ARCH, "image_size": (64, 64)}),
    "classifier": lambda: ImageClassifier("test_resnet", 3, 64),
    "timm teacher": lambda: TimmTeacher("vit_tiny_patch16_224", **VIT),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_images_of_a_file_are_what_they_are_in_unit_range(kind: str) -> None:
    network = NETWORKS[kind]().eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(network.normalise(images), network.normalise(images / 255))
    if kind.endswith("student"):
        network.prepare(64)
        out, expected = network(images), network(images / 255)
        assert torch.equal(out.decoded, expected.decoded)
        assert torch.equal(out.images, expected.images)  # which pixel objectives rebuild
        assert torch.equal(network.pooled(images), network.pooled(images / 255))
    with refused(TypeError, "images-dtype", "torch.int64", "uint8"):
        network.normalise(images.long())


def test_new_statistics_replace_those_before_on_their_device() -> None:
    pixels = PixelNormalisation()
    pixels.set_pixels((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    pixels.to("meta")
    pixels.set_pixels((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert pixels.mean.device.type == pixels.std.device.type == "meta"
    pixels = PixelNormalisation()
    for values in ((0.1, 0.2, 0.3), (0.5, 0.5, 0.5)):
        pixels.set_pixels(values, values)
    assert pixels.pixel_values() == {"mean": [0.5] * 3, "std": [0.5] * 3}


def masked(student: Any) -> Callable[..., MaskedDistiller]:
    return lambda objectives=None, **pixels: MaskedDistiller(
        student=dict(student, **pixels),
        objectives=objectives or dict(pixels=dict(type="PixelReconstruction")),
        mask=dict(type="RandomMask", mask_ratio=0.5),
        image_size=64,
    )


VIT_64 = {**ARCH, "image_size": (64, 64)}
TRAININGS: dict[str, tuple[Callable[..., Any], Callable[[Any, Any], dict[str, Any]]]] = {
    "CNN student": (
        masked(dict(type="SparseUNet", encoder="test_resnet", decoder_width=16, min_decoder_width=8)),
        lambda mean, std: dict(normalize=(mean, std)),
    ),
    "ViT student": (masked(dict(type="MaskedViT", arch=VIT_64)), lambda mean, std: dict(mean=mean, std=std)),
    "MAE": (lambda **pixels: MAEPretraining(ARCH, 64, **pixels), lambda mean, std: dict(mean=mean, std=std)),
    "classifier": (
        lambda **pixels: ClassifierTraining(classifier=dict(name="test_resnet", **pixels), num_classes=3, image_size=64),
        lambda mean, std: dict(normalize=(mean, std)),
    ),
}


@pytest.mark.parametrize("kind", TRAININGS)
def test_a_training_goes_on_with_the_pixels_of_its_checkpoint(kind: str) -> None:
    build, options = TRAININGS[kind]
    own = ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    usual, other = build(), build(**options(*own))
    notes = [usual.meta(), other.meta()]
    for model, meta, there in ((usual, notes[1], other), (other, notes[0], build())):
        assert model.load_meta(model.meta()) is None
        told = model.load_meta(meta)
        assert told.startswith("pixels normalised by mean (")
        assert "as in the checkpoint" in told
        found, wanted = (next(part for part in m.modules() if isinstance(part, PixelNormalisation)) for m in (model, there))
        assert found.pixel_values() == wanted.pixel_values()
        assert build().load_meta(model.meta()) == build().load_meta(there.meta())  # which later files say, too
    assert usual.load_meta(notes[1]) is None


@pytest.mark.parametrize("kind", ["CNN student", "ViT student"])
def test_pixels_are_predicted_with_the_statistics_of_the_checkpoint(kind: str) -> None:
    """DMAE's pixel loss, whose targets are normalised as the student's images are."""
    build, options = TRAININGS[kind]
    objectives = dict(pixels=dict(type="PixelReconstruction", standardise=False))
    model, there = (build(objectives=objectives, **given) for given in ({}, options([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])))
    average = copy.deepcopy(model)
    images = torch.rand(2, 3, 64, 64)
    visible = there.draw_mask(images)
    for goes_on in (model, average):
        goes_on.load_meta(there.meta())
        found, wanted = (
            m.objectives["pixels"].loss_terms(m.student(images, visible), None, there.student(images, visible).layout)
            for m in (goes_on, there)
        )
        torch.testing.assert_close(found["reconstruction"].target, wanted["reconstruction"].target)
