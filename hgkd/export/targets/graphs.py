"""Graphs: ONNX for onnxruntime, and torch's own exported program (.pt2).

Both take images in [0, 1], RGB, (B, 3, H, W) as float32, of any batch and size: the normalisation is inside; or the values of
image files (:mod:`hgkd.export.preprocessing`). Both come from one ``torch.export`` (torch 2.4 and later); ONNX by torch's
translator of such programs (onnxscript).

Networks with branches that only training needs (MobileOne, RepVGG, RepViT, FastViT) leave as timm fuses them
(``timm.utils.reparameterize_model``); the fused graph must agree with the network as trained to 1e-4, every other one to 1e-5.

fp16 and int8 ONNX are for edge devices: fp16 by onnxruntime's converter with float32 inputs and outputs; int8 by its static
quantisation (QDQ, weights per channel), calibrated on every second one of the given images. Their outputs differ from fp32 on
purpose: how much is measured, on the others, and stands in the report. onnxruntime's CPU computes fp16 graphs in fp32 between
nodes and hides overflow, so every value inside is compared with fp16's largest number.
"""

from __future__ import annotations

import ast
import io
import logging
import math
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

import numpy as np
import timm
import torch
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional

from hgkd.differences import largest_difference
from hgkd.errors import InvalidValueError, MissingFileError, Refusal, WeightsError, unknown_name_message
from hgkd.export.job import ExportError, Job, Target, Written, count_parameters, input_of, need
from hgkd.export.onnx_versions import (
    INT8_LEAST,
    LEAST_OPSET,
    OPSET_OF_TORCH,
    check_versions,
    in_version,
    least_runtime,
    opset_of,
    set_ir,
)
from hgkd.export.targets.tensorrt import tensorrt_note
from hgkd.networks.encoder import encoder_levels
from hgkd.networks.taps import last_channels
from hgkd.pixels import PixelNormalisation, pixel_statistics
from hgkd.weights.files import read_weights
from hgkd.weights.signature import ImageInput

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

OUTPUTS = ("features", "pooled", "logits")
PRECISIONS = ("fp32", "fp16", "int8")
LEAST_IMAGES = 8
_INPUT = "images"
_FUSED_TOLERANCE = 1e-4
FP16_LARGEST = 65504.0
# as torch names them, and in coremltools' words
_OPERATOR = re.compile(
    r"\b(?P<library>aten|prims?|torchvision|hgkd|mmcv)(?:::|\.)(?P<name>\w+)|(?:\bop '|fx node \w+, kind )(?P<own>\w+)"
)


class Graph(PixelNormalisation):
    """Images -> the last feature map (B, C, h, w), its mean over places (B, C), or logits (B, K).

    Args:
        network: timm's, normalised images in.
        output: one of ``OUTPUTS``.
        classifier: linear layer on the pooled features, for 'logits'.
        whole: the network gives logits itself.
        taken: what the images are; None: (B, C, H, W) in [0, 1].
    """

    pixels_in_state = True

    def __init__(
        self,
        network: nn.Module,
        output: str,
        classifier: nn.Linear | None,
        whole: bool = False,
        taken: ImageInput | None = None,
    ) -> None:
        super().__init__()
        self.taken = taken or input_of(network)
        self.set_pixels(*pixel_statistics(network))
        self.network, self.output, self.classifier, self.whole = network, output, classifier, whole

    def forward(self, images: Tensor) -> Tensor:
        normalised = self.normalise(self.taken.unit(images))
        if self.whole:
            logits: Tensor = self.network(normalised)
            return logits
        features: Tensor = cast(Any, self.network).forward_features(normalised)
        if self.output == "features":
            return features
        pooled = features.mean((2, 3))
        return pooled if self.classifier is None else self.classifier(pooled)


