"""Encoders that are not timm's: levels by taps, the names of their weights, refusals by message."""

import importlib.util
import sys

import pytest
import torch
from student_checkpoints import write_student
from torch import nn

from hgkd.cli.doctor import described
from hgkd.errors import NoSparseRuleError
from hgkd.networks import ImageClassifier, build_encoder, encoder_levels
from hgkd.networks.encoder import encoder_features, freeze_unused
from hgkd.networks.taps import Tapped, find_taps, tap
from hgkd.pixels import pixel_statistics
from hgkd.registry import MODELS
from hgkd.students import SparseUNet
from hgkd.weights.identify import identify


def stage(before, after, stride=2):
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())


class Plain(nn.Module):
    """Strides 4, 8, 16 and a head that takes one size only."""

    def __init__(self, widths=(4, 8, 16), strides=(4, 2, 2), outputs=False):
        super().__init__()
        befores = (3, *widths[:-1])
        self.stages = nn.Sequential(*map(stage, befores, widths, strides))
        self.head = nn.Linear(widths[-1], 5)
        self.outputs = outputs

    def forward(self, x):
        maps = []
        for part in self.stages:
            x = part(x)
            maps.append(x)
        return tuple(maps) if self.outputs else self.head(x.mean((2, 3)))


@pytest.fixture
def registered(monkeypatch):
    """Register a class or function under a name, for one test."""

    def register(name, make):
        monkeypatch.setitem(MODELS.module_dict, name, make)

    return register


@pytest.mark.parametrize("way", ["argument", "attribute", "outputs", "found"])
def test_levels_are_those_of_the_network(way, registered):
    make = type("Own", (Plain,), {"taps": ("stages.0", "stages.1", "stages.2")}) if way == "attribute" else Plain
    registered("Own", make)
    options = {"argument": {"taps": ["stages.0", "stages.2"]}, "outputs": {"outputs": True}}.get(way, {})
    torch.manual_seed(0)
    network = build_encoder("Own", **options).eval()
    strides = [4, 16] if way == "argument" else [4, 8, 16]
    levels = encoder_levels(network)
    assert [level.stride for level in levels] == strides
    images = torch.randn(2, 3, 32, 48)
    expected = [images]
    for part in network.stages:
        expected.append(part(expected[-1]))
    expected = [expected[1], expected[3]] if way == "argument" else expected[1:]
    for found, true in zip(encoder_features(network, images, levels), expected, strict=True):
        assert torch.equal(found, true)
    assert torch.equal(network.forward_features(images), expected[-1])
    assert list(network.state_dict()) == list(Plain().state_dict())
    assert not any(module._forward_hooks for module in network.modules())
    assert freeze_unused(network, levels) == ["head.weight", "head.bias"]


def test_the_head_behind_the_last_tap_is_not_run(registered):
    class Fixed(Plain):
        def forward(self, x):
            return self.head(self.stages(x).flatten(1))  # for one size of image

    registered("Fixed", Fixed)
    with pytest.raises(ValueError, match=r"'Fixed' does not run on a 128 x 192 image .*one size, declare the levels"):
        build_encoder("Fixed")
    network = build_encoder("Fixed", taps=["stages.0", "stages.2"])
    assert [level.stride for level in encoder_levels(network)] == [4, 16]


def test_statistics_and_modes_are_left_alone():
    network = Plain()
    network.stages[0].eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    tapped = tap(network, "Plain")
    assert tapped is network
    assert isinstance(tapped, Plain)
    assert isinstance(tapped, Tapped)
    assert network.training
    assert not network.stages[0].training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_pixels_are_imagenets_or_the_networks_own(registered):
    assert pixel_statistics(tap(Plain(), "Plain"))[0] == pytest.approx((0.485, 0.456, 0.406))
    own = type("Own", (Plain,), {"pretrained_cfg": {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}})
    assert pixel_statistics(tap(own(), "Own")) == ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))


def test_a_stage_is_found_as_a_whole_and_pooling_is_no_level():
    class Deep(Plain):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(self.stages, stage(16, 24))
            self.pool = nn.AdaptiveAvgPool2d(1)
            del self.stages, self.head

        def forward(self, x):
            return self.pool(self.features(x))

    found = find_taps(Deep(), "Deep", torch.zeros(1, 3, 128, 192))
    # a stem that halves twice at once has parts, of which the last counts
    assert found == ("features.0.0.2", "features.0.1", "features.0.2", "features.1")


def test_a_student_of_a_users_own_network_sees_visible_cells_only(registered):
    registered("Own", Plain)
    student = SparseUNet("Own", cell=32, decoder_width=16, min_decoder_width=8)
    assert student.encoder_spec == {"name": "Own", "stem": "default", "kwargs": {}}
    assert student.frozen == ["head.weight", "head.bias"]
    images, visible = torch.rand(2, 3, 64, 64), torch.tensor([[[True, False], [False, True]]] * 2)
    out = student.eval()(images, visible).decoded
    hidden = ~visible.repeat_interleave(32, 1).repeat_interleave(32, 2)
    assert torch.equal(out, student(torch.where(hidden[:, None], 0.3, images), visible).decoded)


TAKES_A_NUMBER = type("Numbered", (Plain,), {"taps": "stages.0"})


def unpadded():
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 4, 3, 2))


def twice():
    class Twice(Plain):
        def forward(self, x):
            return self.stages[1](self.stages[0](self.again(self.again(x))))

    network = Twice()
    network.again = nn.Conv2d(3, 3, 1)
    return network


def transformer():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv2d(3, 4, 16, 16)

        def forward(self, x):
            return self.patch(x).flatten(2).mean(2)

    return Tokens()


