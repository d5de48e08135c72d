"""Graphs compute what the student does, at any batch and size; lower precisions are measured, not trusted.

Most of these take 3 to 7 seconds: torch.export traces the network symbolically, however small it is.
"""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import timm
import torch
from full_disk import full_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from refusals import refused
from safetensors.torch import save_file
from student_checkpoints import write_student
from torch import Tensor, nn

from hgkd.errors import WeightsError
from hgkd.export import ExportError, ExportReport, export
from hgkd.export.job import MissingLibraryError
from hgkd.export.targets import graphs
from hgkd.writing import WriteError

MEMBERS = [
    ("resnet50", {"layers": (1, 1, 1, 1)}),
    ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
    ("test_efficientnet", {}),
]
SIZES = [(1, 3, 96, 64), (3, 3, 64, 160)]


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def features_of(source: nn.Module, images: Tensor) -> Tensor:
    """The last feature map of images in [0, 1]."""
    mean, std = (torch.tensor(source.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return source.forward_features((images - mean) / std)


def pictures(folder: Path, count: int = 16) -> Path:
    """Blurred noise in two class folders."""
    rng = np.random.default_rng(0)
    for i in range(count):
        file = folder / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((64, 48)).save(file)
    return folder


@pytest.mark.parametrize(("name", "kwargs"), MEMBERS)
@torch.no_grad()
def test_program(tmp_path: Path, name: str, kwargs: dict) -> None:
    source = write_student(tmp_path / "a.pth", name, kwargs=kwargs)
    report = export(tmp_path / "a.pth", tmp_path / "out", "pt2", output="features")
    program = torch.export.load(str(tmp_path / "out/model.pt2")).module()
    for size in SIZES:
        images = torch.rand(size)
        close(program(images), features_of(source, images))
    least = int(re.search(r"sides from (\d+) pixels", report.notes[0])[1])
    assert report.signature.input.least == least
    assert program(torch.rand(1, 3, least, least)).shape[0] == 1


@pytest.mark.parametrize(("name", "kwargs"), MEMBERS)
@torch.no_grad()
def test_onnx(tmp_path: Path, name: str, kwargs: dict) -> None:
    pytest.importorskip("onnxscript")
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    source = write_student(tmp_path / "a.pth", name, kwargs=kwargs)
    report = export(tmp_path / "a.pth", tmp_path / "out", "onnx", output="features", opset=20)
    assert report.proven_with == f"onnxruntime {onnxruntime.__version__}"
    graph = onnx.load(tmp_path / "out/model.onnx")
    assert next(o.version for o in graph.opset_import if o.domain == "") == 20
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx", providers=["CPUExecutionProvider"])
    for size in SIZES:
        images = torch.rand(size)
        close(torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0]), features_of(source, images))


@torch.no_grad()
def test_pooled_and_logits(tmp_path: Path) -> None:
    source = write_student(tmp_path / "a.pth")
    head = nn.Linear(source.num_features, 5)
    save_file(head.state_dict(), tmp_path / "head.safetensors")
    images = torch.rand(2, 3, 64, 96)
    pooled = features_of(source, images).mean((2, 3))
    close(graphs.Graph(source, "pooled", None)(images), pooled)
    export(tmp_path / "a.pth", tmp_path / "out", "pt2", output="logits", classifier=tmp_path / "head.safetensors")
    close(torch.export.load(str(tmp_path / "out/model.pt2")).module()(images), head(pooled))


@pytest.mark.parametrize(("name", "kwargs"), MEMBERS)
@torch.no_grad()
def test_torchscript(tmp_path: Path, name: str, kwargs: dict) -> None:
    source = write_student(tmp_path / "a.pth", name, kwargs=kwargs)
    report = export(tmp_path / "a.pth", tmp_path / "out", "torchscript")
    images = torch.rand(2, 3, 64, 96)
    close(torch.jit.load(str(tmp_path / "out/model.ts"))(images), features_of(source, images).mean((2, 3)))
    assert "deprecated" in report.notes[0]
    assert report.notes[-1].startswith("BatchNorm")