def write_onnx(
    job: Job,
    *,
    output: str | None = None,
    classifier: str | os.PathLike[str] | None = None,
    opset: int | None = None,
    ir_version: int | None = None,
    precision: Sequence[str] = (),
) -> Written:
    """``model.onnx``, and ``model_fp16.onnx`` and ``model_int8.onnx`` when asked for.

    Args:
        output: 'features', 'pooled' or 'logits'; None: logits of a classifier, else pooled.
        classifier: for 'logits', a safetensors file with ``weight`` (K, C) and ``bias`` (K).
        opset, ir_version: of ONNX's operators and its format, see :mod:`hgkd.export.onnx_versions`; None: the lowest that the
            network allows. ValueError where it cannot be had in these.
        precision: further precisions, of 'fp16' and 'int8'; int8 needs real images.
    """
    trained = graph_of(job, output, classifier)
    output = trained.output
    extra = lower_precisions(job, precision)
    known = cast(int, job.network.num_classes) if trained.whole else getattr(trained.classifier, "out_features", None)
    if known is not None and job.labels is not None and job.labels.max() >= known:
        raise InvalidValueError(
            "calibration-classes-differ",
            f"the images are of {int(job.labels.max()) + 1} classes, the classifier knows {known}; "
            "give images in the class folders that it was trained with",
        )
    onnx, onnxruntime, _ = need("onnx", "onnx", "onnxruntime", "onnxscript")
    if extra:
        need("onnx", "onnxruntime.quantization")
    check_versions(opset, ir_version, "int8" in extra)

    graph, notes = fused_for_inference(trained)
    by_torch = _onnx_by_torch(job, graph, opset)
    model = in_version(
        by_torch,
        opset,
        ir_version,
        lambda found: _computes(found, trained, job),
        INT8_LEAST if "int8" in extra else LEAST_OPSET,
    )
    notes.append(norms_note(trained, sum(node.op_type == "BatchNormalization" for node in model.graph.node)))
    file = job.folder / "model.onnx"
    onnx.save(model, str(file))
    onnx.checker.check_model(str(file))
    run = onnx_runner(file)
    files, needs = {"fp32": file}, [(opset_of(model), model.ir_version)]
    for name in extra:
        lower = files[name] = job.folder / f"model_{name}.onnx"
        with quiet():
            notes += _LOWER[name](job, file, lower, by_torch)
        made = onnx.load(str(lower))
        set_ir(made, model.ir_version)
        onnx.save(made, str(lower))
        onnx.checker.check_model(str(lower))
        onnx_runner(lower)
        needs.append((opset_of(made), made.ir_version))
    opset, ir_version = max(needs)
    least = least_runtime(opset, ir_version)
    notes += [tensorrt_note(found) for found in files.values()]
    return Written(
        load_with=f"session = onnxruntime.InferenceSession('{job.out / file.name}')\n"
        f"session.run(None, {{'{_INPUT}': images}})  # {job.input.about}",
        proven_with=f"onnxruntime {onnxruntime.__version__}",
        reloaded=run,
        expected=trained,
        tensors=len(model.graph.initializer),
        parameters=count_parameters(graph),
        notes=[
            f"opset {opset}, IR version {ir_version}: read by onnxruntime {least} and later, by its published table",
            f"input: {job.input.about}; output {output}",
            *notes,
        ],
        requires={"onnxruntime": least, "opset": opset, "ir_version": ir_version},
        table=precision_table(job, output, files, onnx_runner),
        tolerance=_tolerance(trained, graph),
    )


def pt2_runner(file: Path, threads: int = 1) -> Callable[[Tensor], Tensor]:
    """A program of ``torch.export`` on the CPU: images as it takes them -> its output."""
    return with_threads(torch.export.load(str(file)).module(), threads)


def torchscript_runner(file: Path, threads: int = 1) -> Callable[[Tensor], Tensor]:
    """A TorchScript file on the CPU: images as it takes them -> its output."""
    with quiet():
        return with_threads(torch.jit.load(str(file)).eval(), threads)


def with_threads(module: nn.Module, threads: int) -> Callable[[Tensor], Tensor]:
    """A module of torch's as a runner: images as it takes them -> its output, on so many threads."""

    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return cast(Tensor, module(images))
        finally:
            torch.set_num_threads(before)

    return run


