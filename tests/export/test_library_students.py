"""Students of mmdet, mmseg and torchvision go back to their library, strictly, with settings that no weight file holds."""

import importlib
import json
import runpy

import pytest
import torch
from downstream_runs import need
from mmengine.config import Config
from safetensors.torch import load_file
from student_checkpoints import write_student
from torch import nn

from hgkd.errors import WeightsError
from hgkd.export import export, load_backbone, load_sparse
from hgkd.export.job import ExportError
from hgkd.export.targets.openmmlab import CONFIG_PAGE
from hgkd.networks import build_encoder
from hgkd.openmmlab import load_backbone_file
from hgkd.openmmlab.weights import check_pixels, prepared_pixels
from hgkd.registry import MODELS

need("mmdet", "mmseg")
IMAGES = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(3)) * 2 - 1
CSPNEXT = dict(deepen_factor=0.167, widen_factor=0.125)


def written(folder, name, kwargs):
    """A student's checkpoint; its encoder."""
    return write_student(folder / "a.pth", name, kwargs=kwargs, encoder=build_encoder(name, **kwargs))


def norms_of(network):
    return {name: (m.eps, m.momentum) for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}


@pytest.mark.parametrize(
    ("name", "kwargs", "to", "norm"),
    [
        ("mmdet.CSPNeXt", CSPNEXT, "mmdet", (0.001, 0.03)),
        ("mmdet.CSPNeXt", {**CSPNEXT, "norm_cfg": dict(type="BN")}, "mmseg", (1e-5, 0.1)),
        ("mmdet.CSPDarknet", dict(deepen_factor=0.33, widen_factor=0.125), "mmdet", (0.001, 0.03)),
        ("mmdet.ResNet", dict(depth=18, base_channels=8, taps=["layer2", "layer4"]), "mmdet", (1e-5, 0.1)),
        ("mmseg.ResNetV1c", dict(depth=18, base_channels=8), "mmseg", (1e-5, 0.1)),
    ],
)
def test_a_backbone_goes_back_to_openmmlab(tmp_path, name, kwargs, to, norm):
    source = written(tmp_path, name, kwargs)
    report = export(tmp_path / "a.pth", tmp_path / "out", to)
    assert report.max_difference < 1e-5
    owner, _, kind = name.partition(".")
    assert report.proven_with.startswith({"mmdet": "mmdet", "mmseg": "mmsegmentation"}[owner])
    page = Config.fromfile(tmp_path / "out" / CONFIG_PAGE)
    described = page.model.backbone.to_dict()
    assert described.pop("type") == name
    assert described.pop("init_cfg")["checkpoint"] == str(tmp_path / "out/backbone.pth")
    assert ("custom_imports" in page) == (to != owner)
    assert described.pop("norm_cfg")["type"] == "BN"  # written in full, whether the student's own or its class's
    assert described == {key: value for key, value in kwargs.items() if key not in ("taps", "norm_cfg")}
    network = getattr(importlib.import_module(f"{owner}.models"), kind)(
        **{key: value for key, value in page.model.backbone.items() if key not in ("type", "init_cfg")}
    )
    state = torch.load(tmp_path / "out/backbone.pth", weights_only=True)["state_dict"]
    network.load_state_dict(state, strict=True)
    network.eval()
    assert set(norms_of(network).values()) == {norm}
    assert norms_of(network) == norms_of(source)
    with torch.no_grad():
        torch.testing.assert_close(network(IMAGES)[-1], source.forward_features(IMAGES), rtol=1e-5, atol=1e-6)


def test_a_torchvision_student_goes_back(tmp_path):
    source = written(tmp_path, "torchvision.mobilenet_v3_small", {})
    report = export(tmp_path / "a.pth", tmp_path / "out", "torchvision")
    assert report.max_difference < 1e-5
    model = runpy.run_path(str(tmp_path / "out/build.py"))["model"].eval()
    model.load_state_dict(load_file(tmp_path / "out/model.safetensors"))
    assert norms_of(model) == norms_of(source)
    assert set(norms_of(model).values()) == {(0.001, 0.01)}
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES), source.forward_features(IMAGES).mean((2, 3)), rtol=1e-5, atol=1e-6)


