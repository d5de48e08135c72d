"""Every weight target gives the same network to its own library, or names the layer that this library lacks."""

import importlib
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from mmengine.config import Config
from PIL import Image
from refusals import refused
from student_checkpoints import write_student
from torch import Tensor, nn

from hgkd.export import (
    EncoderSpec,
    ExportError,
    UnsupportedLayerError,
    export,
    load_backbone,
    load_sparse,
    load_student,
    targets,
)
from hgkd.export.opened import open_export
from hgkd.export.targets.openmmlab import CONFIG_PAGE
from hgkd.pixels import pixel_statistics
from hgkd.sparse import sparsify
from hgkd.students import SparseUNet, build_encoder

NARROW = {"depths": (1, 2, 1, 1), "dims": (8, 16, 24, 32)}
MEMBERS = {
    "resnet18": {"layers": (1, 1, 1, 1)},
    "resnet50": {"layers": (1, 1, 1, 1)},
    "resnext50_32x4d": {"layers": (1, 1, 1, 1)},
    "convnext_atto": NARROW,
    "convnextv2_atto": NARROW,
    "mobilenetv3_small_050": {},
}
PIXELS = ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
IMAGES = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(3)) * 2 - 1


def written(tmp_path: Path, name: str, to: str, **options: object) -> tuple[nn.Module, Path]:
    """The source network and the folder of its export."""
    source = write_student(tmp_path / "a.pth", name, kwargs=MEMBERS[name])
    report = export(tmp_path / "a.pth", tmp_path / "out", to, **options)
    assert report.max_difference < 1e-5
    return source, tmp_path / "out"