def write_pt2(job: Job, *, output: str | None = None, classifier: str | os.PathLike[str] | None = None) -> Written:
    """``model.pt2``; arguments as :func:`write_onnx`."""
    trained = graph_of(job, output, classifier)
    graph, notes = fused_for_inference(trained)
    file = job.folder / "model.pt2"
    memory = io.BytesIO()  # torch's own writer aborts the process when the disk is full
    torch.export.save(exported_program(job, graph), memory)
    file.write_bytes(memory.getbuffer())
    again = pt2_runner(file)
    # torch takes for granted that no axis shrinks to 1 within
    taken = replace(job.input, least=2 * encoder_levels(job.network)[-1].stride)
    return Written(
        load_with=f"torch.export.load('{job.out / file.name}').module()  # {job.input.about}",
        proven_with=f"torch {torch.__version__}",
        reloaded=again,
        expected=trained,
        tensors=len(graph.state_dict()),
        parameters=count_parameters(graph),
        notes=[f"input: {taken.about}; output {graph.output}", *notes, norms_note(trained)],
        table=precision_table(job, trained.output, {"fp32": file}, pt2_runner),
        tolerance=_tolerance(trained, graph),
        input=taken,
    )


def write_torchscript(job: Job, *, output: str | None = None, classifier: str | os.PathLike[str] | None = None) -> Written:
    """``model.ts``, traced; arguments as :func:`write_onnx`. For users of it only: torch has declared TorchScript ended."""
    trained = graph_of(job, output, classifier)
    graph, notes = fused_for_inference(trained)
    file = job.folder / "model.ts"
    with quiet():
        traced = torch.jit.trace(graph, job.random_images(2, *job.image_size))
        memory = io.BytesIO()  # see above
        torch.jit.save(traced, memory)
        file.write_bytes(memory.getbuffer())
    return Written(
        load_with=f"torch.jit.load('{job.out / file.name}')  # {job.input.about}",
        proven_with=f"torch {torch.__version__}",
        reloaded=torchscript_runner(file),
        expected=trained,
        tensors=len(graph.state_dict()),
        parameters=count_parameters(graph),
        notes=[
            "TorchScript is deprecated in torch; prefer --to pt2 or onnx",
            f"input: {job.input.about}; output {graph.output}",
            *notes,
            norms_note(trained),
        ],
        table=precision_table(job, trained.output, {"fp32": file}, torchscript_runner),
        tolerance=_tolerance(trained, graph),
    )


def lower_precisions(job: Job, asked: Sequence[str], known: tuple[str, ...] = PRECISIONS) -> list[str]:
    """The precisions below fp32 that are asked for, in the order of ``known``.

    Args:
        known: those of the target, fp32 first.

    Raises:
        ValueError: one is unknown, or int8 has no images to be calibrated on.
    """
    for name in asked:
        if name not in known:
            raise InvalidValueError("precision-unknown", unknown_name_message("precision", name, known))
    if "int8" in asked and (job.images is None or len(job.images) < LEAST_IMAGES):
        raise InvalidValueError(
            "int8-without-images",
            f"int8 is calibrated and measured on images: give a folder of {LEAST_IMAGES} or more with images=",
        )
    return [name for name in known[1:] if name in asked]


