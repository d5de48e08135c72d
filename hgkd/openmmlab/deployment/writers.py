"""The two forms in which whole detectors and segmentors leave as graphs: ONNX, and OpenVINO's IR made from it.

One picture at a time, uint8 RGB (1, 3, H, W) as it comes out of the run's test pipeline before any normalisation. Inside are:
order of channels, mean, std, padding to the model's divisor, network, decoding, thresholds and NMS by the model's ``test_cfg``.
What stays outside, and stands in the run card: resizing, and filling up to a fixed size.

fp32 alone: in fp16 the coordinates of boxes would be whole pixels from 1024 on, and int8 has no meaning for them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

import torch
from mmengine.logging import print_log
from mmengine.registry import DefaultScope
from torch import Tensor, nn
from torch.export import Dim

from hgkd.errors import InvalidValueError, first_line
from hgkd.export.job import ExportError, count_parameters, need, optional
from hgkd.export.model import ModelJob, WrittenModel
from hgkd.export.onnx_versions import least_runtime, set_ir
from hgkd.export.targets.edge import openvino_runner, unreported
from hgkd.export.targets.graphs import onnx_runner, quiet
from hgkd.mmcv_ops.finder import register_ops
from hgkd.openmmlab.config import SCOPES
from hgkd.openmmlab.deployment.graphs import AnySizePool, Detector, Segmentor
from hgkd.openmmlab.deployment.parts import DetectorParts, SegmentorParts, detector_parts, segmentor_parts
from hgkd.openmmlab.deployment.pictures import (
    TestPipeline,
    at_other_sizes,
    find_pictures,
    fitted,
    own_prediction,
)
from hgkd.openmmlab.deployment.proof import Agreement, compare_detections, compare_label_maps
from hgkd.openmmlab.models import build_model
from hgkd.registry import MODEL_WRITERS
from hgkd.weights.run_file import literal_config
from hgkd.weights.signature import ImageInput, Output, Signature

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 18
LEAST = 64  # the shortest side in the proof
INPUT = "images"
_DETECTED = (Output("boxes", "boxes"), Output("scores", "scores"), Output("labels", "labels"))
_SEGMENTED = (Output("label_map", "label_map"),)
Run = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Whole:
    """A model that can leave, with what its graph is compared on.

    Attributes:
        model: the library's, in eval mode.
        graph: a picture -> outputs.
        parts: what was found in it.
        pipeline: of the run's test pictures.
        fixed: (H, W) of the only pictures that the graph takes; None: any.
        multiple: pictures have sides in multiples of it.
        pictures: uint8 RGB (1, 3, H, W), the real ones first.
        real: how many of them are.
    """

    model: nn.Module
    graph: nn.Module
    parts: DetectorParts | SegmentorParts
    pipeline: TestPipeline
    fixed: tuple[int, int] | None
    multiple: int
    pictures: list[Tensor]
    real: int

    @property
    def detects(self) -> bool:
        return isinstance(self.parts, DetectorParts)

    @property
    def outputs(self) -> tuple[Output, ...]:
        return _DETECTED if self.detects else _SEGMENTED

    @property
    def named(self) -> str:
        """The outputs in words."""
        return f"{', '.join(output.name for output in self.outputs)}; picture: uint8 RGB (1, 3, H, W)"

    @property
    def fill(self) -> float:
        """The value, of 0 to 255, with which a picture is filled up."""
        return fill_of(self.parts, self.pipeline)

    def prove(self, run: Run, reader: str) -> Agreement:
        """Compare a graph with the library's own inference on all pictures; errors as of :mod:`.proof`."""
        _stage(3, f"comparing {reader} with {self.pipeline.scope}'s own inference on {len(self.pictures)} pictures")
        with quiet(), DefaultScope.overwrite_default_scope(self.pipeline.scope):
            own = [own_prediction(self.model, self.pipeline, picture) for picture in self.pictures]
        found = [run(picture) for picture in self.pictures]
        if self.detects:
            return compare_detections(own, [tuple(value[0] for value in values) for values in found], reader)
        return compare_label_maps(own, [values[0] for values in found], reader)