def close(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_torchvision_resnet(tmp_path: Path, name: str) -> None:
    source, out = written(tmp_path, name, "torchvision")
    block = torchvision.models.resnet.BasicBlock if name == "resnet18" else torchvision.models.resnet.Bottleneck
    groups = {"groups": 32, "width_per_group": 4} if "resnext" in name else {}
    model = torchvision.models.ResNet(block, [1, 1, 1, 1], **groups).eval()
    found = model.load_state_dict(safetensors.torch.load_file(out / "model.safetensors"), strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (["fc.weight", "fc.bias"], [])
    model.fc = nn.Identity()
    with torch.no_grad():
        close(model(IMAGES), source.forward_features(IMAGES).mean((2, 3)))
        built = runpy.run_path(str(out / "build.py"))["model"].eval()
        built.load_state_dict(safetensors.torch.load_file(out / "model.safetensors"))
        close(built(IMAGES), source.forward_features(IMAGES).mean((2, 3)))


def test_torchvision_convnext(tmp_path: Path) -> None:
    source, out = written(tmp_path, "convnext_atto", "torchvision")
    model = runpy.run_path(str(out / "build.py"))["model"].eval()
    model.load_state_dict(safetensors.torch.load_file(out / "model.safetensors"))
    with torch.no_grad():
        close(model.features(IMAGES), source.forward_features(IMAGES))
        pooled = source.head.norm(source.forward_features(IMAGES).mean((2, 3), keepdim=True))
        close(model(IMAGES), pooled.flatten(1))


def test_a_whole_resnet18_loads_into_torchvisions_own_constructor(tmp_path: Path) -> None:
    write_student(tmp_path / "a.pth", "resnet18")
    export(tmp_path / "a.pth", tmp_path / "out", "torchvision")
    weights = safetensors.torch.load_file(tmp_path / "out/model.safetensors")
    model = torchvision.models.resnet18()
    assert model.load_state_dict(weights, strict=False).missing_keys == ["fc.weight", "fc.bias"]


@pytest.mark.parametrize(("library", "owner"), [("mmdet", "mmdet"), ("mmseg", "mmsegmentation"), ("mmpretrain", "mmpretrain")])
def test_openmmlab_resnet(tmp_path: Path, library: str, owner: str) -> None:
    source = write_student(tmp_path / "a.pth", "resnet18")
    report = export(tmp_path / "a.pth", tmp_path / "out", library)
    content = torch.load(tmp_path / "out/backbone.pth", weights_only=True)
    # their names are torchvision's
    reference = torchvision.models.resnet18()
    reference.fc = nn.Identity()
    reference.load_state_dict(content["state_dict"], strict=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").rename(tmp_path / "elsewhere/moved")  # the path in the config follows the folder
    backbone = Config.fromfile(tmp_path / "elsewhere/moved" / CONFIG_PAGE).model.backbone
    assert (backbone["type"], backbone["depth"], backbone["style"]) == (f"{library}.ResNet", 18, "pytorch")
    assert backbone["init_cfg"] == {"type": "Pretrained", "checkpoint": str(tmp_path / "elsewhere/moved/backbone.pth")}
    assert str(tmp_path) not in (tmp_path / "elsewhere/moved" / CONFIG_PAGE).read_text()

    if not report.proven_with.startswith(owner):
        assert f"so {library} itself has not read this export" in report.notes[-1]
        pytest.skip(report.notes[-1])
    model = importlib.import_module(f"{library}.models").ResNet(depth=18, out_indices=(3,))
    model.load_state_dict(content["state_dict"], strict=True)
    model.eval()
    with torch.no_grad():
        close(model(IMAGES)[-1], source.forward_features(IMAGES))


@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_atto"])
@pytest.mark.parametrize("library", ["mmdet", "mmpretrain"])
def test_openmmlab_convnext(tmp_path: Path, library: str, name: str) -> None:
    source, out = written(tmp_path, name, library)
    state = torch.load(out / "backbone.pth", weights_only=True)["state_dict"]
    block = source.stages[1].blocks[1]
    assert torch.equal(state["stages.1.1.depthwise_conv.weight"], block.conv_dw.weight)
    assert torch.equal(state["stages.1.1.pointwise_conv2.bias"], block.mlp.fc2.bias)
    assert torch.equal(state["downsample_layers.2.0.weight"], source.stages[2].downsample[0].weight)
    assert torch.equal(state["norm3.weight"], source.head.norm.weight)
    scope = runpy.run_path(str(out / CONFIG_PAGE))
    backbone = scope["backbone"]
    v2 = "v2" in name
    if v2:
        assert torch.equal(state["stages.1.1.grn.gamma"], block.mlp.grn.weight)
    assert backbone["type"] == "mmpretrain.ConvNeXt"
    assert backbone["arch"] == {"depths": [1, 2, 1, 1], "channels": [8, 16, 24, 32]}
    assert (backbone["use_grn"], backbone["layer_scale_init_value"] > 0) == (v2, not v2)
    assert ("custom_imports" in scope) == (library != "mmpretrain")


def test_mmpretrain_takes_any_network_through_its_timm_wrapper(tmp_path: Path) -> None:
    source, out = written(tmp_path, "mobilenetv3_small_050", "mmpretrain")
    state = torch.load(out / "backbone.pth", weights_only=True)["state_dict"]
    assert {key.removeprefix("timm_model.") for key in state} == set(source.state_dict())
    backbone = runpy.run_path(str(out / CONFIG_PAGE))["backbone"]
    assert (backbone["type"], backbone["model_name"]) == ("mmpretrain.TIMMBackbone", "mobilenetv3_small_050")


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "convnext_atto", "convnextv2_atto"])
def test_transformers(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    source, out = written(tmp_path, name, "transformers")
    model, found = transformers.AutoModel.from_pretrained(out, output_loading_info=True)
    assert not any(found.values())
    with torch.no_grad():
        close(model.eval()(IMAGES).last_hidden_state, source.forward_features(IMAGES))
    processor = transformers.AutoConfig.from_pretrained(out)
    assert (
        processor.model_type
        == {"resnet": "resnet", "convnext": "convnext", "convnextv2": "convnextv2"}[name.split("_")[0].rstrip("0158")]
    )


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_transformers_prepares_images_as_the_student_saw_them(tmp_path: Path, name: str) -> None:
    write_student(tmp_path / "a.pth", name, kwargs=MEMBERS[name], pixels=PIXELS)
    export(tmp_path / "a.pth", tmp_path / "out", "transformers", image_size=(64, 96))
    config = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert (config["image_processor_type"], config["size"]) == ("ViTImageProcessor", {"height": 64, "width": 96})
    assert (config["image_mean"], config["image_std"]) == PIXELS
    transformers = pytest.importorskip("transformers")
    picture = torch.randint(0, 256, (64, 96, 3), dtype=torch.uint8)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    found = processor(Image.fromarray(picture.numpy()), return_tensors="pt")["pixel_values"]
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in PIXELS)
    torch.testing.assert_close(found, (picture.permute(2, 0, 1)[None] / 255 - mean) / std, rtol=1e-5, atol=1e-5)
    larger = Image.new("RGB", (640, 480))
    assert processor(larger, return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 96)


def test_other_pixels_of_transformers_end_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def processor(picture: Image.Image, return_tensors: str) -> dict[str, Tensor]:
        return {"pixel_values": torch.zeros(1, 3, picture.height, picture.width)}

    fake = SimpleNamespace(AutoImageProcessor=SimpleNamespace(from_pretrained=lambda *_, **__: processor))
    monkeypatch.setattr(targets.transformers, "optional", lambda name: (fake, "transformers 0"))
    monkeypatch.setattr(targets.transformers, "_load", lambda library, job: job.network)
    write_student(tmp_path / "a.pth", "resnet18", kwargs=MEMBERS["resnet18"])
    with refused(ExportError, "library-prepares-other-pixels", "(1, 3, 64, 96)"):
        export(tmp_path / "a.pth", tmp_path / "out", "transformers", image_size=(64, 96))


@pytest.mark.parametrize("to", ["transformers", "mmpretrain"])
def test_without_the_library_the_report_says_who_proved(tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, to, None)
    monkeypatch.delitem(sys.modules, f"{to}.models", raising=False)
    write_student(tmp_path / "a.pth", "convnextv2_atto", kwargs=NARROW)
    report = export(tmp_path / "a.pth", tmp_path / "out", to)
    assert report.proven_with.startswith(f"hgkd.export.import_weights ({to} ")
    assert "export again where" in report.notes[-1]


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "mobilenetv3_small_050"])
def test_sparse_backbone_is_the_training_encoder(tmp_path: Path, name: str) -> None:
    source, out = written(tmp_path, name, "sparse")
    visible = torch.rand(2, 2, 3) < 0.5
    visible[:, 0, 0] = True
    trained = sparsify(source, 32).eval()
    for backend in ("gather", "masked"):
        net = load_sparse(out, backend)
        with torch.no_grad():
            found = net.forward_features(net.pack(IMAGES, visible)).to_dense(fill=0.0)
            close(found, trained.forward_features(trained.pack(IMAGES, visible)).to_dense(fill=0.0))
            close(net.forward_features(IMAGES), source.forward_features(IMAGES))
    # the folder serves dense users too
    dense = load_backbone(out).state_dict()
    assert all(torch.equal(dense[key], value) for key, value in source.state_dict().items())


