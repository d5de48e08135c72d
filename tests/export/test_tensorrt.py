"""TensorRT's published operators: what the ONNX of a student is told of, and what would be refused is named."""

from pathlib import Path

import pytest
from student_checkpoints import write_student
from test_graphs import pictures

from hgkd.export import export
from hgkd.export.targets.tensorrt import OPERATORS, tensorrt_objections

onnx = pytest.importorskip("onnx", reason="pip install 'hgkd[export]'")
from onnx import TensorProto, helper  # noqa: E402


def model_of(*nodes: object, opset: int = 18, initializer: tuple = ()) -> object:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph(list(nodes), "g", values[:1], values[1:], list(initializer))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def test_what_the_list_lacks_is_named_also_within_branches() -> None:
    inner = helper.make_graph([helper.make_node("Unique", ["x"], ["z"])], "inner", [], [])
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("If", ["a"], ["b"], then_branch=inner, else_branch=inner),
        helper.make_node("MyNorm", ["b"], ["c"], domain="my.own"),
        helper.make_node("BitShift", ["c"], ["y"]),
    ]
    assert tensorrt_objections(model_of(*nodes)) == ["it lacks BitShift, Unique, my.own.MyNorm"]
    assert tensorrt_objections(model_of(nodes[0])) == []


def test_an_opset_beyond_the_list_is_named() -> None:
    relu = helper.make_node("Relu", ["x"], ["y"])
    assert tensorrt_objections(model_of(relu, opset=25)) == ["opset 25 is not one of 9 to 24"]
    assert tensorrt_objections(model_of(relu, opset=24)) == []


@pytest.mark.parametrize(("zero", "found"), [(0, []), (3, ["1 of its quantisers have a zero point other than 0"])])
def test_zero_points(zero: int, found: list[str]) -> None:
    constants = (helper.make_tensor("s", TensorProto.FLOAT, [], [0.1]), helper.make_tensor("z", TensorProto.INT8, [], [zero]))
    assert (
        tensorrt_objections(model_of(helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"]), initializer=constants))
        == found
    )


def test_the_operators_are_onnx_s_own_but_for_those_of_old_versions() -> None:
    # ImageScaler, ParametricSoftplus and ScaledTanh were ONNX's experiments; its checker knows them no more
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history()}
    assert OPERATORS - known <= {"ImageScaler", "ParametricSoftplus", "ScaledTanh"}
    assert {"Conv", "Gemm", "ReduceMean"} <= OPERATORS


def test_the_report_says_what_the_list_says(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="pip install 'hgkd[export]'")
    pytest.importorskip("onnxscript", reason="pip install 'hgkd[export]'")
    write_student(tmp_path / "a.pth", "test_resnet")
    report = export(tmp_path / "a.pth", tmp_path / "out", "onnx", precision=["int8"], images=pictures(tmp_path / "pictures"))
    notes = {note.split()[0]: note for note in report.notes if "TensorRT" in note}
    assert notes["model.onnx"].endswith("not run: takes its operators")
    assert "zero point other than 0" in notes["model_int8.onnx"]  # onnxruntime quantises activations with one
    assert "not run: takes its operators" in (tmp_path / "out/run_card.md").read_text()