class Small(nn.Module):
    """Two levels, read by hooks, and a head."""

    taps = ("first", "second")

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.BatchNorm2d(8, eps=0.01), nn.ReLU())
        self.second, self.head = nn.Conv2d(8, 12, 3, 2, 1), nn.Linear(12, 2)

    def forward(self, x):
        return self.head(self.second(self.first(x)).mean((2, 3)))


@pytest.mark.parametrize("to", ["torch", "sparse", "pt2"])
def test_other_targets_take_networks_that_are_read_by_taps(tmp_path, monkeypatch, to):
    monkeypatch.setitem(MODELS.module_dict, "Small", Small)
    source = written(tmp_path, "Small", {})
    report = export(tmp_path / "a.pth", tmp_path / "out", to)
    assert report.max_difference < 1e-5
    with torch.no_grad():
        expected = source.forward_features(IMAGES)
        if to == "torch":
            again = load_backbone(tmp_path / "out")
            assert again.first[1].eps == 0.01
            assert torch.equal(again.forward_features(IMAGES), expected)
        if to == "sparse":
            visible = torch.ones(2, 2, 3, dtype=torch.bool)
            net = load_sparse(tmp_path / "out").eval()
            torch.testing.assert_close(
                net.forward_features(net.pack(IMAGES, visible.repeat_interleave(4, 1).repeat_interleave(4, 2))).to_dense(),
                expected,
            )
        if to == "pt2":
            images = (IMAGES + 1) / 2
            pooled = torch.export.load(tmp_path / "out/model.pt2").module()(images)
            mean, std = (torch.tensor(source.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
            torch.testing.assert_close(pooled, source.forward_features((images - mean) / std).mean((2, 3)))


@pytest.mark.parametrize(
    ("name", "kwargs", "to", "message"),
    [
        ("mmdet.CSPNeXt", CSPNEXT, "timm", r"timm has no mmdet\.CSPNeXt; export it to mmdet or torch, onnx, pt2 or sparse"),
        ("mmdet.CSPNeXt", CSPNEXT, "torchvision", r"torchvision has no mmdet\.CSPNeXt; export it to mmdet"),
        ("torchvision.resnet18", {}, "mmdet", r"mmdet has no torchvision\.resnet18; export it to torchvision"),
        ("torchvision.resnet18", {}, "transformers", r"transformers has no torchvision\.resnet18"),
    ],
)
def test_a_library_that_lacks_the_network_is_told_with_one_that_has_it(tmp_path, name, kwargs, to, message):
    written(tmp_path, name, kwargs)
    with pytest.raises(WeightsError, match=message):
        export(tmp_path / "a.pth", tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_target_torch_is_not_for_timms_networks(tmp_path):
    write_student(tmp_path / "a.pth", "test_resnet")
    with pytest.raises(WeightsError, match="test_resnet is; export it to timm"):
        export(tmp_path / "a.pth", tmp_path / "out", "torch")


def test_norms_that_would_behave_otherwise_stop_an_export(tmp_path, monkeypatch):
    written(tmp_path, "mmdet.CSPNeXt", CSPNEXT)
    from hgkd.export.targets import openmmlab

    load = openmmlab._load

    def other(*arguments):
        network = load(*arguments)
        network.stem[0].bn.eps = 1e-5
        return network

    monkeypatch.setattr(openmmlab, "_load", other)
    with pytest.raises(ExportError, match=r"norm stem\.0\.bn has eps and momentum \(0\.001, 0\.03\) in the source and \(1e-05"):
        export(tmp_path / "a.pth", tmp_path / "out", "mmdet")


# --- as the backbone of a detector


@pytest.fixture
def exported(tmp_path):
    written(tmp_path, "mmdet.CSPNeXt", {**CSPNEXT, "norm_cfg": dict(type="BN")})
    export(tmp_path / "a.pth", tmp_path / "out", "mmdet")
    return tmp_path / "out"


def test_a_detectors_backbone_takes_the_export_strictly(exported):
    from mmdet.models import CSPDarknet, CSPNeXt

    backbone = CSPNeXt(**CSPNEXT, norm_cfg=dict(type="BN"))
    report = load_backbone_file(backbone, exported)
    assert report.loaded.matched == len(backbone.state_dict())
    state = torch.load(exported / "backbone.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(value, state[key]) for key, value in backbone.state_dict().items())
    given = prepared_pixels(dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True))
    check_pixels(backbone, exported, given)
    with pytest.raises(ValueError, match=r"model.data_preprocessor.bgr_to_rgb=True"):
        check_pixels(backbone, exported, prepared_pixels(dict(mean=[103.53, 116.28, 123.675], std=[57.375, 57.12, 58.395])))
    with pytest.raises(WeightsError, match=r"holds an exported mmdet.CSPNeXt, and this config's backbone is a CSPNeXt \(16 "):
        load_backbone_file(CSPNeXt(**{**CSPNEXT, "widen_factor": 0.25}, norm_cfg=dict(type="BN")), exported)
    with pytest.raises(WeightsError, match=r"this config's backbone is a CSPDarknet \(8 channels in the stem\)"):
        load_backbone_file(CSPDarknet(deepen_factor=0.33, widen_factor=0.125, norm_cfg=dict(type="BN")), exported)


def test_norms_of_another_eps_are_refused_with_the_values_to_set(exported):
    from mmdet.models import CSPNeXt

    backbone = CSPNeXt(**CSPNEXT)  # the class's own norms, not those of mmdet's RTMDet
    before = backbone.state_dict()["stem.0.conv.weight"].clone()
    with pytest.raises(WeightsError, match=r"eps=1e-05 .* has eps=0\.001: .*norm_cfg\.eps=1e-05 .*norm_cfg\.momentum=0\.1"):
        load_backbone_file(backbone, exported)
    assert torch.equal(backbone.state_dict()["stem.0.conv.weight"], before)


def test_the_recipes_student_is_the_stock_detectors_backbone():
    """configs/_base_/students/cspnext_tiny.py against mmdet's own rtmdet_tiny."""
    from tiny_runs import ROOT

    student = Config.fromfile(ROOT / "configs/_base_/students/cspnext_tiny.py").model.student
    stock = Config.fromfile(ROOT / "downstream/detection/rtmdet_cspnext-tiny_300e_coco.py").model.backbone
    from mmdet.models import CSPNeXt

    own = build_encoder(student.encoder, **student.encoder_kwargs.to_dict())
    published = CSPNeXt(**{**{k: v for k, v in stock.items() if k not in ("type", "init_cfg")}, "norm_cfg": dict(type="BN")})
    assert {k: v.shape for k, v in own.state_dict().items()} == {k: v.shape for k, v in published.state_dict().items()}
    assert norms_of(own) == norms_of(published)
    published.load_state_dict(own.state_dict())
    published.eval()
    with torch.no_grad():
        assert torch.equal(published(IMAGES)[-1], own.eval().forward_features(IMAGES))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mmdet.CSPNext", {}, r"unknown backbone of mmdet 'CSPNext'; did you mean 'CSPNeXt'"),
        ("mmdet.CSPNeXt", {"deepen": 1}, r"mmdet\.CSPNeXt takes no 'deepen' .*deepen_factor"),
        ("mmdet.CSPNeXt", {"norm_cfg": dict(type="SyncBN")}, "asks for SyncBN, .*give type='BN'"),
        ("mmdet.ResNet", {"depth": 18, "init_cfg": dict(type="Pretrained")}, "init_cfg of mmdet.ResNet is not taken"),
    ],
)
def test_refusals_of_openmmlab(name, options, message):
    from hgkd.students import SparseUNet

    with pytest.raises((ValueError, NotImplementedError), match=message):
        SparseUNet(name, encoder_kwargs=options)


def test_norms_take_statistics_also_where_the_library_holds_them():
    network = build_encoder("mmdet.ResNeXt", depth=50, base_channels=8, groups=2, base_width=4)  # its default: norm_eval=True
    assert not network.norm_eval
    assert build_encoder("mmdet.ResNet", depth=18, base_channels=8, norm_eval=True).norm_eval  # as it was asked for


def test_card_and_config_describe_the_student(exported):
    card = json.loads((exported / "run_card.json").read_text())
    assert card["network"]["name"] == "mmdet.CSPNeXt"
    assert card["network"]["kwargs"] == {**CSPNEXT, "norm_cfg": {"type": "BN"}}