def test_sparse_cell(tmp_path: Path) -> None:
    _, out = written(tmp_path, "convnext_atto", "sparse", cell=64)
    assert load_sparse(out).sparse_cell == 64
    with refused(ValueError, "cell-not-divided", "0", "32"):
        export(tmp_path / "a.pth", tmp_path / "new", "sparse", cell=0)
    with refused(ValueError, "cell-not-divided", "48", "32", "64"):
        export(tmp_path / "a.pth", tmp_path / "new", "sparse", cell=48)


@pytest.mark.parametrize("renormalize", [False, True])
def test_whole_student(tmp_path: Path, renormalize: bool) -> None:
    arguments = {"encoder": "test_resnet", "decoder_width": 32, "min_decoder_width": 8, "out_stride": 8, "cell": 64}
    arguments["renormalize"] = renormalize
    student = SparseUNet(**arguments)
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.1)
    write_student(tmp_path / "a.pth", encoder=student.encoder)
    checkpoint = torch.load(tmp_path / "a.pth", weights_only=False)
    checkpoint["state_dict"] = {f"student.{key}": value for key, value in student.state_dict().items()}
    checkpoint["meta"]["cfg"] = f"model = dict(student=dict(type='SparseUNet', backend='masked', {_keywords(arguments)}))\n"
    torch.save(checkpoint, tmp_path / "a.pth")
    export(tmp_path / "a.pth", tmp_path / "out", "sparse", part="student")

    again = load_student(tmp_path / "out")
    assert (again.cell, again.out_stride) == (64, 8)
    images, visible = torch.rand(2, 3, 128, 128), torch.tensor([[[True, False], [False, True]]]).expand(2, 2, 2)
    with torch.no_grad():
        close(again(images, visible).decoded, student.eval()(images, visible).decoded)
    # its sparse encoder, with the arithmetic that it was trained with
    export(tmp_path / "a.pth", tmp_path / "sparse", "sparse")
    net = load_sparse(tmp_path / "sparse")
    assert net.sparse_renormalize == renormalize
    with torch.no_grad():
        found, trained = (part.forward_features(part.pack(images, visible)).to_dense() for part in (net, student.encoder))
        close(found, trained)
    # its encoder alone, too
    close(load_backbone(tmp_path / "out").forward_features(images), student.encoder.forward_features(images))
    with refused(ValueError, "export-part-and-encoder"):
        load_student(tmp_path / "out", encoder=student.encoder)

    # and the decoder alone, to be put on an exported backbone
    report = export(tmp_path / "a.pth", tmp_path / "decoder", "sparse", part="decoder")
    names = safetensors.torch.load_file(tmp_path / "decoder/model.safetensors").keys()
    assert names == {name for name in student.state_dict() if not name.startswith("encoder.")}
    decoding = (student.densify, student.decoder)
    assert report.parameters == sum(p.numel() for part in decoding for p in part.parameters())
    export(tmp_path / "a.pth", tmp_path / "backbone")
    joined = load_student(tmp_path / "decoder", encoder=tmp_path / "backbone")
    with torch.no_grad():
        close(joined(images, visible).decoded, student(images, visible).decoded)
    with refused(ValueError, "export-part-and-encoder"):
        load_student(tmp_path / "decoder")
    with refused(ValueError, "weights-do-not-fit", "SparseUNet"):
        load_student(tmp_path / "decoder", encoder=build_encoder("test_convnext"))


