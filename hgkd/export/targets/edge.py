"""Runtimes of small devices: OpenVINO (Intel's CPUs, GPUs and NPUs) and ncnn (phones; Tencent's, BSD-3).

Each file is read back by its own runtime, on the CPU and in fp32, and compared before it is called done. Images in [0, 1], RGB,
of any size: the normalisation is inside. Networks with branches that only training needs leave fused, as for ONNX.

* ``openvino``: ``model.xml`` and ``.bin`` (IR), of any batch. fp16 stores weights in half the bytes, and each device computes
  in the precision that it prefers; int8 is NNCF's static quantisation, calibrated on every second one of the given images.
* ``ncnn``: ``model.ncnn.param`` and ``.bin``, written by pnnx (https://github.com/pnnx/pnnx) from a traced graph. fp16 stores
  weights in half the bytes. ncnn takes one image at a time.

OpenVINO's tools report their use to Intel unless the user has said no. Run from here they report nothing.

An int8 or fp16 file differs from fp32 on purpose: by how much is measured on images that calibrated nothing, and reported.
"""

from __future__ import annotations

import importlib
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor

from hgkd.export.job import ExportError, Job, Target, Written, count_parameters, need
from hgkd.export.targets.graphs import (
    PARTS_WITH_GRAPHS,
    Graph,
    exported_program,
    fused_for_inference,
    graph_of,
    lower_precisions,
    norms_note,
    operators_named,
    pads_same,
    precision_table,
    quiet,
)
from hgkd.export.targets.runtimes import TOLERANCE, suffix
from hgkd.networks.encoder import encoder_levels
from hgkd.weights.signature import ImageInput, Output


def write_openvino(
    job: Job,
    *,
    output: str | None = None,
    classifier: str | os.PathLike[str] | None = None,
    precision: Sequence[str] = (),
) -> Written:
    """``model.xml`` with ``model.bin``, and ``model_fp16`` and ``model_int8`` when asked for.

    Args:
        output, classifier: as for ONNX, see :func:`hgkd.export.targets.graphs.write_onnx`.
        precision: further precisions, of 'fp16' and 'int8'; int8 needs real images.
    """
    extra = lower_precisions(job, precision)
    trained = graph_of(job, output, classifier)
    graph, notes = fused_for_inference(trained)
    with unreported(), quiet():
        (openvino,) = need("openvino", "openvino")
        nncf = need("openvino", "nncf")[0] if "int8" in extra else None
        with operators_named("openvino"):
            model = openvino.convert_model(exported_program(job, graph))
        model.inputs[0].get_tensor().set_names({"images"})
        model.outputs[0].get_tensor().set_names({trained.output})
        shape = [-1, -1, -1, -1]
        shape[job.input.axis("C")] = job.input.channels
        model.reshape({0: openvino.PartialShape(shape)})
        notes.append(norms_note(trained, sum(op.get_type_name() == "BatchNormInference" for op in model.get_ops())))
        openvino.save_model(model, job.folder / "model.xml", compress_to_fp16=False)
        for name in extra:
            lower = model
            if nncf is not None and name == "int8":
                images = cast(Tensor, job.images)[::2]
                lower = nncf.quantize(model, nncf.Dataset([image[None].numpy() for image in images]), subset_size=len(images))
            openvino.save_model(lower, job.folder / f"model_{name}.xml", compress_to_fp16=name == "fp16")
    files = {name: job.folder / f"model{suffix(name)}.xml" for name in ("fp32", *extra)}
    run = openvino_runner(files["fp32"])
    return Written(
        load_with=f"model = openvino.Core().compile_model('{job.out / 'model.xml'}', 'CPU')\n"
        f"model(images)[0]  # {job.input.about}",
        proven_with=f"openvino {openvino.get_version()}",
        reloaded=run,
        expected=trained,
        tensors=len(graph.state_dict()),
        parameters=count_parameters(graph),
        notes=[f"input: {job.input.about}; output {trained.output}", *notes],
        table=precision_table(job, trained.output, files, openvino_runner),
        tolerance=TOLERANCE,
    )


@contextmanager
def unreported() -> Iterator[None]:
    """Within, the tools of OpenVINO act as for a user who has declined to report their use."""
    with ExitStack() as stack:
        try:
            telemetry = importlib.import_module("openvino_telemetry.main")
        except ImportError:
            pass  # then nothing is reported
        else:
            declined = telemetry.ConsentCheckResult.DECLINED
            stack.enter_context(mock.patch.object(telemetry.OptInChecker, "check", return_value=declined))
        yield


def openvino_runner(file: Path, threads: int = 1) -> Callable[[Tensor], Any]:
    """A graph of OpenVINO's on the CPU, in fp32: images as it takes them -> its output, or a list of several."""
    with unreported():
        (openvino,) = need("openvino", "openvino")
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(file), "CPU", settings)

    def run(images: Tensor) -> Any:
        # the request owns its results and writes into them again
        found = [torch.from_numpy(value.copy()) for value in compiled(images.numpy()).values()]
        return found[0] if len(found) == 1 else found

    return run