def onnx_runner(file: Path, threads: int = 1) -> Callable[[Tensor], Any]:
    """A graph on the CPU: images as it takes them -> its output, or a list of several."""
    (onnxruntime,) = need("onnx", "onnxruntime")
    session = onnxruntime.InferenceSession(str(file), _options(threads), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Any:
        found = [torch.from_numpy(value) for value in session.run(None, {name: images.numpy()})]
        return found[0] if len(found) == 1 else found

    return run


def _options(threads: int = 1) -> object:
    """onnxruntime's options: errors alone are printed."""
    (onnxruntime,) = need("onnx", "onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    return options


def graph_of(job: Job, output: str | None, classifier: str | os.PathLike[str] | None) -> Graph:
    if job.part == "classifier":
        if classifier is not None or output not in (None, "logits"):
            raise InvalidValueError(
                "logits-of-classifier",
                "a classifier gives the logits of its own head; leave output and the classifier file out",
            )
        return Graph(job.network, "logits", None, whole=True, taken=job.input).eval()
    output = output or "pooled"
    if output not in OUTPUTS:
        raise InvalidValueError("graph-output-unknown", unknown_name_message("output", output, OUTPUTS))
    if (output == "logits") != (classifier is not None):
        raise InvalidValueError(
            "logits-without-classifier",
            "output='logits' and a classifier file (safetensors with weight (K, C) and bias (K)) go together",
        )
    linear = None if classifier is None else _linear(Path(classifier).expanduser(), job.network)
    return Graph(job.network, output, linear, taken=job.input).eval()


def _linear(file: Path, network: nn.Module) -> nn.Linear:
    if not file.is_file():
        raise MissingFileError(
            "linear-classifier-missing",
            f"classifier {file} does not exist; expected safetensors with weight (K, C) and bias (K)",
        )
    state = read_weights(file)
    channels = last_channels(network)
    weight = state.get("weight")
    if set(state) != {"weight", "bias"} or weight is None or weight.dim() != 2 or weight.shape[1] != channels:
        found = {key: tuple(value.shape) for key, value in state.items()}
        raise WeightsError(
            "linear-classifier-shape",
            f"{file} holds {found}, expected weight (K, {channels}) and bias (K) of a linear classifier",
        )
    layer = nn.Linear(channels, weight.shape[0])
    layer.load_state_dict(state)
    return layer


def fused_for_inference(graph: Graph) -> tuple[Graph, list[str]]:
    """The graph with branches that only training needs fused, in a copy, and what was fused; itself where there are none."""
    network = reparameterize_model(graph.network)
    if len(list(network.modules())) == len(list(graph.network.modules())):
        return graph, []
    before, after = (sum(isinstance(m, nn.Conv2d) for m in net.modules()) for net in (graph.network, network))
    fused = Graph(network, graph.output, graph.classifier, graph.whole, graph.taken).eval()
    return fused, [f"fused for inference, as timm does it: {after} convolutions of the {before} that were trained"]


def norms_note(trained: Graph, left: int | None = None) -> str:
    """What became of a network's BatchNorms.

    Args:
        left: in the written graph; None: they all stay, and what runs the graph may fold them.
    """
    total = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in trained.network.modules())
    if not total:
        return "BatchNorm: the network has none"
    if left is None:
        return f"BatchNorm: the {total} that were trained are layers of the file; other targets fold them into convolutions"
    return f"BatchNorm: {total} were trained, {left} are left in the file, the others are folded into convolutions"


def _tolerance(trained: Graph, graph: Graph) -> float | None:
    """Of the proof; fusing rounds anew."""
    return None if graph is trained else _FUSED_TOLERANCE


def _pad_same(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int] = (1, 1), value: float = 0.0
) -> Tensor:
    """timm's ``pad_same`` for a convolution or pooling that follows, in a form that ``torch.export`` can follow at free sides.

    timm's amounts depend on the side by maxima and roundings that nest from layer to layer, and the time of ``torch.export``
    triples with each. Here the amounts are constants, and the rows that this side needs are gathered: the resulting side is
    a plain quotient, and what depends on the side's remainder is a value in the graph, not a shape.

    Args:
        x: (B, C, H, W).
    """
    reach = [(k - 1) * d + 1 for k, d in zip(kernel_size, dilation, strict=True)]  # places that a window spans
    top, left = ((r - 1) // 2 for r in reach)
    sides = x.shape[-2:]
    x = functional.pad(x, (left, reach[1] - 1 - left, top, reach[0] - 1 - top), value=value)
    for axis, (side, r, s) in enumerate(zip(sides, reach, stride, strict=True)):
        if s > 1:
            whole = (side + s - 1) // s * s  # not by %, which OpenVINO does not convert
            length, needed = whole - s + r, whole - side + r - s  # of ceil(side / s) windows
            before = (needed if r >= s else torch.sym_max(needed, 0)) // 2
            x = x.index_select(axis + 2, torch.arange(length, device=x.device) + ((r - 1) // 2 - before))
    return x


@torch.no_grad()
def pads_same(graph: Graph, images: Tensor) -> bool:
    """Whether a layer pads by the size of its image, as TensorFlow does, which a graph of constants cannot."""
    seen = mock.Mock(side_effect=timm.layers.pad_same)
    with _padding(seen):
        graph(images)
    return seen.called


@contextmanager
def _padding(ours: Callable[..., Tensor]) -> Iterator[None]:
    """timm's 'same' layers with another ``pad_same``, wherever a module of timm has imported theirs."""
    theirs = timm.layers.pad_same
    users = [
        m for name, m in list(sys.modules.items()) if name.startswith("timm.layers.") and vars(m).get("pad_same") is theirs
    ]
    with ExitStack() as stack:
        for module in users:
            stack.enter_context(mock.patch.object(module, "pad_same", ours))
        yield


def exported_program(job: Job, graph: nn.Module, batch: int = 2, free: Mapping[int, object] | None = None) -> ExportedProgram:
    """The graph as torch's program, by default for any batch and image size.

    Args:
        graph: of :func:`graph_of`, or what a quantiser has made of its program.
        batch: of the example.
        free: axis -> what torch takes for its range; empty: this batch, at the network's own size, and no other.
    """
    height, width = job.image_size
    taken = graph.taken if isinstance(graph, Graph) else job.input
    if free is None:
        free = {0: Dim.DYNAMIC, taken.axis("H"): Dim.DYNAMIC, taken.axis("W"): Dim.DYNAMIC}
    if not free:
        return torch.export.export(graph, (taken.prepare(torch.rand(batch, taken.channels, height, width)),))
    # sides that differ from each other and from those of the proof, so that neither is taken for a constant
    example = taken.prepare(torch.rand(batch, taken.channels, height, 2 * width))
    with _padding(_pad_same):
        return torch.export.export(graph, (example,), dynamic_shapes={"images": free})


def _onnx_by_torch(job: Job, graph: Graph, opset: int | None) -> ModelProto:
    """The graph as torch writes it, in ``opset`` or in the lowest that it writes.

    Raises:
        ValueError: torch cannot write that opset of this network.
        ExportError: ONNX, or torch's translator, lacks an operator.
    """
    asked = max(opset or OPSET_OF_TORCH, OPSET_OF_TORCH)
    with quiet(), operators_named("onnx"):
        program = torch.onnx.export(
            exported_program(job, graph),
            dynamo=True,
            opset_version=asked,
            input_names=[_INPUT],
            output_names=[graph.output],
            verbose=False,
        )
    model = cast(torch.onnx.ONNXProgram, program).model_proto
    written = opset_of(model)
    if written != asked:
        raise InvalidValueError(
            "opset-not-written",
            f"torch {torch.__version__} cannot write opset {asked} of this network, only {written}; give {written}",
        )
    return model


@torch.no_grad()
def _computes(model: ModelProto, trained: Graph, job: Job) -> bool:
    """Whether onnxruntime reads a model and computes what the graph does, on random images of two shapes."""
    (onnxruntime,) = need("onnx", "onnxruntime")
    height, width = job.image_size
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), _options(), providers=["CPUExecutionProvider"])
        for batch in (job.random_images(2, height, width), job.random_images(1, 2 * height, width)):
            found = torch.from_numpy(session.run(None, {_INPUT: batch.numpy()})[0])
            if not largest_difference(found, trained(batch)) <= _FUSED_TOLERANCE:
                return False
    except Exception:
        # what onnxruntime's C++ raises for operators and types that it does not read in an opset
        return False
    return True


@contextmanager
def operators_named(target: str) -> Iterator[None]:
    """Within, a converter's failure becomes an error that names the operators that it speaks of.

    Raises:
        ExportError: a converter failed.
    """
    try:
        yield
    except Refusal:
        raise
    except Exception as error:
        # each converter has exceptions of its own, chained down to the one that names the operator
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
            chain.append(cause)
        found = [match for one in chain for match in _OPERATOR.finditer(str(one))]
        named = sorted({match["own"] or f"{match['library']}::{match['name']}" for match in found})
        last = (str(error).strip().splitlines() or [""])[-1].strip()[:300]
        why = f"it lacks the operator {', '.join(named)}" if named else f"its converter says {type(error).__name__}: {last}"
        raise ExportError(
            "operator-not-in-target",
            f"--to {target} cannot hold this network: {why}; use another target, or a network without it",
        ) from error


def _write_fp16(job: Job, file: Path, lower: Path, by_torch: ModelProto) -> list[str]:
    """Write the graph in fp16; a note on how far its values reach.

    Args:
        by_torch: the same graph, whose nodes say which layer they are from.

    Raises:
        ExportError: a weight, or a value on the images of the proof, is beyond fp16's largest number.
    """
    onnx, float16, models = need("onnx", "onnx", "onnxruntime.transformers.float16", "onnxruntime.transformers.onnx_model")
    images = [*job.random_images(2, *job.image_size), *(() if job.images is None else job.images)]
    largest, where = _reach(by_torch, images)
    if not largest <= FP16_LARGEST:
        raise ExportError(
            "fp16-overflows",
            f"fp16 holds numbers up to {FP16_LARGEST:.0f}, and this network reaches {largest:.3g} in {where}: on a device that "
            "computes in fp16 it overflows; leave fp16 out of precision (the fp32 and int8 graphs have no such limit)",
        )
    model = float16.convert_float_to_float16(onnx.load(str(file)), keep_io_types=True)
    models.OnnxModel.graph_topological_sort(model.graph)  # the converter puts its casts at the end
    onnx.save(model, str(lower))
    return [f"fp16: the largest value inside is {largest:.3g}, in {where} (fp16 ends at {FP16_LARGEST:.0f})"]


def _reach(graph: ModelProto, images: Iterable[Tensor]) -> tuple[float, str]:
    """The largest finite magnitude among a graph's weights and all values between its nodes, and where it is.

    Args:
        images: as the graph takes them, run one by one: all values of one image are held at once.
    """
    onnx, onnxruntime = need("onnx", "onnx", "onnxruntime")
    model = onnx.ModelProto()
    model.CopyFrom(graph)
    found = [(_largest(onnx.numpy_helper.to_array(w)), f"the weight {w.name}") for w in model.graph.initializer]
    outputs = {output.name for output in model.graph.output}
    nodes = {name: node for node in model.graph.node for name in node.output if name}
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in nodes if name not in outputs)
    session = onnxruntime.InferenceSession(model.SerializeToString(), _options(), providers=["CPUExecutionProvider"])
    for image in images:
        values = zip(session.get_outputs(), session.run(None, {_INPUT: image[None].numpy()}), strict=True)
        found.append(max((_largest(value), _layer(nodes[output.name])) for output, value in values))
    return max(found)