def write_whole_student(path: Path, encoder: str, **arguments: object) -> SparseUNet:
    """The checkpoint of a student that normalises by ``PIXELS``."""
    arguments |= {"encoder": encoder, "decoder_width": 16, "min_decoder_width": 8, "normalize": PIXELS}
    student = SparseUNet(**arguments)
    name, stem, kwargs, pixels = (student.encoder_spec[key] for key in ("name", "stem", "kwargs", "pixels"))
    write_student(path, name, stem, kwargs, encoder=student.encoder, pixels=pixels)
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["state_dict"] = {f"student.{key}": value for key, value in student.state_dict().items()}
    checkpoint["meta"]["cfg"] = f"model = dict(student=dict(type='SparseUNet', {_keywords(arguments)}))\n"
    torch.save(checkpoint, path)
    return student


ROUND_TRIPS = [
    ("test_resnet", {}, "timm"),
    ("test_resnet", {}, "sparse"),
    ("resnet10t", {"stem": "cifar", "out_stride": 8}, "timm"),  # a folder that timm refuses
    ("torchvision.resnet18", {}, "torch"),
    ("torchvision.resnet18", {}, "sparse"),
]


@pytest.mark.parametrize(("name", "arguments", "to"), ROUND_TRIPS)
def test_pixel_statistics_go_there_and_back_and_on(tmp_path: Path, name: str, arguments: dict, to: str) -> None:
    write_whole_student(tmp_path / "a.pth", name, **arguments)
    export(tmp_path / "a.pth", tmp_path / "first", to)
    export(tmp_path / "first", tmp_path / "second", to)
    for folder in (tmp_path / "first", tmp_path / "second"):
        found = [load_backbone(folder)]
        found += [load_sparse(folder)] if to == "sparse" else []
        assert [pixel_statistics(network) for network in found] == [tuple(map(tuple, PIXELS))] * len(found)
        taken = open_export(folder).signature.input
        assert (list(taken.mean), list(taken.std)) == PIXELS
        assert json.loads((folder / "run_card.json").read_text())["network"]["pixels"] == list(PIXELS)


def test_a_whole_student_and_a_decoder_keep_their_pixel_statistics(tmp_path: Path) -> None:
    student = write_whole_student(tmp_path / "a.pth", "test_resnet")
    for part in ("student", "decoder", "backbone"):
        export(tmp_path / "a.pth", tmp_path / part, "sparse", part=part)
    own = student.pixel_values()
    assert load_student(tmp_path / "student").pixel_values() == own
    assert pixel_statistics(load_backbone(tmp_path / "student")) == tuple(map(tuple, PIXELS))
    for encoder in (tmp_path / "backbone", timm.create_model("test_resnet", num_classes=0, global_pool="")):
        assert load_student(tmp_path / "decoder", encoder=encoder).pixel_values() == own
    # on a backbone that was trained with others, those count
    write_student(tmp_path / "other.pth", "test_resnet")
    other = load_student(tmp_path / "decoder", encoder=tmp_path / "other.pth")
    expected = pixel_statistics(load_backbone(tmp_path / "other.pth"))
    torch.testing.assert_close(list(other.pixel_values().values()), list(map(list, expected)))


def test_a_name_does_not_replace_the_pixel_statistics_of_an_own_file(tmp_path: Path) -> None:
    write_student(tmp_path / "a.pth", pixels=PIXELS)
    export(tmp_path / "a.pth", tmp_path / "out")
    for file in (tmp_path / "a.pth", tmp_path / "out"):
        assert pixel_statistics(load_backbone(file, "test_resnet")) == tuple(map(tuple, PIXELS))
    pixels = ((0.5,) * 3, (0.2,) * 3)
    assert pixel_statistics(load_backbone(tmp_path / "out", EncoderSpec("test_resnet", pixels=pixels))) == pixels