def write_ncnn(
    job: Job,
    *,
    output: str | None = None,
    classifier: str | os.PathLike[str] | None = None,
    precision: Sequence[str] = (),
) -> Written:
    """``model.ncnn.param`` with ``.bin``, and ``model_fp16`` when asked for; arguments as :func:`write_openvino`."""
    extra = lower_precisions(job, precision, ("fp32", "fp16"))
    trained = graph_of(job, output, classifier)
    ncnn, pnnx = need("ncnn", "ncnn", "pnnx")
    graph, notes = fused_for_inference(trained)
    taken, shapes = _ncnn_input(job, graph)
    traced = job.folder / "traced.pt"
    with quiet(), torch.no_grad():
        torch.jit.trace(graph, torch.rand(shapes[0])).save(str(traced))
    files = {name: job.folder / f"model{suffix(name)}.ncnn.param" for name in ("fp32", *extra)}
    for name, file in files.items():
        _convert(pnnx, traced, shapes, file, half=name == "fp16")
    traced.unlink()
    return Written(
        load_with=f"net = ncnn.Net(); net.load_param('{job.out / files['fp32'].name}'); "
        f"net.load_model('{job.out / files['fp32'].with_suffix('.bin').name}')\n"
        "take = net.create_extractor(); take.input('in0', ncnn.Mat(image)); take.extract('out0')  # image (C, H, W) in [0, 1]",
        proven_with=f"ncnn {ncnn.__version__}",
        reloaded=ncnn_runner(files["fp32"]),
        expected=trained,
        tensors=len(graph.state_dict()),
        parameters=count_parameters(graph),
        notes=[
            f"input 'in0': {taken.about}; output 'out0': {trained.output}",
            *notes,
            norms_note(trained, _layers(files["fp32"]).count("BatchNorm")),
        ],
        table=precision_table(job, trained.output, files, ncnn_runner),
        tolerance=TOLERANCE,
        input=taken,
        outputs=(Output("out0", trained.output),),
    )


def _ncnn_input(job: Job, graph: Graph) -> tuple[ImageInput, list[tuple[int, ...]]]:
    """What a network of ncnn's takes, and the shapes by which pnnx learns it: what differs between two of them is free.

    pnnx makes constants of paddings that depend on the size of the image ("same"). They hold for all sides that are multiples
    of the total stride, if the first shape's are; else for that size alone.
    """
    height, width = job.image_size
    stride = encoder_levels(job.network)[-1].stride
    taken = replace(job.input, name="in0", layout="CHW", batch=1)
    first = (1, taken.channels, height, width)
    if pads_same(graph, torch.rand(first)):
        if height % stride or width % stride:
            return replace(taken, height=height, width=width), [first]
        taken = replace(taken, multiple=stride, least=stride)
    return taken, [first, (1, taken.channels, height + 2 * stride, width + 4 * stride)]


def ncnn_runner(file: Path, threads: int = 1) -> Callable[[Tensor], Tensor]:
    """A network of ncnn's on the CPU, in fp32: images in [0, 1] (B, C, H, W), one after the other -> its output.

    Raises:
        ExportError: ncnn does not take the file, or cannot run a layer.
    """
    (ncnn,) = need("ncnn", "ncnn")
    net = ncnn.Net()
    net.opt.num_threads, net.opt.use_vulkan_compute = threads, False
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = net.opt.use_bf16_storage = False
    if net.load_param(str(file)) != 0 or net.load_model(str(file.with_suffix(".bin"))) != 0:
        raise ExportError("ncnn-refuses-file", f"ncnn does not read {file.name}; {_unknown_layers(file)}")

    def run(images: Tensor) -> Tensor:
        made = []
        for image in images:
            extractor = net.create_extractor()
            extractor.input("in0", ncnn.Mat(image.contiguous().numpy()))
            failed, found = extractor.extract("out0")
            if failed:
                raise ExportError("ncnn-fails", f"ncnn fails on {file.name} (code {failed}); {_unknown_layers(file)}")
            made.append(torch.tensor(found.numpy()))
        return torch.stack(made)

    return run


def _convert(pnnx: ModuleType, traced: Path, shapes: Sequence[tuple[int, ...]], file: Path, half: bool) -> None:
    """Let pnnx write ``file`` and its weights, and nothing else."""
    # every file that it writes is named: by default they lie around the traced one
    stem = file.with_suffix("")
    by_products = {
        kind: stem.with_name(f"{stem.name}.{kind}") for kind in ("pnnxparam", "pnnxbin", "pnnxpy", "pnnxonnx", "ncnnpy")
    }
    outputs = {"ncnnparam": file, "ncnnbin": file.with_suffix(".bin"), **by_products}
    inputs = [f"inputshape{number}=[{','.join(map(str, shape))}]f32" for number, shape in zip(("", "2"), shapes, strict=False)]
    command = [pnnx.EXEC_PATH, traced, *inputs, f"fp16={int(half)}", *(f"{kind}={path}" for kind, path in outputs.items())]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    if done.returncode or not file.is_file():
        said = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise ExportError(
            "pnnx-fails", f"pnnx cannot convert this network (exit code {done.returncode}): {' / '.join(said)}; use --to onnx"
        )
    for path in by_products.values():
        path.unlink(missing_ok=True)


def _unknown_layers(file: Path) -> str:
    """The operators that pnnx left as torch's, which ncnn does not have, as a text."""
    found = sorted({kind for kind in _layers(file) if "." in kind or "::" in kind})
    return f"it lacks {', '.join(found)}; use --to onnx or openvino" if found else "use --to onnx or openvino"


def _layers(file: Path) -> list[str]:
    """Kinds of the layers in a file of ncnn's."""
    return [line.split()[0] for line in file.read_text(encoding="utf-8").splitlines()[2:] if line]


TARGETS = (
    Target(
        "openvino",
        "OpenVINO IR, any batch and size; fp16 and int8 on request",
        write_openvino,
        (*PARTS_WITH_GRAPHS, "model"),
        runner=openvino_runner,
        runtime="openvino",
        hub_library="openvino",
        preprocessing=True,
    ),
    Target(
        "ncnn", "ncnn, by pnnx, any size; fp16 on request", write_ncnn, PARTS_WITH_GRAPHS, runner=ncnn_runner, runtime="ncnn"
    ),
)
