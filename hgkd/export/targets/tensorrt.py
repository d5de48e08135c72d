"""Whether TensorRT takes an ONNX file, by the operators that it is published to take. Nothing is run: it needs an NVIDIA GPU.

The operators, the opsets and the restriction of zero points are those of
https://github.com/onnx/onnx-tensorrt/blob/main/docs/operators.md, as it was for TensorRT 10.15. Its other restrictions (of
types, and of values that must be constant) are not checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from hgkd.export.job import need

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

RELEASE = "TensorRT 10.15"
OPSETS = range(9, 25)
OPERATORS = frozenset(
    """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool BatchNormalization BlackmanWindow
    Cast CastLike Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DeformConv
    DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather
    GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample
    GroupNormalization HammingWindow HannWindow HardSigmoid HardSwish Hardmax Identity If ImageScaler
    InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop
    LpNormalization LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression
    NonZero Not OneHot Or PRelu Pad ParametricSoftplus Pow QuantizeLinear RMSNormalization RNN RandomNormal
    RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp
    ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign
    RotaryEmbedding Round STFT ScaledTanh Scan Scatter ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh
    Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh TensorScatter ThresholdedRelu
    Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor
    """.split()
)
_QUANTISERS = ("QuantizeLinear", "DequantizeLinear")


def tensorrt_note(file: Path) -> str:
    """What the published list says of an ONNX file, in one line."""
    (onnx,) = need("onnx", "onnx")
    found = tensorrt_objections(onnx.load(str(file)))
    said = f"does not take it: {'; '.join(found)}" if found else "takes its operators"
    return f"{file.name} and {RELEASE}, by its published list of operators, not run: {said}"


def tensorrt_objections(model: ModelProto) -> list[str]:
    """Why TensorRT would refuse a model, by its published list; empty: nothing known against it."""
    (numpy_helper,) = need("onnx", "onnx.numpy_helper")
    nodes = list(_nodes(model.graph))
    own = {function.name for function in model.functions}
    absent = sorted({_name(node) for node in nodes if _name(node) not in OPERATORS | own})
    found = [f"it lacks {', '.join(absent)}"] if absent else []
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None)
    if opset is not None and opset not in OPSETS:
        found.append(f"opset {opset} is not one of {OPSETS[0]} to {OPSETS[-1]}")
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    offset = [
        node
        for node in nodes
        if node.op_type in _QUANTISERS
        and len(node.input) > 2
        and node.input[2] in values
        and numpy_helper.to_array(values[node.input[2]]).any()
    ]
    if offset:
        found.append(f"{len(offset)} of its quantisers have a zero point other than 0")
    return found


def _name(node: NodeProto) -> str:
    """An operator's name, with its domain where it is not ONNX's own."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """The nodes of a graph and of the graphs within them (branches and loops)."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _nodes(inner)