def _keywords(arguments: dict) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in arguments.items())


def test_load_sparse_and_student_refuse_other_exports(tmp_path: Path) -> None:
    _, out = written(tmp_path, "mobilenetv3_small_050", "timm")
    with refused(ValueError, "export-not-sparse", "--to"):
        load_sparse(out)
    with refused(ValueError, "export-not-sparse", "--to", "--part"):
        load_student(out)


@pytest.mark.parametrize(
    ("name", "first", "shape"),
    [
        ("resnet18", "conv1.weight", (64, 7, 7, 3)),
        ("convnext_atto", "stem.0.weight", (8, 4, 4, 3)),
        ("mobilenetv3_small_050", "conv_stem.weight", (16, 3, 3, 3)),
    ],
)
def test_spconv_layout(tmp_path: Path, name: str, first: str, shape: tuple[int, ...]) -> None:
    source, out = written(tmp_path, name, "spconv")
    weight = safetensors.torch.load_file(out / "model.safetensors")[first]
    assert weight.shape == shape
    assert weight[5, 1, 2, 0] == source.state_dict()[first][5, 0, 1, 2]


REFUSALS = [
    ("resnet10t", {}, "torchvision", ("layer-not-in-library", "torchvision", "ResNet", "layer2.0.downsample.0", "AvgPool2d")),
    ("seresnet18", {}, "mmdet", ("layer-not-in-library", "mmdet", "ResNet", "layer1.0.se", "SEModule")),
    (
        "mobilenetv3_small_050",
        {},
        "torchvision",
        ("network-kind-not-in-library", "torchvision", "ResNet", "ConvNeXt", "MobileNetV3"),
    ),
    ("mobilenetv3_small_050", {}, "mmdet", ("network-kind-not-in-library", "mmdet", "ResNet", "ConvNeXt", "MobileNetV3")),
    ("mobilenetv3_small_050", {}, "mmseg", ("network-kind-not-in-library", "mmseg", "ResNet", "ConvNeXt", "MobileNetV3")),
    ("mobilenetv3_small_050", {}, "transformers", ("network-kind-not-in-library", "ResNet", "ConvNeXt", "MobileNetV3")),
    ("convnextv2_atto", NARROW, "torchvision", ("grn-not-in-library", "ConvNeXt", "stages.0.blocks.0.mlp.grn")),
    (
        "resnet50",
        {"layers": (1, 1, 1, 1)},
        "mmseg",
        ("resnet-sizes-not-in-library", "18", "34", "50", "101", "152", "bottleneck", "(1, 1, 1, 1)"),
    ),
    ("resnext50_32x4d", {"layers": (1, 1, 1, 1)}, "transformers", ("groups-not-in-library", "layer1.0.conv2", "32", "4")),
    ("wide_resnet50_2", {"layers": (1, 1, 1, 1)}, "mmdet", ("resnet-sizes-not-in-library", "128")),
    ("convnext_atto_ols", NARROW, "torchvision", ("stem-not-in-library", "ConvNeXt", "4x4", "4")),
    ("test_resnet", {"channels": (16, 24, 40, 64)}, "torchvision", ("layer-not-in-library", "torchvision", "ResNet")),
]


@pytest.mark.parametrize(("name", "kwargs", "to", "refusal"), REFUSALS)
def test_a_layer_that_the_target_lacks_is_named(
    tmp_path: Path, name: str, kwargs: dict, to: str, refusal: tuple[str, ...]
) -> None:
    write_student(tmp_path / "a.pth", name, kwargs=kwargs)
    with refused(UnsupportedLayerError, *refusal):
        export(tmp_path / "a.pth", tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_other_widths_and_stems_are_named(tmp_path: Path) -> None:
    kwargs = {"layers": (1, 1, 1, 1), "channels": (16, 24, 40, 64)}
    write_student(tmp_path / "a.pth", "resnet18", kwargs=kwargs)
    with refused(UnsupportedLayerError, "resnet-sizes-not-in-library", "64", "128", "256", "512", "16", "24", "40"):
        export(tmp_path / "a.pth", tmp_path / "out", "torchvision")
    write_student(tmp_path / "b.pth", "resnet18", "cifar", encoder=build_encoder("resnet18", stem="cifar"))
    with refused(UnsupportedLayerError, "stem-not-in-library", "torchvision", "ResNet", "7x7", "2"):
        export(tmp_path / "b.pth", tmp_path / "out", "torchvision")