@MODEL_WRITERS.register_module(name="onnx")
def write_onnx(job: ModelJob, *, fixed_size: Sequence[int] | None = None) -> WrittenModel:
    """``model.onnx`` of a whole detector or segmentor.

    Args:
        fixed_size: (H, W), the only size that the graph takes; None: any.

    Raises:
        ValueError: no images, no run of mmdet or mmseg, or a part that has no graph, by its name.
        ExportError: torch cannot write the graph, or it does not say what the library says.
    """
    onnx, onnxruntime, _ = need("onnx", "onnx", "onnxruntime", "onnxscript")
    whole = _whole(job, fixed_size)
    file = job.folder / "model.onnx"
    _write(whole, file)
    reader = f"onnxruntime {onnxruntime.__version__}"
    agreement = whole.prove(model_runner("onnx", file), reader)
    load_with = f"session = onnxruntime.InferenceSession('{job.out / file.name}')\n"
    load_with += f"session.run(None, {{'{INPUT}': picture}})  # {whole.named}"
    model = onnx.load(str(file))
    least = least_runtime(OPSET, model.ir_version)
    tensors, note = len(model.graph.initializer), f"opset {OPSET}, IR version {model.ir_version}: onnxruntime {least} or later"
    return _written(job, whole, agreement, reader, load_with, tensors, file, [note])


@MODEL_WRITERS.register_module(name="openvino")
def write_openvino(job: ModelJob, *, fixed_size: Sequence[int] | None = None) -> WrittenModel:
    """``model.xml`` and ``.bin`` of a whole detector or segmentor, by way of ONNX; see :func:`write_onnx`."""
    need("openvino", "onnx", "onnxscript")
    with unreported():
        (openvino,) = need("openvino", "openvino")
    whole = _whole(job, fixed_size)
    onnx_file, file = job.folder / "model.onnx", job.folder / "model.xml"
    _write(whole, onnx_file)
    with unreported(), quiet():
        openvino.save_model(openvino.convert_model(str(onnx_file)), file, compress_to_fp16=False)
    onnx_file.unlink()
    reader = f"openvino {openvino.get_version()}"
    agreement = whole.prove(model_runner("openvino", file), reader)
    load_with = f"model = openvino.Core().compile_model('{job.out / file.name}', 'CPU')\n"
    load_with += f"model(picture)  # {whole.named}"
    return _written(job, whole, agreement, reader, load_with, len(whole.graph.state_dict()), file, [])


RUNNERS: dict[str, Callable[..., Callable[[Tensor], Any]]] = {"onnx": onnx_runner, "openvino": openvino_runner}


def model_runner(target: str, file: Path, threads: int = 1) -> Run:
    """A graph of one of ``RUNNERS`` on the CPU, in fp32: a picture -> all outputs."""
    run = RUNNERS[target](file, threads)

    def all_of(picture: Tensor) -> tuple[Tensor, ...]:
        found = run(picture)
        return (found,) if isinstance(found, Tensor) else tuple(found)

    return all_of


def fill_of(parts: DetectorParts | SegmentorParts, pipeline: TestPipeline) -> float:
    """The value, of 0 to 255, with which pictures are filled up: the pipeline's own, or what is 0 after the normalisation."""
    if pipeline.fill is not None:
        return pipeline.fill
    mean = parts.pixels.mean or (0.0,)
    return sum(mean) / len(mean)


def _whole(job: ModelJob, fixed_size: Sequence[int] | None) -> Whole:
    """The model of a job, checked, with its pictures."""
    cfg = literal_config(job.source.meta.get("cfg"))
    scope = cfg.get("default_scope")
    if scope not in SCOPES or not job.source.config:
        raise InvalidValueError(
            "model-not-of-a-library",
            f"{job.source.path} describes no model of {' or '.join(SCOPES)} in plain values (default_scope={scope!r}); "
            "graphs are written of those alone",
        )
    if job.images is None:
        raise InvalidValueError(
            "model-graph-without-images",
            f"the graph of a whole model is compared with {scope}'s own inference: give a folder of pictures with images=",
        )
    fixed = _checked_size(fixed_size)
    files = find_pictures(job.images, job.max_images)
    _stage(1, f"building the model of {job.source.path} and reading {len(files)} pictures")
    library = optional(scope)  # registers mmcv's operators, too
    if library[0] is None:
        need(f"onnx with --part model of {scope}", scope)
    register_ops()
    pipeline = TestPipeline.of(cfg, scope)
    with quiet(), DefaultScope.overwrite_default_scope(scope):
        model = build_model(job.source.config, scope, job.source.state, str(job.source.path))
        parts = (detector_parts if scope == "mmdet" else segmentor_parts)(model, pipeline.steps)
        pictures = pipeline.read(files)
    graph = (Detector(parts) if isinstance(parts, DetectorParts) else Segmentor(parts)).eval()
    with quiet():
        multiple = _multiple(graph) if fixed is None else 1
    if fixed is not None:
        pictures = [fitted(picture, fixed, fill_of(parts, pipeline)) for picture in pictures]
        more = [torch.zeros(1, 3, *fixed, dtype=torch.uint8)]
    else:
        more = [*at_other_sizes(pictures, max(32, multiple)), torch.zeros(1, 3, LEAST, LEAST, dtype=torch.uint8)]
    return Whole(model, graph, parts, pipeline, fixed, multiple, [*pictures, *more], len(pictures))


