"""Graphs compute what the student does, at any batch and size; lower precisions are measured, not trusted.

Most of these take 3 to 7 seconds: torch.export traces the network symbolically, however small it is.
"""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from student_checkpoints import write_student
from torch import Tensor, nn

from hgkd.errors import WeightsError
from hgkd.export import ExportError, export
from hgkd.export.job import MissingLibraryError
from hgkd.export.targets import graphs

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
    mean, deviation = (torch.tensor(source.pretrained_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return source.forward_features((images - mean) / deviation)


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
    report = export(tmp_path / "a.pth", tmp_path / "out", "program", output="features")
    program = torch.export.load(str(tmp_path / "out/model.pt2")).module()
    for size in SIZES:
        images = torch.rand(size)
        close(program(images), features_of(source, images))
    least = int(re.search(r"sides from (\d+) pixels", report.notes[0])[1])
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
    export(tmp_path / "a.pth", tmp_path / "out", "program", output="logits", classifier=tmp_path / "head.safetensors")
    close(torch.export.load(str(tmp_path / "out/model.pt2")).module()(images), head(pooled))


@pytest.mark.parametrize(("name", "kwargs"), MEMBERS)
@torch.no_grad()
def test_torchscript(tmp_path: Path, name: str, kwargs: dict) -> None:
    source = write_student(tmp_path / "a.pth", name, kwargs=kwargs)
    report = export(tmp_path / "a.pth", tmp_path / "out", "torchscript")
    images = torch.rand(2, 3, 64, 96)
    close(torch.jit.load(str(tmp_path / "out/model.ts"))(images), features_of(source, images).mean((2, 3)))
    assert "deprecated" in report.notes[0]


def test_lower_precisions_are_smaller_and_measured(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
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


def test_a_classifier_is_measured_by_its_own_answers(tmp_path: Path) -> None:
    images = torch.rand(6, 3, 8, 8)
    job = SimpleNamespace(images=images, labels=torch.tensor([0, 1, 0, 0, 0, 1]))
    answers = {0: torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]), 1: torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])}
    found = graphs._agreement(job, "logits", lambda x: answers[0], lambda x: answers[1])  # of images 1, 3 and 5
    assert (found["images"], found["top1"]) == (3, pytest.approx(2 / 3))
    found = graphs._agreement(SimpleNamespace(images=images, labels=None), "logits", lambda x: answers[0], lambda x: answers[0])
    assert "top1" not in found


def test_labels_must_be_there_and_be_the_classifiers(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    source = write_student(tmp_path / "a.pth")
    images = pictures(tmp_path / "pictures")
    with pytest.raises(ValueError, match=r"give a folder of class folders with images="):
        export(tmp_path / "a.pth", tmp_path / "out", "onnx", labels=True)
    with pytest.raises(ValueError, match=r"does not hold one folder a class"):
        export(tmp_path / "a.pth", tmp_path / "out", "onnx", labels=True, images=images / "a")
    save_file({"weight": torch.zeros(1, source.num_features), "bias": torch.zeros(1)}, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=r"the images are of 2 classes, the classifier knows 1"):
        export(tmp_path / "a.pth", tmp_path / "out", "onnx", labels=True, images=images, output="logits",
               classifier=tmp_path / "head.safetensors")  # fmt: skip


def test_nearest_by_hand() -> None:
    features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.2], [-0.8, 0.1]])
    assert graphs._nearest(features).tolist() == [1, 0, 3, 2]


def test_a_graph_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_student(tmp_path / "a.pth")
    monkeypatch.setattr(graphs.torch.export, "load", lambda file: SimpleNamespace(
        module=lambda: lambda images: torch.zeros(len(images), 512)))  # fmt: skip
    with pytest.raises(ExportError, match=r"gives \(2, 512\) after reading back with torch|outputs differ by 1.00e\+00"):
        export(tmp_path / "a.pth", tmp_path / "out", "program")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("library", ["onnx", "onnxruntime", "onnxscript"])
def test_missing_library_names_the_extra(tmp_path: Path, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, pytest if name != library else None)
    write_student(tmp_path / "a.pth")
    with pytest.raises(
        MissingLibraryError, match=rf"--to onnx needs {library}, which does not import.*pip install 'hgkd\[export\]'"
    ):
        export(tmp_path / "a.pth", tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()


def test_refusals(tmp_path: Path) -> None:
    source = write_student(tmp_path / "a.pth")

    def refused(message: str, error: type[Exception] = ValueError, to: str = "onnx", **options: object) -> None:
        with pytest.raises(error, match=message):
            export(tmp_path / "a.pth", tmp_path / "out", to, **options)

    refused("unknown output 'feature'; did you mean 'features'", output="feature")
    refused("unknown precision 'fp17'; did you mean 'fp16'", precision=["fp17"])
    refused("opset must be 18 or later .*got 11", opset=11)
    refused("int8 is calibrated and measured on images: give a folder of 8 or more with images=", precision=["int8"])
    refused("output='logits' and a classifier file .* go together", output="logits")
    refused("output='logits' and a classifier file .* go together", classifier=tmp_path / "head.safetensors")
    refused(
        "classifier .*none.safetensors does not exist",
        FileNotFoundError,
        output="logits",
        classifier=tmp_path / "none.safetensors",
    )
    save_file({"weight": torch.zeros(3, 7), "bias": torch.zeros(3)}, tmp_path / "head.safetensors")
    expected = rf"holds .*'weight': \(3, 7\).*expected weight \(K, {source.num_features}\) and bias \(K\)"
    refused(expected, WeightsError, "program", output="logits", classifier=tmp_path / "head.safetensors")
