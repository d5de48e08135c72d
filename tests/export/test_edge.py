"""Edge runtimes: what they compute is what torch computes, lower precisions are measured, and what they cannot do is named."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from student_checkpoints import write_student
from test_graphs import features_of, pictures
from torch import Tensor, nn

from hgkd.errors import code_of
from hgkd.export import ExportError, export
from hgkd.export.job import MissingLibraryError
from hgkd.export.targets import edge

pytest.importorskip("openvino", reason="pip install 'hgkd[edge]'")
pytest.importorskip("ncnn", reason="pip install 'hgkd[edge]'")

NARROW = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
MEMBERS = [("resnet18", {"layers": (1, 1, 1, 1)}), ("convnext_atto", NARROW), ("test_efficientnet", {}), ("mobileone_s0", {})]
RUNNERS = {"openvino": (edge.openvino_runner, "model.xml"), "ncnn": (edge.ncnn_runner, "model.ncnn.param")}


def same(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("to", RUNNERS)
@pytest.mark.parametrize(("name", "kwargs"), MEMBERS)
def test_features_are_those_of_torch_at_any_size(tmp_path: Path, to: str, name: str, kwargs: dict) -> None:
    source = write_student(tmp_path / "a.pth", name, kwargs=kwargs).eval()
    report = export(tmp_path / "a.pth", tmp_path / "out", to, output="features")
    assert report.max_difference <= 1e-4
    runner, file = RUNNERS[to]
    with torch.no_grad():
        for size in ((2, 3, 96, 64), (1, 3, 64, 160)):
            images = torch.rand(size)
            same(runner(tmp_path / "out" / file, threads=2)(images), features_of(source, images))
    assert not {"traced.pt", "model.pnnx.param"} & set(report.files)
    if name == "mobileone_s0":
        assert any("fused for inference" in note for note in report.notes)


@pytest.mark.parametrize("to", RUNNERS)
def test_logits(tmp_path: Path, to: str) -> None:
    source = write_student(tmp_path / "a.pth", "resnet18", kwargs={"layers": (1, 1, 1, 1)}).eval()
    head = nn.Linear(512, 7)
    save_file(head.state_dict(), tmp_path / "head.safetensors")
    export(tmp_path / "a.pth", tmp_path / "out", to, output="logits", classifier=tmp_path / "head.safetensors")
    images = torch.rand(3, 3, 64, 64)
    runner, file = RUNNERS[to]
    with torch.no_grad():
        same(runner(tmp_path / "out" / file)(images), head(features_of(source, images).mean((2, 3))))


@pytest.mark.parametrize(("to", "lower"), [("openvino", ["fp16", "int8"]), ("ncnn", ["fp16"])])
def test_lower_precisions_are_smaller_and_measured(tmp_path: Path, to: str, lower: list[str]) -> None:
    write_student(tmp_path / "a.pth", "resnet18", kwargs={"layers": (1, 1, 1, 1)})
    images = pictures(tmp_path / "pictures")
    report = export(tmp_path / "a.pth", tmp_path / "out", to, precision=lower, images=images, labels=True)
    full, *others = report.table
    assert full["precision"] == "fp32"
    assert full["difference"] == 0.0
    assert [row["precision"] for row in others] == lower
    for row in others:
        part = {"fp16": 0.5, "int8": 0.25}[row["precision"]]
        assert row["bytes"] < (part + 0.1) * full["bytes"], row
        assert 0.0 < row["difference"] < 0.2, row
        assert row["cosine"] > 0.99, row
        assert 0.0 <= row["top1"] <= 1.0
        assert row["images"] == 8  # every second one of 16; the others calibrated


def test_nothing_is_reported_to_anyone(tmp_path: Path) -> None:
    telemetry = pytest.importorskip("openvino_telemetry")
    write_student(tmp_path / "a.pth", "test_resnet")
    images = pictures(tmp_path / "pictures")
    export(tmp_path / "a.pth", tmp_path / "out", "openvino", precision=["int8"], images=images)
    assert telemetry.Telemetry().consent is False


@pytest.mark.parametrize("to", RUNNERS)
def test_refusals(tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_student(tmp_path / "a.pth", "test_resnet")
    with pytest.raises(ValueError, match="unknown precision 'fp8'") as refused:
        export(tmp_path / "a.pth", tmp_path / "out", to, precision=["fp8"])
    assert code_of(refused.value) == "precision-unknown"
    if to == "openvino":
        with pytest.raises(ValueError, match="give a folder of 8 or more with images=") as refused:
            export(tmp_path / "a.pth", tmp_path / "out", to, precision=["int8"])
        assert code_of(refused.value) == "int8-without-images"
    monkeypatch.setitem(__import__("sys").modules, to, None)
    with pytest.raises(MissingLibraryError, match=re.escape(f"--to {to} needs {to}") + r".*pip install 'hgkd\[edge\]'"):
        export(tmp_path / "a.pth", tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_a_layer_that_ncnn_lacks_is_named(tmp_path: Path) -> None:
    class Sorting(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean((2, 3)).sort(1)[0]

    (pnnx,) = edge.need("ncnn", "pnnx")
    traced = tmp_path / "traced.pt"
    torch.jit.trace(Sorting(), torch.rand(1, 3, 32, 32)).save(str(traced))
    file = tmp_path / "model.ncnn.param"
    edge._convert(pnnx, traced, [(1, 3, 32, 32), (1, 3, 64, 64)], file, half=False)
    with pytest.raises(ExportError, match=r"ncnn .* it lacks .*sort.*; use --to onnx or openvino"):
        edge.ncnn_runner(file)(torch.rand(1, 3, 32, 32))


def test_what_pnnx_cannot_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "traced.pt").write_bytes(b"no graph")
    (pnnx,) = edge.need("ncnn", "pnnx")
    with pytest.raises(ExportError, match=r"pnnx cannot convert this network \(exit code") as refused:
        edge._convert(pnnx, tmp_path / "traced.pt", [(1, 3, 32, 32), (1, 3, 64, 64)], tmp_path / "model.ncnn.param", half=False)
    assert code_of(refused.value) == "pnnx-fails"
