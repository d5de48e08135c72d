"""ExecuTorch, LiteRT and Core ML: what their files compute is what torch computes, and what they cannot hold is named."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from refusals import refused
from student_checkpoints import write_student
from test_graphs import features_of, pictures
from timm.layers import pad_same
from torch import Tensor, nn

from hgkd.export import ExportError, export
from hgkd.export import job as job_module
from hgkd.export.job import MissingLibraryError
from hgkd.export.targets import TARGETS, coreml, executorch, litert
from hgkd.export.targets.graphs import operators_named
from hgkd.export.targets.mil import _pads, mil_runner

NARROW = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}
LIBRARIES = {"executorch": "executorch", "litert": "litert_torch", "coreml": "coremltools"}
MODULES = {"executorch": executorch, "litert": litert, "coreml": coreml}
RUNNERS: dict[str, tuple[Callable[[Path], Callable[[Tensor], Tensor]], str]] = {
    "executorch": (executorch.executorch_runner, ".pte"),
    "litert": (litert.litert_runner, ".tflite"),
    "coreml": (mil_runner, ".mlpackage"),
}
LOWER = {"executorch": "int8", "litert": "int8", "coreml": "fp16"}


def installed(to: str) -> None:
    pytest.importorskip(LIBRARIES[to], reason=f"pip install 'hgkd[{to}]'")


@pytest.mark.parametrize("to", ["executorch", "litert"])
def test_preprocessing_lies_inside(tmp_path: Path, to: str) -> None:
    installed(to)
    source = write_student(tmp_path / "a.pth", "resnet18", kwargs=NARROW).eval()
    report = export(tmp_path / "a.pth", tmp_path / "out", to, output="features", preprocessing="nhwc-bgr")
    assert report.signature is not None
    assert (report.signature.input.layout, report.signature.input.dtype, report.signature.input.order) == (
        "NHWC",
        "uint8",
        "BGR",
    )
    runner, ending = RUNNERS[to]
    pixels = torch.randint(0, 256, (1, 224, 224, 3), dtype=torch.uint8)
    found = runner(tmp_path / "out" / f"model{ending}")(pixels)
    with torch.no_grad():
        expected = features_of(source, pixels.flip(3).permute(0, 3, 1, 2) / 255)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


class Bessel(nn.Module):
    """An operator that no runtime of a small device has."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.special.bessel_j0(images).mean((2, 3))


@pytest.mark.parametrize("to", RUNNERS)
def test_a_file_computes_what_torch_does_and_lower_precisions_are_measured(tmp_path: Path, to: str) -> None:
    installed(to)
    source = write_student(tmp_path / "a.pth", "resnet18", kwargs=NARROW).eval()
    lower = LOWER[to]
    report = export(
        tmp_path / "a.pth",
        tmp_path / "out",
        to,
        output="features",
        precision=[lower],
        images=pictures(tmp_path / "pictures"),
        labels=True,
    )
    assert report.max_difference <= 1e-4
    runner, ending = RUNNERS[to]
    run = runner(tmp_path / "out" / f"model{ending}")
    sizes = [(2, 3, 224, 224), *([(1, 3, 96, 160), (1, 3, 448, 224)] if to == "executorch" else [])]
    for size in sizes:
        images = torch.rand(size)
        with torch.no_grad():
            expected, found = features_of(source, images), run(images)
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    full, row = report.table
    assert (full["precision"], full["difference"], row["precision"]) == ("fp32", 0.0, lower)
    assert row["bytes"] < full["bytes"]
    assert 0.0 < row["difference"] < 0.6
    assert row["cosine"] > 0.98
    assert row["images"] == 8  # every second one of 16; the others calibrated
    assert 0.0 <= row["top1"] <= 1.0
    card = json.loads((tmp_path / "out/run_card.json").read_text())
    assert any(name.startswith(f"model_{lower}") for name in card["files"])
    said = " ".join(report.notes)
    assert ("multiples of 32" in said) if to == "executorch" else ("224 x 224 pixels (fixed at export)" in said)
    if to == "litert":
        with refused(ValueError, "image-size-fixed", "(3, 224, 224)", "(3, 64, 96)"):
            run(torch.rand(1, 3, 64, 96))
    if to == "executorch":
        two = executorch.executorch_runner(tmp_path / "out/model.pte", threads=2)
        images = torch.rand(1, 3, 96, 96)
        for program in (run, two, run):  # in turn: they share one pool of threads
            assert torch.allclose(program(images), run(images), atol=1e-5)


