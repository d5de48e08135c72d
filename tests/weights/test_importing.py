"""Weights of other projects: their names and containers are found, what does not fit is refused."""

import functools
import itertools
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from refusals import refused
from safetensors.torch import save_file
from student_checkpoints import randomised, write_student
from torch import Tensor, nn

from hgkd.errors import WeightsError
from hgkd.export import EncoderSpec, export, import_weights, load_backbone
from hgkd.networks import ImageClassifier
from hgkd.networks.backbones import build_backbone
from hgkd.students import SparseUNet, build_encoder
from hgkd.weights.identify import identify

DEPTHS, DIMS = (1, 2, 1, 1), (8, 16, 24, 32)
TINY = {"depths": DEPTHS, "dims": DIMS}
IMAGES = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Response(nn.Module):
    """Global response norm of ConvNeXt V2 (arXiv 2301.00808, section 4) on (B, H, W, C), parameters (1, 1, 1, C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma, self.beta = (nn.Parameter(torch.rand(1, 1, 1, width)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        strength = x.pow(2).sum((1, 2), keepdim=True).sqrt()
        return x + self.gamma * x * strength / (strength.mean(-1, keepdim=True) + 1e-6) + self.beta


class OfficialBlock(nn.Module):
    """ConvNeXt's block (arXiv 2201.03545, figure 4; 2301.00808, figure 5) under the official names of weights."""

    def __init__(self, width: int, v2: bool) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        if v2:
            self.grn = Response(4 * width)
        else:
            self.gamma = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.pwconv1(self.norm(self.dwconv(x).permute(0, 2, 3, 1))))
        y = self.pwconv2(self.grn(y)) if hasattr(self, "grn") else self.gamma * self.pwconv2(y)
        return x + y.permute(0, 3, 1, 2)


