"""How students are deployed: preprocessing inside, branches fused, versions, sizes, measurements, and bad input."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from refusals import refused
from student_checkpoints import randomised, write_student
from test_graphs import SamePadded, features_of, pictures
from torch import Tensor, nn

from hgkd.errors import DataError, WeightsError
from hgkd.export import TARGETS, ExportError, Job, Target, Written, export, load_backbone, read_graph
from hgkd.export import onnx_versions as versions
from hgkd.export.measure import measured
from hgkd.export.preprocessing import inside
from hgkd.export.targets import graphs
from hgkd.weights.identify import identify
from hgkd.weights.signature import ImageInput, Signature

BRANCHED = ("repvgg_a0", "mobileone_s0", "repvit_m0_9", "fastvit_t8")


def needs(*modules: str) -> None:
    for module in modules:
        pytest.importorskip(module)


# --- preprocessing inside --------------------------------------------------------------------------------------------------


def photo(folder: Path) -> Path:
    file = folder / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(file)
    return file


GIVEN: dict[str, Callable[[Path], np.ndarray]] = {
    "nhwc-rgb": lambda file: np.asarray(Image.open(file)),
    "nhwc-bgr": lambda file: cv2.imread(str(file)),
    "nchw-rgb": lambda file: np.asarray(Image.open(file)).transpose(2, 0, 1),
    "nchw-bgr": lambda file: cv2.imread(str(file)).transpose(2, 0, 1),
}


@pytest.mark.parametrize(
    ("to", "layout", "libraries"),
    [
        ("onnx", "nhwc-bgr", ("onnxscript", "onnxruntime")),
        ("openvino", "nhwc-rgb", ("openvino",)),
        ("pt2", "nchw-bgr", ()),
        ("torchscript", "nchw-rgb", ()),
    ],
)
@torch.no_grad()
def test_graphs_take_what_pil_and_opencv_give(tmp_path: Path, to: str, layout: str, libraries: tuple[str, ...]) -> None:
    needs(*libraries)
    source, file = write_student(tmp_path / "a.pth"), photo(tmp_path)
    report = export(tmp_path / "a.pth", tmp_path / "out", to, preprocessing=layout)
    folder = read_graph(tmp_path / "out")
    assert folder.signature == report.signature
    taken = folder.signature.input
    assert (taken.dtype, taken.layout, taken.order, taken.range) == ("uint8", *layout.upper().split("-"), (0.0, 255.0))
    pixels = torch.from_numpy(np.asarray(Image.open(file)).copy())
    expected = features_of(source, pixels.permute(2, 0, 1)[None] / 255).mean((2, 3))
    found = TARGETS[to].runner(folder.file())(torch.from_numpy(GIVEN[layout](file).copy())[None])
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("layout", GIVEN)
def test_images_are_prepared_as_libraries_give_them(tmp_path: Path, layout: str) -> None:
    file = photo(tmp_path)
    taken = inside(SimpleNamespace(pretrained_cfg={"input_size": (3, 64, 96)}), layout, None)
    unit = torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1)[None] / 255
    given = torch.from_numpy(GIVEN[layout](file).copy())[None]
    assert torch.equal(taken.prepare(unit), given)
    assert torch.equal(taken.unit(given), unit)


def test_deeper_images_and_other_channels_keep_their_values() -> None:
    network = SimpleNamespace(pretrained_cfg={"input_size": (5, 32, 32)})
    deep = inside(network, "nhwc", [100, 4100])
    assert (deep.dtype, deep.order, deep.channels) == ("uint16", "", 5)
    values = torch.tensor([0, 100, 1100, 4100, 9000]).to(torch.uint16).view(1, 1, 1, 5)
    assert deep.unit(values).flatten().tolist() == [0.0, 0.0, 0.25, 1.0, 1.0]
    assert deep.prepare(torch.full((1, 5, 1, 1), 0.25)).flatten().tolist() == [1100] * 5
    assert inside(network, "nchw", [-1.0, 1.5]).dtype == "float32"
    with refused(ValueError, "preprocessing-order-of-channels", "5", "nhwc"):
        inside(network, "nhwc-bgr", None)
    with refused(ValueError, "preprocessing-unknown", "rgbx"):
        inside(SimpleNamespace(pretrained_cfg={"input_size": (3, 32, 32)}), "nhwc-rgbx", None)


@torch.no_grad()
def test_the_runs_own_value_range_is_inside(tmp_path: Path) -> None:
    source = write_student(tmp_path / "a.pth")
    checkpoint = torch.load(tmp_path / "a.pth", weights_only=False)
    checkpoint["meta"]["cfg"] = "train_dataloader = dict(dataset=dict(value_range=[0, 4095]))\n"
    torch.save(checkpoint, tmp_path / "a.pth")
    report = export(tmp_path / "a.pth", tmp_path / "out", "torchscript", preprocessing="nhwc")
    assert report.signature.input.value_range == (0.0, 4095.0)
    values = torch.randint(0, 4096, (1, 64, 64, 3)).to(torch.uint16)
    expected = features_of(source, values.float().permute(0, 3, 1, 2) / 4095).mean((2, 3))
    assert torch.allclose(torch.jit.load(tmp_path / "out/model.ts")(values), expected, rtol=1e-4)
    plain = export(tmp_path / "a.pth", tmp_path / "plain", "torchscript")
    assert any("0 and 1 stand for the values 0 and 4095" in note for note in plain.notes)


@pytest.mark.parametrize("to", ["timm", "ncnn"])
def test_targets_that_cannot_hold_it_say_so(tmp_path: Path, to: str) -> None:
    write_student(tmp_path / "a.pth")
    with refused(ValueError, "preprocessing-not-in-target", to, "onnx", "openvino", "pt2", "torchscript"):
        export(tmp_path / "a.pth", tmp_path / "out", to, preprocessing="nhwc")


def test_a_target_of_ones_own_says_whether_it_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def write(job: object) -> Written:
        given.append(job.input)
        graph = graphs.graph_of(job, None, None)
        return Written("", "nothing", graph, 1, 1, expected=graph)

    write_student(tmp_path / "a.pth")
    monkeypatch.setitem(TARGETS, "mine", Target("mine", "", write, preprocessing=True))
    export(tmp_path / "a.pth", tmp_path / "out", "mine", preprocessing="nhwc-bgr")
    assert (given[0].layout, given[0].order) == ("NHWC", "BGR")


# --- fused -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BRANCHED)
@torch.no_grad()
def test_branches_are_fused(name: str) -> None:
    trained = graphs.Graph(randomised(timm.create_model(name, num_classes=0, global_pool="")), "pooled", None).eval()
    graph, (note,) = graphs.fused_for_inference(trained)
    convolutions = [sum(isinstance(m, nn.Conv2d) for m in net.modules()) for net in (trained, graph)]
    assert convolutions[1] < convolutions[0]
    assert f"{convolutions[1]} convolutions of the {convolutions[0]}" in note
    images = torch.rand(2, 3, 64, 96)
    expected = trained(images)
    assert (graph(images) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_batch_norms_are_accounted_for() -> None:
    trained = graphs.Graph(timm.create_model("mobilenetv4_conv_small", num_classes=0, global_pool=""), "pooled", None)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in trained.modules())
    assert graphs.fused_for_inference(trained)[1] == []
    assert f"{norms} were trained, 0 are left" in graphs.norms_note(trained, 0)
    assert f"the {norms} that were trained are layers of the file" in graphs.norms_note(trained)


# --- versions of ONNX ------------------------------------------------------------------------------------------------------


def tiny_onnx(opset: int = 18, operator: str = "Relu", **attributes: object) -> object:
    onnx = pytest.importorskip("onnx")
    size = ["b", 3, "h", "w"]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, size) for name in ("images", "out")]
    node = onnx.helper.make_node(operator, ["images"], ["out"], **attributes)
    graph = onnx.helper.make_graph([node], "tiny", ends[:1], ends[1:])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)


def test_the_lowest_opset_is_found() -> None:
    low = versions.in_version(tiny_onnx(), None, None, lambda model: True)
    assert (versions.opset_of(low), low.ir_version) == (14, 7)  # the converter has no way below
    assert versions.opset_of(versions.in_version(tiny_onnx(), None, None, lambda model: True, floor=16)) == 16
    late = versions.in_version(tiny_onnx(20, "Gelu"), None, None, lambda model: True)  # came with 20
    assert versions.opset_of(late) == 20
    asked = versions.in_version(tiny_onnx(), 15, 9, lambda model: True)
    assert (versions.opset_of(asked), asked.ir_version) == (15, 9)
    # a version that a runtime does not read is none
    assert versions.opset_of(versions.in_version(tiny_onnx(), None, None, lambda m: versions.opset_of(m) > 15)) == 16


def test_versions_that_cannot_be_had() -> None:
    with refused(ValueError, "opset-not-reached", "17", "20"):
        versions.in_version(tiny_onnx(20, "Gelu"), 17, None, lambda model: True)
    with refused(ValueError, "opset-computes-otherwise", "16"):
        versions.in_version(tiny_onnx(), 16, None, lambda model: False)
    with refused(ValueError, "ir-version-too-low", "18", "8", "7"):
        versions.in_version(tiny_onnx(), 18, 7, lambda model: True)
    with refused(ValueError, "ir-version-unknown", "99"):
        versions.check_versions(None, 99)
    with refused(ValueError, "opset-unknown", "11", "13"):
        versions.check_versions(11, None, int8=True)


@pytest.mark.parametrize(
    ("opset", "ir", "least"), [(14, 7, "1.8"), (17, 8, "1.12"), (18, 8, "1.14"), (14, 9, "1.16"), (21, 10, "1.18")]
)
def test_least_runtime(opset: int, ir: int, least: str) -> None:
    assert versions.least_runtime(opset, ir) == least


def test_a_runtime_newer_than_the_table() -> None:
    assert versions.least_runtime(25, 13) == "later than 1.20"


# --- sizes -----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_same_padded_networks_in_openvino() -> None:
    openvino = pytest.importorskip("openvino")
    network = SamePadded().eval()
    graph = graphs.Graph(network, "features", None).eval()
    program = graphs.exported_program(SimpleNamespace(image_size=(64, 64), network=network), graph)
    compiled = openvino.Core().compile_model(openvino.convert_model(program), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for size in [(1, 3, 97, 130), (3, 3, 64, 64), (1, 3, 111, 95)]:
        images = torch.rand(size)
        expected = features_of(network, images)
        found = torch.from_numpy(compiled(images.numpy())[0])
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("side", [224, 200])
@torch.no_grad()
def test_same_padded_networks_in_ncnn_say_their_sizes(tmp_path: Path, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("ncnn", "pnnx")
    name = "tf_mobilenetv3_small_minimal_100"
    monkeypatch.setattr(Job, "image_size", (side, side))
    source = write_student(tmp_path / "a.pth", name)
    report = export(tmp_path / "a.pth", tmp_path / "out", "ncnn", output="features")
    taken = report.signature.input
    run = TARGETS["ncnn"].runner(tmp_path / "out/model.ncnn.param")
    for size in [(64, 224), (96, 160)] if side == 224 else [(200, 200)]:
        taken.check_size(*size)
        images = torch.rand(1, 3, *size)
        expected = features_of(source, images)
        assert (run(images) - expected).abs().max() <= 1e-4 * expected.abs().max()
    with refused(ValueError, "graph-image-size", "97 x 131"):
        taken.check_size(97, 131)
    assert any(("multiples of 32" if side == 224 else "200 x 200 pixels (fixed at export)") in note for note in report.notes)


def test_a_graph_that_is_right_at_its_own_size_alone_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(job: object) -> Written:
        graph = graphs.graph_of(job, None, None)

        def wrong(images: Tensor) -> Tensor:
            return graph(images) + (images.shape[2] % 2)

        return Written("", "nothing", wrong, 1, 1, expected=graph)

    write_student(tmp_path / "a.pth")
    monkeypatch.setitem(TARGETS, "mine", Target("mine", "", write, runner=lambda file, threads: None))
    with refused(ExportError, "graph-wrong-at-a-size", "160 x 160", "177 x 169"):
        export(tmp_path / "a.pth", tmp_path / "out", "mine")


# --- measured --------------------------------------------------------------------------------------------------------------


def test_latency_and_memory_of_every_file(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    needs("onnxruntime")
    onnx.save(tiny_onnx(), tmp_path / "model.onnx")
    (row,) = measured(TARGETS["onnx"], tmp_path, [{"file": "model.onnx", "bytes": 100}], ImageInput(), 512, repeats=3)
    assert (row["file"], row["bytes"]) == ("model.onnx", 100)
    assert row["ms"] > 0
    assert row["ms, 2 threads"] > 0
    if Path("/proc/self/clear_refs").exists():
        assert 3.1 < row["peak MB"] < 200  # its result alone is 3.1


def test_a_size_that_the_graph_does_not_take_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("hgkd.export.measure.print_log", lambda text, *_: said.append(text))
    rows = [{"file": "model.onnx", "bytes": 100}]
    assert measured(TARGETS["onnx"], Path(), rows, ImageInput(multiple=32), 100) == rows
    assert "not timed: the graph takes images of any size in multiples of 32, not of 100 x 100" in said[0]


def test_what_cannot_be_timed(tmp_path: Path) -> None:
    write_student(tmp_path / "a.pth")
    with refused(ValueError, "latency-needs-graphs", "timm", "onnx"):
        export(tmp_path / "a.pth", tmp_path / "out", "timm", latency=64)
    with refused(ValueError, "latency-size", "0"):
        export(tmp_path / "a.pth", tmp_path / "out", "torchscript", latency=0)


def test_accuracy_is_compared_with_fp32() -> None:
    job = SimpleNamespace(images=torch.rand(8, 3, 8, 8), labels=torch.tensor([0, 1, 0, 0, 0, 1, 0, 0]))
    right, wrong = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0]] * 4)
    found = graphs.agreement(job, "logits", lambda x: right, lambda x: wrong)
    assert (found["top1"], found["top1_change"]) == (0.5, -0.5)


# --- bad input -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["source", "file"])
def test_values_that_are_not_finite_fail(tmp_path: Path, value: float, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(images: Tensor) -> Tensor:
        return torch.full((len(images), 2), value)

    def whole(images: Tensor) -> Tensor:
        return torch.ones(len(images), 2)

    def write(job: object) -> Written:
        found, expected = (whole, broken) if where == "source" else (broken, whole)
        return Written("", "nothing", found, 1, 1, expected=expected, tolerance=float("nan"))

    write_student(tmp_path / "a.pth")
    monkeypatch.setitem(TARGETS, "mine", Target("mine", "", write))
    code = "source-outputs-not-finite" if where == "source" else "export-outputs-not-finite"
    with refused(ExportError, code):
        export(tmp_path / "a.pth", tmp_path / "out", "mine")


def test_a_tolerance_of_nan_passes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(job: object) -> Written:
        return Written("", "nothing", lambda x: torch.ones(2), 1, 1, lambda x: torch.ones(2), tolerance=float("nan"))

    write_student(tmp_path / "a.pth")
    monkeypatch.setitem(TARGETS, "mine", Target("mine", "", write))
    with refused(ExportError, "export-outputs-differ"):
        export(tmp_path / "a.pth", tmp_path / "out", "mine")


class Singular(nn.Module):
    """An operator that runtimes of CNNs do not have."""

    num_features = 3
    pretrained_cfg = SamePadded.pretrained_cfg

    def forward_features(self, images: Tensor) -> Tensor:
        return images * torch.linalg.svdvals(images.mean((2, 3))).mean()


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_an_operator_that_a_target_lacks_is_named(to: str) -> None:
    needs(*(("onnxscript", "onnxruntime") if to == "onnx" else ("openvino",)))
    graph = graphs.Graph(Singular(), "features", None).eval()
    job = SimpleNamespace(image_size=(64, 64))
    with refused(ExportError, "operator-not-in-target", to, "aten::_linalg_svd"):
        if to == "onnx":
            graphs._onnx_by_torch(job, graph, None)
        else:
            with graphs.quiet(), graphs.operators_named("openvino"):
                __import__("openvino").convert_model(graphs.exported_program(job, graph))


def test_images_for_calibration(tmp_path: Path) -> None:
    needs("onnxscript", "onnxruntime")
    write_student(tmp_path / "a.pth")
    (tmp_path / "empty").mkdir()
    with refused(DataError, "no-images-to-compare", "empty"):
        export(tmp_path / "a.pth", tmp_path / "out", "onnx", precision=["int8"], images=tmp_path / "empty")
    pixels = {"pixels": [[0.5] * 4, [0.2] * 4]}
    write_student(tmp_path / "b.pth", kwargs={"in_chans": 4})
    checkpoint = torch.load(tmp_path / "b.pth", weights_only=False)
    checkpoint["meta"]["hgkd"]["encoder"] |= pixels
    torch.save(checkpoint, tmp_path / "b.pth")
    with refused(DataError, "image-unreadable", "3", "4"):
        export(tmp_path / "b.pth", tmp_path / "out", "onnx", precision=["int8"], images=pictures(tmp_path / "p"))
    assert not (tmp_path / "out").exists()


def test_two_targets_in_one_folder(tmp_path: Path) -> None:
    write_student(tmp_path / "a.pth")
    export(tmp_path / "a.pth", tmp_path / "out", "torchscript")
    with refused(FileExistsError, "folder-of-another-target", "torchscript", "timm"):
        export(tmp_path / "a.pth", tmp_path / "out", "timm")
    with refused(FileExistsError, "folder-not-empty"):
        export(tmp_path / "a.pth", tmp_path / "out", "torchscript")
    export(tmp_path / "a.pth", tmp_path / "out", "timm", force=True)
    assert not (tmp_path / "out/model.ts").exists()


def test_a_folder_that_was_changed_is_refused(tmp_path: Path) -> None:
    write_student(tmp_path / "a.pth")
    for to, file, read in (("timm", "model.safetensors", load_backbone), ("torchscript", "model.ts", read_graph)):
        folder = tmp_path / to
        export(tmp_path / "a.pth", folder, to)
        read(folder)
        content = bytearray((folder / file).read_bytes())
        content[-1] ^= 1
        (folder / file).write_bytes(content)
        with refused(WeightsError, "export-file-changed", file):
            read(folder)
        with refused(WeightsError, "export-file-changed", file):
            identify(folder / file)
        (folder / file).unlink()
        with refused(FileNotFoundError, "export-file-missing", file):
            read(folder)
    with refused(FileNotFoundError, "export-folder-missing", "nowhere"):
        read_graph(tmp_path / "nowhere")
    with refused(FileNotFoundError, "export-card-missing"):
        read_graph(tmp_path)


def test_signatures_are_read_strictly(tmp_path: Path) -> None:
    write_student(tmp_path / "a.pth")
    export(tmp_path / "a.pth", tmp_path / "timm", "timm")
    with refused(WeightsError, "export-without-signature"):
        read_graph(tmp_path / "timm")
    export(tmp_path / "a.pth", tmp_path / "out", "torchscript")
    graph = read_graph(tmp_path / "out")
    with refused(WeightsError, "export-lacks-precision", "int8", "fp32"):
        graph.file("int8")
    noted = json.loads(json.dumps(graph.signature.to_dict()))
    assert Signature.parse(noted, "x") == graph.signature
    with refused(WeightsError, "export-signature-newer", "2"):
        Signature.parse({**noted, "format": 2}, "x")
    with refused(WeightsError, "export-signature-incomplete"):
        Signature.parse({key: value for key, value in noted.items() if key != "input"}, "x")


def test_sizes_in_words() -> None:
    assert replace(ImageInput(), height=300, width=300).sizes == "300 x 300 pixels (fixed at export)"
    assert ImageInput(least=64, multiple=32).sizes == "sides from 64 pixels in multiples of 32"