@pytest.mark.parametrize("to", RUNNERS)
def test_an_operator_that_a_runtime_lacks_is_named(tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(to)
    write_student(tmp_path / "a.pth", "resnet18", kwargs=NARROW)
    monkeypatch.setattr(MODULES[to], "fused_for_inference", lambda graph: (Bessel().eval(), []))
    with refused(ExportError, "operator-not-in-target") as caught:
        export(tmp_path / "a.pth", tmp_path / "out", to)
    assert "bessel_j0" in str(caught.value)
    assert "it lacks " in str(caught.value) or to == "executorch"  # which names it by its missing kernel
    assert not (tmp_path / "out").exists()


def test_an_operator_that_cannot_be_checked_without_core_ml_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed("coreml")

    class Sums(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.cumsum(2).mean((2, 3))

    write_student(tmp_path / "a.pth", "resnet18", kwargs=NARROW)
    monkeypatch.setattr(coreml, "fused_for_inference", lambda graph: (Sums().eval(), []))
    with refused(ExportError, "coreml-operator-unknown", "cumsum"):
        export(tmp_path / "a.pth", tmp_path / "out", "coreml")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("Lowering not found: aten.special_bessel_j0.default", "aten::special_bessel_j0"),
        ("PyTorch convert function for op 'special_bessel_j0' not implemented.", "special_bessel_j0"),
        ("Unsupported fx node special_bessel_j0_1, kind special_bessel_j0", "special_bessel_j0"),
        ("Missing out variants: {'aten::sort', 'aten::unique'}", "aten::sort, aten::unique"),
    ],
)
def test_the_operators_in_a_converter_s_words(text: str, named: str) -> None:
    with refused(ExportError, "operator-not-in-target", "--to x", f"operator {named};"), operators_named("x"):
        raise RuntimeError(text)
    with refused(ExportError, "operator-not-in-target", "KeyError: 'other'"), operators_named("x"):
        raise KeyError("other")


@pytest.mark.parametrize("to", RUNNERS)
def test_an_absent_runtime(tmp_path: Path, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_student(tmp_path / "a.pth", "test_resnet")
    real = importlib.import_module

    def without(name: str, package: str | None = None) -> ModuleType:
        if name.partition(".")[0] == LIBRARIES[to]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    monkeypatch.setattr(torch, "__version__", "2.14.1")
    wanted = ("--to " + to, LIBRARIES[to], f"pip install 'hgkd[{to}]'")
    with refused(MissingLibraryError, "target-library-missing", *wanted) as caught:
        export(tmp_path / "a.pth", tmp_path / "out", to)
    assert "in an environment" not in str(caught.value)
    monkeypatch.setattr(torch, "__version__", "2.15.0+cpu")
    monkeypatch.setattr(job_module.sys, "version_info", (3, 16, 0, "final", 0))
    with refused(MissingLibraryError, "target-library-missing", *wanted, "Python 3.10", "and this is 3.16") as caught:
        export(tmp_path / "a.pth", tmp_path / "out", to)
    assert ("litert-torch 0.10.0 takes torch 2.4 to 2.14, and this is 2.15" in str(caught.value)) == (to == "litert")
    assert not (tmp_path / "out").exists()


def test_core_ml_has_no_runner_here() -> None:
    assert TARGETS["coreml"].runner is None
    assert all(TARGETS[to].runner is not None for to in ("executorch", "litert"))


@pytest.mark.parametrize(("kernel", "stride", "side"), [(3, 2, 10), (3, 2, 11), (5, 1, 8), (2, 2, 7), (3, 3, 7)])
def test_core_ml_s_padding_is_tensorflow_s(kernel: int, stride: int, side: int) -> None:
    x = torch.rand(1, 2, side, side + 3)
    given = {"pad_type": "same", "strides": [stride, stride]}
    padded = nn.functional.pad(x, _pads(given, [kernel] * 2, [1, 1], x))
    assert torch.equal(padded, pad_same(x, [kernel] * 2, [stride] * 2))
    assert _pads({"pad_type": "custom", "pad": [1, 2, 3, 4]}, [3, 3], [1, 1], x) == [3, 4, 1, 2]
    assert _pads({"pad_type": "valid"}, [3, 3], [1, 1], x) == [0, 0, 0, 0]