class OfficialConvNeXt(nn.Module):
    """The official ConvNeXt's structure, written for this test from the papers; names as in its checkpoints."""

    def __init__(self, v2: bool, last_norm: bool = True, classes: int = 5) -> None:
        super().__init__()
        self.downsample_layers = nn.ModuleList([nn.Sequential(nn.Conv2d(3, DIMS[0], 4, 4), ChannelNorm(DIMS[0]))])
        for before, after in itertools.pairwise(DIMS):
            self.downsample_layers.append(nn.Sequential(ChannelNorm(before), nn.Conv2d(before, after, 2, 2)))
        self.stages = nn.ModuleList(
            nn.Sequential(*(OfficialBlock(dim, v2) for _ in range(depth))) for dim, depth in zip(DIMS, DEPTHS, strict=True)
        )
        if last_norm:
            self.norm, self.head = nn.LayerNorm(DIMS[-1], eps=1e-6), nn.Linear(DIMS[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        for down, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(down(x))
        return x


def same_features(reference: Tensor, network: nn.Module) -> None:
    torch.testing.assert_close(network.forward_features(IMAGES), reference, rtol=1e-4, atol=1e-5)


def mmpretrain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """mmpretrain's names of an official ConvNeXt's backbone."""
    out = {}
    for key, value in state.items():
        key = key.replace("dwconv", "depthwise_conv").replace("pwconv", "pointwise_conv")
        if not key.startswith("head"):
            out["backbone." + (key.replace("norm", "norm3") if key.startswith("norm") else key)] = value
    return out


@pytest.mark.parametrize("conv_mlp", [False, True])
@pytest.mark.parametrize("v2", [False, True])
def test_official_convnext(tmp_path: Path, v2: bool, conv_mlp: bool, capsys: pytest.CaptureFixture[str]) -> None:
    official = OfficialConvNeXt(v2)
    torch.save({"model": official.state_dict()}, tmp_path / "official.pth")
    spec = EncoderSpec("convnextv2_atto" if v2 else "convnext_atto", kwargs={**TINY, "conv_mlp": conv_mlp})
    network = build_backbone(spec)
    report = import_weights(network, tmp_path / "official.pth")
    same_features(official(IMAGES), network)
    assert torch.equal(network.head.norm.weight, official.norm.weight)
    assert (report.style, report.prefix, dict(report.aside)) == ("official ConvNeXt", "", {"head": 2})
    assert report.loaded.matched == len(network.state_dict())


@pytest.mark.parametrize("v2", [False, True])
def test_mmpretrain_convnext(tmp_path: Path, v2: bool) -> None:
    official = OfficialConvNeXt(v2)
    state = {**mmpretrain_names(official.state_dict()), "head.fc.weight": torch.zeros(5, DIMS[-1])}
    torch.save({"meta": {}, "state_dict": state}, tmp_path / "mm.pth")
    network = build_backbone(EncoderSpec("convnextv2_atto" if v2 else "convnext_atto", kwargs=TINY))
    report = import_weights(network, tmp_path / "mm.pth")
    same_features(official(IMAGES), network)
    assert (report.style, report.prefix, dict(report.aside)) == ("mmpretrain ConvNeXt", "backbone.", {"head": 1})


def spark_around(prefix: str, encoder: dict[str, Tensor], decoder: str) -> dict[str, Tensor]:
    """A SparK model's weights: the encoder, a decoder with layers of similar names, mask tokens."""
    return {
        "mask_tokens.0": torch.zeros(1, 32, 1, 1),
        **{prefix + key: value for key, value in encoder.items()},
        f"{decoder}.dec.0.up_sample.weight": torch.zeros(4, 4),
        f"{decoder}.dec.0.conv1.weight": torch.zeros(4, 4, 3, 3),
    }


@pytest.mark.parametrize(
    ("prefix", "decoder", "container"),
    [("sparse_encoder.sp_cnn.", "dense_decoder", "module"), ("backbone.", "neck", "state_dict")],
)  # fmt: skip
def test_spark_resnet(tmp_path: Path, prefix: str, decoder: str, container: str) -> None:
    reference = randomised(torchvision.models.resnet18(num_classes=1))
    reference.fc = nn.Identity()
    content = {container: spark_around(prefix, reference.state_dict(), decoder), "arch": "resnet18", "epoch": 3}
    torch.save(content, tmp_path / "spark.pth")
    network = load_backbone(tmp_path / "spark.pth", "resnet18")
    body = nn.Sequential(*list(reference.children())[:-2]).eval()
    same_features(body(IMAGES), network)

    student_start = build_encoder("resnet18", checkpoint=tmp_path / "spark.pth").eval()
    same_features(body(IMAGES), student_start)


@pytest.mark.parametrize("style", ["sparse_encoder.sp_cnn.", "backbone."])
def test_spark_convnext_has_no_last_norm(tmp_path: Path, style: str) -> None:
    official = OfficialConvNeXt(v2=False, last_norm=False)
    state = official.state_dict()
    encoder = state if style != "backbone." else {k.removeprefix("backbone."): v for k, v in mmpretrain_names(state).items()}
    torch.save({"state_dict": spark_around(style, encoder, "neck")}, tmp_path / "spark.pth")
    spec = EncoderSpec("convnext_atto", kwargs=TINY)
    with refused(WeightsError, "weights-do-not-fit", "2", "head.norm.weight", "head.norm.bias", "allow=(...)"):
        load_backbone(tmp_path / "spark.pth", spec)
    network = load_backbone(tmp_path / "spark.pth", spec, allow=("head.norm.",))
    same_features(official(IMAGES), network)
    # a student's encoder has no use for that norm
    same_features(official(IMAGES), build_encoder("convnext_atto", checkpoint=tmp_path / "spark.pth", **TINY).eval())


def test_torchvision_convnext(tmp_path: Path) -> None:
    setting = torchvision.models.convnext.CNBlockConfig
    blocks = [setting(d, n, k) for d, n, k in zip(DIMS, (*DIMS[1:], None), DEPTHS, strict=True)]
    reference = torchvision.models.convnext.ConvNeXt(blocks, layer_scale=0.7, num_classes=3).eval()
    save_file(reference.state_dict(), tmp_path / "tv.safetensors")
    network = load_backbone(tmp_path / "tv.safetensors", EncoderSpec("convnext_atto", kwargs=TINY))
    same_features(reference.features(IMAGES), network)


def test_torchvision_resnet_of_before_counters(tmp_path: Path) -> None:
    reference = randomised(torchvision.models.resnet18(num_classes=3))
    old = {key: value for key, value in reference.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "resnet18-old.pth")
    network = timm.create_model("resnet18", num_classes=0, global_pool="").eval()
    report = import_weights(network, tmp_path / "resnet18-old.pth")
    same_features(nn.Sequential(*list(reference.children())[:-2])(IMAGES), network)
    assert report.filled == 20
    assert "2 of fc" in str(report)
    assert "20 counters of batches set to 0" in str(report)


@pytest.mark.parametrize(
    ("kind", "name", "widths", "kwargs"),
    [
        ("ResNet", "resnet18", (64, 128, 256, 512), {"layers": DEPTHS}),
        ("ConvNext", "convnext_atto", DIMS, TINY),
        ("ConvNextV2", "convnextv2_atto", DIMS, TINY),
    ],
)
def test_transformers(tmp_path: Path, kind: str, name: str, widths: tuple[int, ...], kwargs: dict) -> None:
    transformers = pytest.importorskip("transformers")
    layers = {"layer_type": "basic"} if kind == "ResNet" else {}
    config = getattr(transformers, f"{kind}Config")(depths=list(DEPTHS), hidden_sizes=list(widths), num_labels=3, **layers)
    reference = randomised(getattr(transformers, f"{kind}ForImageClassification")(config))
    for key, parameter in reference.named_parameters():
        if "layer_scale" in key:
            nn.init.uniform_(parameter, 0.5, 1.5)
    reference.save_pretrained(tmp_path)
    network = build_encoder(name, checkpoint=tmp_path / "model.safetensors", **kwargs).eval()
    same_features(getattr(reference, kind.lower())(IMAGES).last_hidden_state, network)


def test_timm_with_classifier_prefix_and_container(tmp_path: Path) -> None:
    reference = randomised(timm.create_model("mobilenetv3_small_050", num_classes=4))
    torch.save({"model": {f"module.{k}": v for k, v in reference.state_dict().items()}}, tmp_path / "a.pth")
    same_features(reference.forward_features(IMAGES), load_backbone(tmp_path / "a.pth", "mobilenetv3_small_050"))


def test_our_own_files_need_no_name_and_take_one(tmp_path: Path) -> None:
    source = write_student(tmp_path / "a.pth")
    same_features(source.forward_features(IMAGES), load_backbone(tmp_path / "a.pth"))
    same_features(source.forward_features(IMAGES), load_backbone(tmp_path / "a.pth", "test_resnet"))


@pytest.mark.parametrize("to", ["timm", "sparse"])
def test_a_student_starts_from_the_folder_of_an_export(tmp_path: Path, to: str) -> None:
    source = write_student(tmp_path / "a.pth")
    export(tmp_path / "a.pth", tmp_path / "out", to)
    student = SparseUNet("test_resnet", encoder_checkpoint=tmp_path / "out", decoder_width=16, min_decoder_width=8)
    found = student.encoder.state_dict()
    assert all(torch.equal(found[key], value) for key, value in source.state_dict().items())
    with refused(WeightsError, "network-not-found-in-file", "model.safetensors", "ConvNeXt"):
        build_encoder("test_convnext", checkpoint=tmp_path / "out")
    export(tmp_path / "a.pth", tmp_path / "script", "torchscript")
    with refused(WeightsError, "export-of-another-target", "script", "torchscript"):
        build_encoder("test_resnet", checkpoint=tmp_path / "script")


PIXELS = [[0.25, 0.5, 0.125], [0.5, 0.25, 0.375]]


@pytest.mark.parametrize("of", ["student", "timm", "sparse", "classifier"])
def test_a_student_takes_the_pixels_that_its_start_was_trained_with(tmp_path: Path, of: str) -> None:
    small = dict(encoder="test_resnet", decoder_width=16, min_decoder_width=8)
    start = tmp_path / ("out" if of in ("timm", "sparse") else "a.pth")
    if of == "classifier":
        classifier = ImageClassifier("test_resnet", 3, 64, normalize=PIXELS)
        state = {f"classifier.{key}": value for key, value in classifier.state_dict().items()}
        torch.save({"meta": {"hgkd": {"classifier": classifier.spec.to_dict(), "format": 1}}, "state_dict": state}, start)
    else:
        first = SparseUNet(normalize=PIXELS, **small)
        state = {f"student.{key}": value for key, value in first.state_dict().items()}
        torch.save({"meta": {"hgkd": {**first.description(), "format": 1}}, "state_dict": state}, tmp_path / "a.pth")
        if start.name == "out":
            export(tmp_path / "a.pth", start, of)
    student = SparseUNet(encoder_checkpoint=start, **small)
    expected = load_backbone(start) if of != "classifier" else None
    assert [student.pixel_values()[name] for name in ("mean", "std")] == PIXELS
    assert student.encoder_spec["pixels"] == PIXELS
    if expected is not None:
        assert [list(expected.pretrained_cfg[name]) for name in ("mean", "std")] == PIXELS
    assert SparseUNet(encoder_checkpoint=start, normalize=PIXELS, **small).encoder_spec["pixels"] == PIXELS
    with refused(ValueError, "pixels-differ", start, "0.125", "0.4", "model.student.normalize"):
        SparseUNet(encoder_checkpoint=start, normalize=[[0.4] * 3, [0.2] * 3], **small)


def test_what_timm_notes_of_a_name_is_not_noted_again(tmp_path: Path) -> None:
    write_student(tmp_path / "a.pth")
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "other.pth")
    for file in ("a.pth", "other.pth"):
        student = SparseUNet("test_resnet", encoder_checkpoint=tmp_path / file, decoder_width=16, min_decoder_width=8)
        assert "pixels" not in student.encoder_spec
    with refused(ValueError, "pixels-differ", "a.pth", "0.4"):
        SparseUNet("test_resnet", encoder_checkpoint=tmp_path / "a.pth", normalize=[[0.4] * 3, [0.2] * 3])
    SparseUNet("test_resnet", encoder_checkpoint=tmp_path / "other.pth", normalize=[[0.4] * 3, [0.2] * 3])  # says none


WEIGHT = "layer1.0.conv1.weight"
KINDS = {
    "torch.int8": lambda w: (100 * w).to(torch.int8),
    "torch.complex64": lambda w: w.to(torch.complex64),
    "torch.sparse_coo": lambda w: w.to_sparse(),
    "torch.qint8": lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8),
    "without data: the meta device": lambda w: w.to("meta"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_no_plain_numbers(tmp_path: Path, kind: str) -> None:
    """Integers and complex numbers would be copied as numbers, silently; the others end in torch's own words.

    github.com/pytorch/pytorch/issues/32691, github.com/pytorch/pytorch/issues/105963
    """
    state = timm.create_model("test_resnet").state_dict()
    state[WEIGHT] = KINDS[kind](state[WEIGHT])
    torch.save(state, tmp_path / "a.pth")
    with refused(WeightsError, "weights-not-floating-point", "1", WEIGHT, kind):
        load_backbone(tmp_path / "a.pth", "test_resnet")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions_and_layouts_in_memory_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    """Views, expanded tensors and channels_last leave as plain weights: github.com/safetensors/safetensors/issues/202."""
    source = randomised(timm.create_model("test_resnet", num_classes=0)).to(memory_format=torch.channels_last)
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in source.state_dict().items()}
    state["bn1.bias"] = torch.zeros(1, dtype=dtype).expand_as(state["bn1.bias"])
    state["extra.weight"] = state[WEIGHT].transpose(0, 1)
    torch.save(state, tmp_path / "a.pth")
    export(tmp_path / "a.pth", tmp_path / "out", encoder="test_resnet", allow=("extra.",))
    found = load_backbone(tmp_path / "out").state_dict()
    assert all(torch.equal(found[key], value.to(found[key].dtype)) for key, value in state.items() if key != "extra.weight")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_pointer_of_git_lfs_is_no_weight_file(tmp_path: Path, suffix: str) -> None:
    """github.com/microsoft/OmniParser/issues/34"""
    file = tmp_path / f"a{suffix}"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 102530333\n")
    with refused(WeightsError, "weight-file-is-a-pointer", "a", suffix, "LFS"):
        load_backbone(file, "test_resnet")


@pytest.mark.parametrize(
    ("name", "refusal"),
    [
        ("resnet18.nosuchtag", ("timm-tag-unknown", "resnet18", "nosuchtag", "resnet18.a1_in1k")),
        (
            "hf-hub:timm/resnet18.a1_in1k",
            ("timm-name-is-an-address", "encoder", "hf-hub:timm/resnet18.a1_in1k", "resnet18.a1_in1k"),
        ),
        ("hf_hub:timm/resnet18", ("timm-name-is-an-address", "encoder", "hf_hub:timm/resnet18", "resnet18")),
        ("timm/resnet81", ("timm-name-unknown", "encoder", "resnet81", "resnet18")),
    ],
)
def test_names_with_tags_and_of_the_hub(name: str, refusal: tuple[str, ...]) -> None:
    """github.com/huggingface/pytorch-image-models/issues/2093, .../2171"""
    with refused(ValueError, *refusal):
        build_encoder(name)
    assert build_encoder("test_resnet.r160_in1k") is not None


def test_a_file_of_others_leaves_as_an_export(tmp_path: Path) -> None:
    reference = randomised(timm.create_model("test_resnet", num_classes=4))
    torch.save(reference.state_dict(), tmp_path / "a.pth")
    export(tmp_path / "a.pth", tmp_path / "out", encoder="test_resnet")
    same_features(reference.forward_features(IMAGES), load_backbone(tmp_path / "out"))
    with refused(WeightsError, "decoder-not-in-file", "part='backbone'"):
        export(tmp_path / "a.pth", tmp_path / "new", "sparse", part="student", encoder="test_resnet")


def test_refusals(tmp_path: Path) -> None:
    network = timm.create_model("test_resnet", num_classes=0, global_pool="")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    state = {key: torch.rand(value.shape) for key, value in before.items()}

    def fails(content: dict, refusal: tuple[object, ...], load=functools.partial(import_weights, network)) -> None:  # noqa: B008
        torch.save(content, tmp_path / "x.pth")
        with refused(WeightsError, *refusal):
            load(tmp_path / "x.pth")
        assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())

    short = {key: value for key, value in state.items() if not key.startswith("layer4.0.conv2")}
    fails(short, ("weights-do-not-fit", 1, "missing: layer4.0.conv2.weight", "timm"))
    fails({**state, "layer5.0.weight": torch.zeros(1)}, ("weights-do-not-fit", 1, "unexpected: layer5.0.weight"))
    fails({**state, "conv1.0.weight": torch.zeros(1, 3, 3, 3)}, ("weights-of-other-sizes", "ResNet", "width 1", "width 16"))
    twice = {f"{who}.{key}": value for who in ("online", "average") for key, value in state.items()}
    fails(twice, ("network-found-several-times", "2", "online.", "average."))
    fails({"blocks.0.attn.qkv.weight": torch.zeros(3)}, ("network-not-found-in-file", "ResNet"))
    half = {key: value for key, value in state.items() if not key.startswith(("layer3", "layer4", "layer2"))}
    fails(half, ("network-not-found-in-file",))
    torch.save(twice, tmp_path / "twice.pth")
    import_weights(network, tmp_path / "twice.pth", prefix="average.")
    assert torch.equal(network.layer4[0].conv1.weight, state["layer4.0.conv1.weight"])


def test_of_a_student_and_its_teacher_the_teacher_is_taken(tmp_path: Path) -> None:
    network, teacher = (timm.create_model("test_resnet", num_classes=0, global_pool="") for _ in range(2))
    parts = {"student": network.state_dict(), "teacher": teacher.state_dict()}
    torch.save({f"{who}.{key}": value for who, state in parts.items() for key, value in state.items()}, tmp_path / "x.pth")
    assert identify(tmp_path / "x.pth").prefix == import_weights(network, tmp_path / "x.pth").prefix == "teacher."
    assert torch.equal(network.layer4[0].conv1.weight, teacher.layer4[0].conv1.weight)


def test_a_file_of_others_needs_a_name(tmp_path: Path) -> None:
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "a.pth")
    with refused(WeightsError, "checkpoint-not-of-hgkd"):
        load_backbone(tmp_path / "a.pth")
    with refused(ValueError, "timm-name-unknown", "encoder", "resnet81"):
        load_backbone(tmp_path / "a.pth", "resnet81")