def test_lower_precisions_are_smaller_and_measured(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    write_student(tmp_path / "a.pth")
    images = pictures(tmp_path / "pictures")
    report = export(tmp_path / "a.pth", tmp_path / "out", "onnx", precision=("int8", "fp16"), images=images, labels=True)
    rows = {row["precision"]: row for row in report.table}
    assert list(rows) == ["fp32", "fp16", "int8"]
    assert rows["fp32"]["difference"] == 0
    assert rows["fp32"]["same_nearest"] == 1
    assert rows["fp16"]["bytes"] < 0.6 * rows["fp32"]["bytes"]
    assert 0 < rows["fp16"]["difference"] < 0.02 < 0.99 < rows["fp16"]["cosine"]
    assert rows["fp16"]["difference"] < rows["int8"]["difference"]
    assert all(row["images"] == 8 and 0 <= row["top1"] <= 1 for row in rows.values())
    assert set(report.files) == {"model.onnx", "model_fp16.onnx", "model_int8.onnx"}
    assert report.images == 16
    assert "BatchNorm: 15 were trained, 0 are left in the file, the others are folded into convolutions" in report.notes
    requires = json.loads((tmp_path / "out/run_card.json").read_text())["export"]["requires"]
    assert requires == {"onnxruntime": "1.8", "opset": 14, "ir_version": 7}
    for file in report.files:
        graph = onnx.load(tmp_path / "out" / file)
        assert ("", 14, 7) in [(entry.domain, entry.version, graph.ir_version) for entry in graph.opset_import]
    for page in ("run_card.md", "README.md"):
        assert "read by onnxruntime 1.8 and later" in (tmp_path / "out" / page).read_text()


def test_a_classifier_is_measured_by_its_own_answers(tmp_path: Path) -> None:
    images = torch.rand(6, 3, 8, 8)
    job = SimpleNamespace(images=images, labels=torch.tensor([0, 1, 0, 0, 0, 1]))
    answers = {0: torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]), 1: torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])}
    found = graphs.agreement(job, "logits", lambda x: answers[0], lambda x: answers[1])  # of images 1, 3 and 5
    assert (found["images"], found["top1"]) == (3, pytest.approx(2 / 3))
    found = graphs.agreement(SimpleNamespace(images=images, labels=None), "logits", lambda x: answers[0], lambda x: answers[0])
    assert "top1" not in found