REFUSED = {
    "strides 4 and 12": (
        lambda: Plain(strides=(4, 3, 2)),
        {"taps": ["stages.0", "stages.1"]},
        r"\(1, 8, 11, 11\) .* power of two",
    ),
    "levels that grow finer": (Plain, {"taps": ["stages.2", "stages.0"]}, "is not hierarchical: .* strides 16, 4"),
    "a size that changes": (unpadded, {"taps": ["0", "1"]}, r"\(1, 4, 63, 63\) for a 128 x 128 image, which is no"),
    "no such tap": (Plain, {"taps": ["stages.0", "stage.1"]}, r"tap 'stage.1': 'Own' has no part .* has: stages\.\d"),
    "a tap that is not reached": (Plain, {"taps": ["stages.0", "stages"]}, "tap 'stages' is not called in a forward"),
    "a tap that is passed twice": (twice, {"taps": ["again", "stages.1"]}, "tap 'again' is called twice in a forward"),
    "one tap": (Plain, {"taps": ["stages.0"]}, r"is not hierarchical: its features have the strides 4 "),
    "taps that are a word": (TAKES_A_NUMBER, {}, r"must be a list of names of submodules, got 'stages.0'"),
    "a tap that gives no map": (Plain, {"taps": ["stages.0", "head"]}, r"a feature of shape \(1, 5\)"),
    "no levels": (transformer, {}, r"'Own' shows fewer than two levels .*patch \(stride 16\); declare them: taps"),
    "an argument": (lambda width=3: Plain(), {"widht": 3}, "Own takes no 'widht' .* it takes: width, taps"),
    "no module": (lambda: 3, {}, "'Own' gives a int, an encoder is a torch.nn.Module"),
    "a stem": (Plain, {"stem": "cifar"}, "stem='cifar' is for timm's ResNets, not for 'Own'"),
    "weights of timm": (Plain, {"pretrained": True}, "pretrained=True asks timm, which has no 'Own'; give a weight file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, registered):
    make, options, message = REFUSED[case]
    registered("Own", make)
    with pytest.raises(ValueError, match=message):
        build_encoder("Own", **options)


def test_an_unknown_name_tells_how_others_are_named():
    with pytest.raises(
        ValueError, match=r"unknown encoder 'CSPNeXt'; .*mmdet\.CSPNeXt, torchvision\.resnet18; .*custom_imports"
    ):
        build_encoder("CSPNeXt")


def test_a_library_that_is_not_there_is_named_with_the_remedy(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("hgkd.networks.libraries.find_spec", lambda name: None if name[:2] == "mm" else find(name))
    with pytest.raises(ValueError, match=r"mmdet\.\* needs mmdet, which is not installed; pip install 'hgkd\[downstream\]'"):
        build_encoder("mmdet.CSPNeXt")
    with pytest.raises(ValueError, match=r"mmseg\.\* needs mmsegmentation, which is not installed"):
        build_encoder("mmseg.ResNetV1c", depth=18)
    with pytest.raises(ValueError, match=r"needs mmpretrain, which is not installed; pip install mmpretrain"):
        build_encoder("mmpretrain.ResNet")


def test_a_library_that_is_broken_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ValueError, match=r"torchvision does not import: .*torchvision\.models"):
        build_encoder("torchvision.resnet18")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("torchvision.resnet81", {}, "unknown model of torchvision 'resnet81'; did you mean .*'resnet18'"),
        ("torchvision.resnet18", {"weights": "DEFAULT"}, "weights of torchvision.resnet18 is not taken: .*encoder_checkpoint"),
        ("torchvision.resnet18", {"depth": 3}, "torchvision.resnet18: .*'depth'"),
    ],
)
def test_refusals_of_torchvision(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_encoder(name, **options)


def test_torchvision_loses_its_head_and_takes_its_own_files(tmp_path):
    import torchvision

    source = torchvision.models.resnet18(num_classes=7)
    torch.save(source.state_dict(), tmp_path / "published.pth")
    network = build_encoder("torchvision.resnet18", checkpoint=tmp_path / "published.pth").eval()
    assert set(source.state_dict()) - set(network.state_dict()) == {"fc.weight", "fc.bias"}
    assert [level.channels for level in encoder_levels(network)] == [64, 128, 256, 512]
    images = torch.randn(1, 3, 64, 64)
    trunk = nn.Sequential(*list(source.children())[:-2]).eval()
    torch.testing.assert_close(network.forward_features(images), trunk(images))
    with pytest.raises(NoSparseRuleError, match=r"called by layer stage2.0: InvertedResidual"):
        SparseUNet("torchvision.shufflenet_v2_x0_5")


def test_fine_tuning_is_for_timms_networks(tmp_path):
    message = (
        "fine-tunes networks of timm only; export it to torchvision or torch, onnx, program or sparse, and fine-tune it there"
    )
    with pytest.raises(ValueError, match=f"torchvision.resnet18 cannot be a classifier here, and hgkd {message}"):
        ImageClassifier("torchvision.resnet18", 3, 64)
    write_student(tmp_path / "a.pth", "torchvision.resnet18", encoder=build_encoder("torchvision.resnet18"))
    with pytest.raises(ValueError, match=f"holds a 'torchvision.resnet18', and hgkd {message}"):
        ImageClassifier("resnet18", 3, 64, backbone=tmp_path / "a.pth")
    assert not [line for line in described(identify(tmp_path / "a.pth")) if "fine-tuning" in line]
    write_student(tmp_path / "b.pth")
    assert [line for line in described(identify(tmp_path / "b.pth")) if "fine-tuning" in line]