def _checked_size(size: Sequence[int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    if len(size) != 2 or min(size) < 1:
        raise InvalidValueError("fixed-size", f"fixed_size takes height and width in pixels, e.g. 480 640, got {list(size)}")
    return int(size[0]), int(size[1])


@torch.no_grad()
def _multiple(graph: nn.Module) -> int:
    """The least power of 2 whose multiples the model takes as sides: some necks put maps together that must be twice as large.

    Raises:
        ExportError: there is none up to 128.
    """
    failed: Exception | None = None
    for power in range(8):
        try:
            graph(torch.zeros(1, 3, 128 + 2**power, 256 + 2**power, dtype=torch.uint8))
            return 2**power
        except RuntimeError as error:
            failed = error
    raise ExportError("model-takes-no-size", f"the model fails on pictures of any tried size: {failed}") from failed


def _write(whole: Whole, file: Path) -> None:
    """The graph as ONNX.

    Raises:
        ExportError: torch cannot follow the model, or has no operator of ONNX's for a part of it.
    """
    (onnx,) = need("onnx", "onnx")
    _stage(2, "following the network to write it as a graph, the longest part")
    try:
        with quiet(), torch.no_grad(), _any_size_pools(whole.graph):
            model = _detector(whole) if whole.detects else _half(whole.graph, [INPUT], _picture(whole), _names(whole))
        set_ir(model, None)
        onnx.save(model, str(file))
        onnx.checker.check_model(str(file))
    except OSError:
        raise
    except Exception as error:  # whatever torch meets in layers of other libraries
        raise ExportError(
            "model-not-followed",
            f"torch {torch.__version__} cannot write {type(whole.model).__name__} as ONNX ({type(error).__name__}: "
            f"{first_line(error)}); a fixed_size may help, and its weights leave with --to mmdet or mmseg",
        ) from error


def _stage(number: int, what: str) -> None:
    """A line of the log for a stage, as some last minutes on a slow machine."""
    print_log(f"{number} of 3: {what}", "current")


def _names(whole: Whole) -> list[str]:
    return [output.name for output in whole.outputs]


def _picture(whole: Whole) -> tuple[Tensor, bool]:
    """An example, and whether its sides are free; larger than any stride, as torch takes sides of 1 within for constants."""
    height, width = whole.fixed or (384, 640)
    return torch.zeros(1, 3, height, width, dtype=torch.uint8), whole.fixed is None


def _detector(whole: Whole) -> ModelProto:
    """A detector out of its halves: across both, sides of maps would be nested quotients of the picture's, and torch would need
    minutes for what it proves about them."""
    (compose,) = need("onnx", "onnx.compose")
    network, results = (cast(nn.Module, getattr(whole.graph, name)) for name in ("network", "results"))
    example, free = _picture(whole)
    between = network(example)
    names = [f"between_{number}" for number in range(len(between))]
    first = _half(network, [INPUT], (example, free), names)
    second = _half(results, names, (*between, free), _names(whole))
    second = compose.add_prefix(second, "results.", rename_inputs=False, rename_outputs=False)
    second.ir_version = first.ir_version
    for half in (first, second):
        del half.graph.value_info[:]  # names of sides are of one half
    for value in (*first.graph.output, *second.graph.input):
        value.type.tensor_type.ClearField("shape")
    return cast("ModelProto", compose.merge_models(first, second, io_map=[(name, name) for name in names]))


def _half(module: nn.Module, takes: list[str], example: tuple[Any, ...], gives: list[str]) -> ModelProto:
    """A module as ONNX; the last of ``example`` says whether the sides of its maps are free."""
    *tensors, free = example
    shapes = tuple({2: Dim.DYNAMIC, 3: Dim.DYNAMIC} if tensor.dim() == 4 else None for tensor in tensors)
    # switches mixed precision off for a layer, which is off anyway, and has no form in ONNX
    with mock.patch.object(torch.cuda.amp, "autocast", return_value=contextlib.nullcontext()):
        program = torch.export.export(
            module,
            tuple(tensors),
            dynamic_shapes=(shapes if len(shapes) == 1 else (shapes,)) if free else None,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    made = torch.onnx.export(program, dynamo=True, opset_version=OPSET, input_names=takes, output_names=gives, verbose=False)
    return cast(torch.onnx.ONNXProgram, made).model_proto


@contextlib.contextmanager
def _any_size_pools(graph: nn.Module) -> Iterator[None]:
    """Within, poolings to several places are the ones that ONNX can have at free sides."""
    swapped: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in graph.modules():
        for name, layer in parent.named_children():
            size = layer.output_size if type(layer) is nn.AdaptiveAvgPool2d else 1
            size = (size, size) if isinstance(size, int) else size
            if size != (1, 1):
                swapped.append((parent, name, layer))
                setattr(parent, name, AnySizePool(cast(Any, size)))
    try:
        yield
    finally:
        for parent, name, layer in swapped:
            setattr(parent, name, layer)


def _written(
    job: ModelJob,
    whole: Whole,
    agreement: Agreement,
    reader: str,
    load_with: str,
    tensors: int,
    file: Path,
    notes: list[str],
) -> WrittenModel:
    own = optional(whole.pipeline.scope)[1]
    things = "detections" if whole.detects else "pixels"
    size = sum(part.stat().st_size for part in job.folder.iterdir())
    row: dict[str, Any] = {"file": file.name, "precision": "fp32", "bytes": size}
    row |= {"pictures": agreement.pictures, things: agreement.things, "mismatched": agreement.mismatched}
    if whole.detects:
        row |= {"box (px)": agreement.difference, "score": agreement.score}
    image = _input(whole)
    signature = Signature(
        files={"fp32": file.name},
        input=image,
        outputs=whole.outputs,
        task="detection" if whole.detects else "segmentation",
        classes=_classes(job),
        options=_options(whole),
    )
    more = "and a black one" if whole.fixed else f"and {agreement.pictures - whole.real} of other sizes, one of them black"
    return WrittenModel(
        load_with=load_with,
        proven_with=f"{reader} against {own}'s own inference on {whole.real} pictures {more}: {agreement.mismatched} of "
        f"{agreement.things} {things} differ",
        tensors=tensors,
        parameters=count_parameters(whole.model),
        max_difference=agreement.difference,
        images=whole.real,
        notes=[*_notes(whole, image), *notes],
        table=[row],
        signature=signature,
    )


def _input(whole: Whole) -> ImageInput:
    height, width = whole.fixed or (None, None)
    size = whole.fixed or whole.pipeline.size or tuple(whole.pictures[0].shape[-2:])
    return ImageInput(
        name=INPUT,
        dtype="uint8",
        range=(0.0, 255.0),
        size=(size[0], size[1]),
        batch=1,
        height=height,
        width=width,
        least=1 if whole.fixed else LEAST,
        multiple=whole.multiple if whole.fixed else lcm(whole.multiple, whole.pipeline.divisor),
        resize=whole.pipeline.resize(whole.fixed is not None),
        pad=whole.fill / 255,
    )


def _options(whole: Whole) -> dict[str, Any]:
    """What a reader cannot see in the graph: steps before it, and what it does inside."""
    parts = whole.parts
    inside: dict[str, Any] = {"network_takes": str(parts.pixels)}
    if isinstance(parts, DetectorParts):
        inside |= {"padding_divisor": parts.divisor, "thresholds": asdict(parts.rule)}
        if parts.proposals is not None:
            inside["proposals"] = asdict(parts.proposals)
    return {"library": whole.pipeline.scope, "test_pipeline": whole.pipeline.described, "inside": inside}


def _notes(whole: Whole, image: ImageInput) -> list[str]:
    before = [
        ", ".join(f"{key}={value}" if key != "type" else str(value) for key, value in step.items())
        for step in whole.pipeline.described
    ]
    notes = [f"input: {image.about}", f"inside: {whole.parts.pixels}"]
    if before:
        notes.append(f"before it, as the run's test pipeline does: {'; '.join(before)}; results are in pixels of the input")
    if whole.pipeline.unrepeated:
        notes.append(f"hgkd predict does not take this folder: its pictures need {', '.join(whole.pipeline.unrepeated)}")
    if isinstance(whole.parts, DetectorParts):
        rule = whole.parts.rule
        most = f"the best {rule.most}" if rule.most > 0 else "all"
        notes.append(f"boxes of a score from {rule.score}, NMS at IoU {rule.iou}, {most}")
    else:
        notes.append("the library itself enlarges logits, not labels, when a picture was resized before: edges differ there")
    return notes


def _classes(job: ModelJob) -> tuple[str, ...]:
    described = job.source.meta.get("dataset_meta")
    names = described.get("classes") if isinstance(described, dict) else None
    return tuple(map(str, names)) if isinstance(names, (list, tuple)) else ()