def test_labels_must_be_there_and_be_the_classifiers(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    source = write_student(tmp_path / "a.pth")
    images = pictures(tmp_path / "pictures")
    with refused(ValueError, "labels-without-images"):
        export(tmp_path / "a.pth", tmp_path / "out", "onnx", labels=True)
    with refused(ValueError, "labels-without-class-folders"):
        export(tmp_path / "a.pth", tmp_path / "out", "onnx", labels=True, images=images / "a")
    save_file({"weight": torch.zeros(1, source.num_features), "bias": torch.zeros(1)}, tmp_path / "head.safetensors")
    with refused(ValueError, "calibration-classes-differ", "2", "1"):
        export(tmp_path / "a.pth", tmp_path / "out", "onnx", labels=True, images=images, output="logits",
               classifier=tmp_path / "head.safetensors")  # fmt: skip


def test_a_graph_of_nan_has_no_agreement() -> None:
    job = SimpleNamespace(images=torch.rand(4, 3, 8, 8), labels=None)
    good, bad = torch.rand(2, 3), torch.full((2, 3), float("nan"))
    for pair in ((good, bad), (bad, good), (bad, bad)):
        with refused(ExportError, "graph-not-finite"):
            graphs.agreement(job, "pooled", lambda x, out=pair[0]: out, lambda x, out=pair[1]: out)


def test_fp16_graphs_are_valid(tmp_path: Path) -> None:
    """The converter puts its casts at the end, out of order: github.com/microsoft/onnxconverter-common/issues/208."""
    pytest.importorskip("onnxscript")
    onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    write_student(tmp_path / "a.pth")
    report = export(tmp_path / "a.pth", tmp_path / "out", "onnx", precision=["fp16"])
    for name in ("model.onnx", "model_fp16.onnx"):
        onnx.checker.check_model(str(tmp_path / "out" / name), full_check=True)
    assert re.search(r"fp16: the largest value inside is [\d.]+, in \w+.* \(fp16 ends at 65504\)", " ".join(report.notes))


def test_fp16_that_would_overflow_is_refused(tmp_path: Path) -> None:
    """onnxruntime's CPU computes in fp32 between nodes, so only the values tell: features are small again after layer 2."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    write_student(tmp_path / "a.pth")
    checkpoint = torch.load(tmp_path / "a.pth", weights_only=False)
    checkpoint["state_dict"]["student.encoder.layer2.0.bn1.weight"] *= 1e5
    checkpoint["state_dict"]["student.encoder.layer2.0.conv2.weight"] /= 1e5
    torch.save(checkpoint, tmp_path / "a.pth")
    with refused(ExportError, "fp16-overflows", "65504", "layer2.0"):
        export(tmp_path / "a.pth", tmp_path / "out", "onnx", precision=["fp16"])
    assert not (tmp_path / "out").exists()


def test_largest_by_hand() -> None:
    inf = float("inf")
    assert graphs._largest(np.array([1.0, -3.0, -inf])) == 3.0  # padding of a maximum
    assert graphs._largest(np.array([1.0, float("nan")])) == inf
    assert graphs._largest(np.array([10**6])) == 0.0
    assert graphs._largest(np.array([], dtype=np.float32)) == 0.0


def test_opsets_that_cannot_be_written(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    newest = onnx.defs.onnx_opset_version()
    write_student(tmp_path / "a.pth")
    with refused(ValueError, "opset-unknown", "99", onnx.__version__, "7", newest):
        export(tmp_path / "a.pth", tmp_path / "out", "onnx", opset=99)
    try:  # torch may know the newest or not; what it wrote is what the report says
        report = export(tmp_path / "a.pth", tmp_path / "out", "onnx", opset=newest)
    except ValueError as error:
        assert re.search(rf"cannot write opset {newest} of this network, only \d+", str(error))  # noqa: PT017
    else:
        written = onnx.load(tmp_path / "out/model.onnx").opset_import
        assert report.notes[0].startswith(f"opset {next(entry.version for entry in written if entry.domain == '')},")


@given(
    side=st.tuples(st.integers(1, 23), st.integers(1, 23)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    dilation=st.integers(1, 2),
)
@settings(deadline=None)
def test_same_padding_is_timms(side: tuple, kernel: tuple, stride: tuple, dilation: int) -> None:
    images, weight = torch.rand(1, 1, *side, dtype=torch.float64), torch.rand(1, 1, *kernel, dtype=torch.float64)
    found, expected = (
        nn.functional.conv2d(pad(images, kernel, stride, (dilation, dilation)), weight, stride=stride, dilation=dilation)
        for pad in (graphs._pad_same, timm.layers.pad_same)
    )
    assert torch.equal(found, expected)


class SamePadded(nn.Sequential):
    """Five strided layers that pad as TensorFlow does."""

    num_features = 8
    pretrained_cfg: ClassVar = {"input_size": (3, 64, 64), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)}

    def __init__(self) -> None:
        super().__init__(
            timm.layers.create_conv2d(3, 8, 7, stride=2, padding="same"),
            timm.layers.create_pool2d("max", 3, 2, padding="same"),
            timm.layers.StdConv2dSame(8, 8, 3, stride=2, eps=1e-6),
            timm.layers.create_conv2d(8, 8, [3, 5], stride=2, padding="same"),
            timm.layers.create_pool2d("avg", 2, 2, padding="same"),
        )

    forward_features = nn.Sequential.forward


@torch.no_grad()
def test_same_padded_networks_end_and_are_exact() -> None:
    """With timm's own padding the time of torch.export triples with each strided layer."""
    network = SamePadded().eval()
    theirs = timm.layers.pad_same
    graph = graphs.Graph(network, "features", None).eval()
    program = graphs.exported_program(SimpleNamespace(image_size=(64, 64), network=network), graph).module()
    assert sys.modules["timm.layers.conv2d_same"].pad_same is theirs
    for size in [(1, 3, 97, 130), (3, 3, 64, 64), (1, 3, 111, 95)]:
        images = torch.rand(size)
        close(program(images), features_of(network, images))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tf_efficientnet_b0", "tf_mixnet_s"])
@torch.no_grad()
def test_real_same_padded_networks(tmp_path: Path, name: str) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    source = write_student(tmp_path / "a.pth", name)
    export(tmp_path / "a.pth", tmp_path / "out", "onnx", output="features")
    session = onnxruntime.InferenceSession(tmp_path / "out/model.onnx", providers=["CPUExecutionProvider"])
    images = torch.rand(1, 3, 97, 131)
    close(torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), features_of(source, images))


