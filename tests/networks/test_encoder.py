"""Encoders of timm: levels by dry run, stems, refusals by message."""

from pathlib import Path

import pytest
import timm
import torch
from refusals import refused
from torch import nn

from hgkd.networks.encoder import encoder_features, freeze_unused
from hgkd.pixels import pixel_statistics
from hgkd.students import build_encoder, encoder_levels


@pytest.mark.parametrize(
    ("name", "strides", "channels"),
    [
        ("resnet18", [4, 8, 16, 32], [64, 128, 256, 512]),
        ("test_resnet", [4, 8, 16, 32], [32, 48, 192, 96]),
        ("test_convnext", [4, 8, 16, 32], [24, 32, 48, 64]),
        ("test_efficientnet", [4, 8, 16, 32], [24, 32, 48, 64]),
        ("test_byobnet", [4, 8, 16, 32], [32, 64, 128, 256]),
    ],
)
def test_levels_by_dry_run(name: str, strides: list[int], channels: list[int]) -> None:
    levels = encoder_levels(build_encoder(name))
    assert [level.stride for level in levels] == strides
    assert [level.channels for level in levels] == channels


def test_levels_do_not_depend_on_the_image_size() -> None:
    model = build_encoder("test_resnet")
    assert encoder_levels(model, (64, 96)) == encoder_levels(model, 160) == encoder_levels(model)


def test_level_is_the_deepest_feature_of_its_stride() -> None:
    model = build_encoder("resnet18", stem="cifar").eval()
    levels = encoder_levels(model)
    # the stem and layer1 share stride 1: layer1 is taken, index 1
    assert [(level.index, level.stride, level.channels) for level in levels] == [
        (1, 1, 64),
        (2, 2, 128),
        (3, 4, 256),
        (4, 8, 512),
    ]
    shapes = [tuple(f.shape[1:]) for f in encoder_features(model, torch.zeros(1, 3, 16, 24), levels)]
    assert shapes == [(64, 16, 24), (128, 8, 12), (256, 4, 6), (512, 2, 3)]


@pytest.mark.parametrize("name", ["resnet18", "resnet18d"])
def test_cifar_stem_keeps_timms_names_and_all_other_weights(name: str) -> None:
    plain = timm.create_model(name, num_classes=0, global_pool="")
    cifar = build_encoder(name, stem="cifar")
    assert isinstance(cifar.conv1, nn.Conv2d)
    assert (cifar.conv1.kernel_size, cifar.conv1.stride) == ((3, 3), (1, 1))
    assert isinstance(cifar.maxpool, nn.Identity)
    assert {k for k in cifar.state_dict() if not k.startswith("conv1")} == {
        k for k in plain.state_dict() if not k.startswith("conv1")
    }


def test_features_are_those_of_the_forward_pass() -> None:
    model = build_encoder("test_resnet").eval()
    images = torch.randn(1, 3, 64, 64)
    features = encoder_features(model, images, encoder_levels(model))
    torch.testing.assert_close(features[-1], model(images))


def test_dry_runs_leave_modes_and_statistics_alone() -> None:
    model = build_encoder("test_resnet")
    model.bn1.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    freeze_unused(model, encoder_levels(model))
    assert model.training
    assert not model.bn1.training
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_freeze_unused_names_what_no_level_reads() -> None:
    model = build_encoder("test_convnext")
    assert freeze_unused(model, encoder_levels(model)) == ["head.norm.weight", "head.norm.bias"]
    assert [k for k, p in model.named_parameters() if not p.requires_grad] == ["head.norm.weight", "head.norm.bias"]


def test_timm_arguments_are_passed_on() -> None:
    rates = {m.drop_prob for m in build_encoder("resnet18", drop_path_rate=0.5).modules() if hasattr(m, "drop_prob")}
    assert max(rates) == pytest.approx(0.5)


def test_pixel_statistics_are_the_networks_own() -> None:
    mean, std = pixel_statistics(build_encoder("resnet18"))
    assert mean == pytest.approx((0.485, 0.456, 0.406))
    assert std == pytest.approx((0.229, 0.224, 0.225))
    assert pixel_statistics(nn.Identity())[0] == pytest.approx((0.485, 0.456, 0.406))


def test_checkpoint_is_loaded(tmp_path: Path) -> None:
    pytest.importorskip("hgkd.weights.files")
    source = timm.create_model("test_resnet", num_classes=7)  # with a classifier
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    loaded = build_encoder("test_resnet", checkpoint=tmp_path / "weights.pth")
    assert all(v.equal(source.state_dict()[k]) for k, v in loaded.state_dict().items())


def test_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("hgkd.weights.files")
    torch.save(build_encoder("test_convnext").state_dict(), tmp_path / "weights.pth")
    with refused(ValueError, "network-not-found-in-file", "ResNet"):
        build_encoder("test_resnet", checkpoint=tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("name", "options", "refusal"),
    [
        ("resnet81", {}, ("timm-name-unknown", "encoder", "resnet81", "resnet18")),
        ("test_vit", {}, ("encoder-not-hierarchical", "16", "resnet50")),
        ("test_coatnet", {}, ("encoder-does-not-run", "128 x 128")),
        ("test_resnet", {"stem": "tiny"}, ("stem-unknown", "default", "cifar", "tiny")),
        ("test_convnext", {"stem": "cifar"}, ("cifar-stem-without-resnet", "test_convnext")),
        ("test_resnet", {"num_classes": 10}, ("timm-option-reserved", "num_classes")),
        ("test_resnet", {"pretrained": True, "checkpoint": "x.pth"}, ("weights-named-twice",)),
        ("test_resnet", {"pretrained": True, "stem": "cifar"}, ("no-pretrained-for-stem", "stem='cifar'")),
        ("inception_next_tiny", {}, ("encoder-not-buildable", "inception_next_tiny")),
    ],
)
def test_refusals(name: str, options: dict[str, object], refusal: tuple[str, ...]) -> None:
    with refused(ValueError, *refusal):
        build_encoder(name, **options)


def test_a_network_without_intermediates_is_refused() -> None:
    with refused(ValueError, "encoder-without-levels", "Sequential", "forward_intermediates"):
        encoder_levels(nn.Sequential(nn.Conv2d(3, 4, 1)))