def _largest(values: np.ndarray) -> float:
    """0 for integers; infinity is left out, it is meant (the padding of a maximum) and the same in fp16; NaN counts as it."""
    if values.dtype.kind != "f":
        return 0.0
    if np.isnan(values).any():
        return math.inf
    return float(np.abs(values[np.isfinite(values)]).max(initial=0.0))


def _layer(node: NodeProto) -> str:
    """Where a node comes from: the path of its layer in the network, where torch has noted it."""
    scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
    path = next((scope for scope in reversed(ast.literal_eval(scopes)[:-1]) if scope), "")
    return f"{path.removeprefix('network.')} ({node.op_type})" if path else f"{node.name} ({node.op_type})"


def _write_int8(job: Job, file: Path, lower: Path, by_torch: ModelProto) -> list[str]:
    (quantization,) = need("onnx", "onnxruntime.quantization")
    images = cast(Tensor, job.images)

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined]
        def __init__(self, batches: Iterable[Tensor]) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {_INPUT: batch.numpy()}

    quantization.quantize_static(
        str(file),
        str(lower),
        Reader(images[::2].split(1)),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )
    return []


_LOWER: dict[str, Callable[[Job, Path, Path, ModelProto], list[str]]] = {"fp16": _write_fp16, "int8": _write_int8}