@torch.no_grad()
def test_branches_for_training_are_fused(tmp_path: Path) -> None:
    source = write_student(tmp_path / "a.pth", "repvgg_a0")
    report = export(tmp_path / "a.pth", tmp_path / "out", "torchscript")
    assert "fused for inference, as timm does it: 22 convolutions of the 44 that were trained" in report.notes
    assert 0 < report.max_difference <= 1e-4
    assert report.parameters < sum(p.numel() for p in source.parameters())
    script = torch.jit.load(str(tmp_path / "out/model.ts"))
    images = torch.rand(2, 3, 64, 96)
    expected = features_of(source, images).mean((2, 3))
    assert (script(images) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert "fused" not in " ".join(export_plain(tmp_path).notes)


def export_plain(folder: Path) -> ExportReport:
    write_student(folder / "plain.pth")
    return export(folder / "plain.pth", folder / "plain", "torchscript")


def test_a_damaged_classifier_file(tmp_path: Path) -> None:
    write_student(tmp_path / "a.pth")
    (tmp_path / "head.safetensors").write_bytes(b"no weights")
    with refused(WeightsError, "file-not-safetensors", "head.safetensors"):
        export(tmp_path / "a.pth", tmp_path / "out", "pt2", output="logits", classifier=tmp_path / "head.safetensors")


@pytest.mark.parametrize("to", ["pt2", "onnx"])
def test_a_full_disk_is_one_sentence(tmp_path: Path, to: str) -> None:
    if to == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    write_student(tmp_path / "a.pth")
    with full_disk(50_000), pytest.raises(WriteError, match=r"cannot write .*out: .* MB are free .*; nothing was left there"):
        export(tmp_path / "a.pth", tmp_path / "out", to)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_nearest_by_hand() -> None:
    features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.2], [-0.8, 0.1]])
    assert graphs._nearest(features).tolist() == [1, 0, 3, 2]


def test_a_graph_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_student(tmp_path / "a.pth")
    monkeypatch.setattr(graphs.torch.export, "load", lambda file: SimpleNamespace(
        module=lambda: lambda images: torch.zeros(len(images), 512)))  # fmt: skip
    with refused(ExportError, "export-shape-differs"):
        export(tmp_path / "a.pth", tmp_path / "out", "pt2")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("library", ["onnx", "onnxruntime", "onnxscript"])
def test_missing_library_names_the_extra(tmp_path: Path, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, pytest if name != library else None)
    write_student(tmp_path / "a.pth")
    with refused(MissingLibraryError, "target-library-missing", "--to", "onnx", library, "hgkd[export]"):
        export(tmp_path / "a.pth", tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()


def test_refusals(tmp_path: Path) -> None:
    source = write_student(tmp_path / "a.pth")

    def fails(refusal: tuple[object, ...], error: type[Exception] = ValueError, to: str = "onnx", **options: object) -> None:
        with refused(error, *refusal):
            export(tmp_path / "a.pth", tmp_path / "out", to, **options)

    fails(("graph-output-unknown", "feature", "features"), output="feature")
    fails(("precision-unknown", "fp17", "fp16"), precision=["fp17"])
    fails(("int8-without-images", "int8", "8"), precision=["int8"])
    fails(("logits-without-classifier", "output='logits'"), output="logits")
    fails(("logits-without-classifier", "output='logits'"), classifier=tmp_path / "head.safetensors")
    fails(
        ("linear-classifier-missing", "none.safetensors"),
        FileNotFoundError,
        output="logits",
        classifier=tmp_path / "none.safetensors",
    )
    save_file({"weight": torch.zeros(3, 7), "bias": torch.zeros(3)}, tmp_path / "head.safetensors")
    expected = ("linear-classifier-shape", "weight", "(3, 7)", source.num_features)
    fails(expected, WeightsError, "pt2", output="logits", classifier=tmp_path / "head.safetensors")