def agreement(job: Job, output: str, full: Callable[[Tensor], Tensor], lower: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """How alike two graphs are on the real images that calibrated nothing: every second one.

    Returns:
        ``cosine``: mean cosine of an image's outputs; ``difference``: largest difference relative to the largest output;
        ``same_nearest``: share of images whose most similar other image is the same; with labels ``top1``: the classifier's
        accuracy, or of features that of the leave-one-out 1-NN; and ``top1_change``: it, less that of ``full``.
    """
    images = cast(Tensor, job.images)
    held_out = images[1::2]
    a, b = (torch.cat([run(batch) for batch in held_out.split(8)]).flatten(1) for run in (full, lower))
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ExportError("graph-not-finite", "a graph gives NaN or infinite outputs on the images; leave its precision out")
    near_a, near_b = _nearest(a), _nearest(b)
    found: dict[str, Any] = {
        "images": len(held_out),
        "cosine": torch.cosine_similarity(a, b).mean().item(),
        "difference": largest_difference(b, a),
        "same_nearest": (near_a == near_b).float().mean().item(),
    }
    if job.labels is not None:
        labels = job.labels[1::2]
        # a classifier answers for itself; of features their nearest neighbour does
        before, after = (
            ((outputs.argmax(1) if output == "logits" else labels[near]) == labels).double().mean().item()
            for outputs, near in ((a, near_a), (b, near_b))
        )
        found |= {"top1": after, "top1_change": after - before}
    return found


def precision_table(
    job: Job, output: str, files: Mapping[str, Path], runner: Callable[[Path], Callable[[Tensor], Tensor]]
) -> list[dict[str, Any]]:
    """A row a precision: size of its files, and with real images how alike it is to fp32.

    Args:
        files: precision -> the file that the runner takes, fp32 first; weights may lie beside it in a ``.bin``.
    """
    full, rows = runner(files["fp32"]), []
    for precision, file in files.items():
        beside = file.with_suffix(".bin")
        size = file.stat().st_size + (beside.stat().st_size if beside.is_file() else 0)
        row: dict[str, Any] = {"file": file.name, "precision": precision, "bytes": size}
        rows.append(row if job.images is None else row | agreement(job, output, full, runner(file)))
    return rows


def _nearest(features: Tensor) -> Tensor:
    """Index of every row's most similar other row, by cosine."""
    unit = nn.functional.normalize(features - features.mean(0))
    similarity = unit @ unit.T
    return similarity.fill_diagonal_(-2).argmax(1)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the exporters' chatter, which users can do nothing about."""
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


PARTS_WITH_GRAPHS = ("backbone", "classifier")
TARGETS = (
    Target(
        "onnx",
        "ONNX for onnxruntime, any batch and size; fp16 and int8 on request",
        write_onnx,
        (*PARTS_WITH_GRAPHS, "model"),
        runner=onnx_runner,
        runtime="onnxruntime",
        hub_library="onnx",
        preprocessing=True,
    ),
    Target(
        "pt2",
        "torch.export program (.pt2), any batch and size",
        write_pt2,
        PARTS_WITH_GRAPHS,
        runner=pt2_runner,
        runtime="torch",
        preprocessing=True,
    ),
    Target(
        "torchscript",
        "traced TorchScript, deprecated in torch",
        write_torchscript,
        PARTS_WITH_GRAPHS,
        runner=torchscript_runner,
        runtime="torch",
        preprocessing=True,
    ),
)
