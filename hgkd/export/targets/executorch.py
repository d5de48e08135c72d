"""ExecuTorch, PyTorch's runtime of phones and small boards (BSD-3): ``model.pte`` for its CPU backend, XNNPACK.

From the same ``torch.export`` as ONNX, for one image at a time and sides up to ``LARGEST_SIDE`` (or twice the network's own),
in multiples of the network's stride: ExecuTorch plans its memory for the largest. int8 is torchao's static quantisation by
ExecuTorch's ``XNNPACKQuantizer`` (weights per channel, symmetric; activations per tensor), calibrated on every second one of
the given images. https://docs.pytorch.org/executorch/stable/backends/xnnpack/xnnpack-quantization.html

What XNNPACK does not take runs on ExecuTorch's portable kernels, slowly; how many operators do stands in a note. Written and
tried with executorch 1.5.1, torchao 0.18.0 and torch 2.15.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from hgkd.export.job import ExportError, Job, Target, Written, count_parameters, need
from hgkd.export.targets.graphs import (
    PARTS_WITH_GRAPHS,
    exported_program,
    fused_for_inference,
    graph_of,
    lower_precisions,
    norms_note,
    operators_named,
    precision_table,
    quiet,
)
from hgkd.export.targets.runtimes import TOLERANCE, suffix
from hgkd.networks.encoder import encoder_levels
from hgkd.weights.signature import ImageInput

LARGEST_SIDE = 1024
_EXIR = "executorch.exir"
_PARTITIONER = "executorch.backends.xnnpack.partition.xnnpack_partitioner"
_QUANTIZER = "executorch.backends.xnnpack.quantizer.xnnpack_quantizer"
_PT2E = "torchao.quantization.pt2e.quantize_pt2e"
_RUNTIME = "executorch.runtime"
_POOL = "executorch.extension.pybindings.portable_lib"


def write_executorch(
    job: Job,
    *,
    output: str | None = None,
    classifier: str | os.PathLike[str] | None = None,
    precision: Sequence[str] = (),
) -> Written:
    """``model.pte``, and ``model_int8.pte`` when asked for; arguments as :func:`hgkd.export.targets.edge.write_openvino`."""
    extra = lower_precisions(job, precision, ("fp32", "int8"))
    trained = graph_of(job, output, classifier)
    with quiet():
        need("executorch", _EXIR, _PARTITIONER, _RUNTIME, *([_QUANTIZER, _PT2E] if extra else []))
    graph, notes = fused_for_inference(trained)
    taken = _taken(job)
    files = {name: job.folder / f"model{suffix(name)}.pte" for name in ("fp32", *extra)}
    with quiet(), torch.no_grad():
        program = exported_program(job, graph, batch=1, free=_free(_taken(job)))
        for name, file in files.items():
            slow = _lower(program if name == "fp32" else _quantised(job, program), file)
            notes += [f"{name}: outside XNNPACK, on portable kernels: {', '.join(slow)}"] if slow else []
    return Written(
        load_with=f"program = executorch.runtime.Runtime.get().load_program('{job.out / files['fp32'].name}')\n"
        f"program.load_method('forward').execute([image])[0]  # {taken.about}",
        proven_with=f"executorch {version('executorch')}, XNNPACK",
        reloaded=executorch_runner(files["fp32"]),
        expected=trained,
        tensors=len(graph.state_dict()),
        parameters=count_parameters(graph),
        notes=[f"input: {taken.about}; output {trained.output}", *notes, norms_note(trained)],
        table=precision_table(job, trained.output, files, executorch_runner),
        tolerance=TOLERANCE,
        input=taken,
    )


def executorch_runner(file: Path, threads: int = 1) -> Callable[[Tensor], Tensor]:
    """A program of ExecuTorch on the CPU: images as it takes them, one after the other -> its output."""
    with quiet():
        runtime, pool = need("executorch", _RUNTIME, _POOL)
    loaded: list[Any] = []

    def method() -> Any:
        # all programs of a process share one pool of threads, and a loaded one keeps the pool that it found
        if pool._threadpool_get_thread_count() != threads:
            loaded.clear()
            pool._unsafe_reset_threadpool(threads)
            _pools.append(threads)
        if not loaded or loaded[2] != len(_pools):
            program = runtime.Runtime.get().load_program(file)
            loaded[:] = [program, program.load_method("forward"), len(_pools)]
        return loaded[1]

    def run(images: Tensor) -> Tensor:
        forward = method()
        # the method owns its result and writes into it again
        return torch.cat([forward.execute([image[None].contiguous()])[0].clone() for image in images])

    return run


_pools: list[int] = []  # the pools of threads that runners have made in this process, by their sizes


def _taken(job: Job) -> ImageInput:
    """What a program takes: sides in multiples of the network's stride, so that no layer rounds.

    Where the network's own size is no such multiple, it is the only one.
    """
    stride = encoder_levels(job.network)[-1].stride
    if any(side % stride for side in job.image_size):
        return job.fixed_input
    most = max(LARGEST_SIDE, 2 * max(job.image_size)) // stride * stride
    # from 2: torch takes for granted that no axis shrinks to 1 within
    return replace(job.input, batch=1, multiple=stride, least=2 * stride, most=most)


def _free(taken: ImageInput) -> dict[int, Any]:
    """The axes of a program whose length is free; empty: none."""
    if taken.most is None:
        return {}
    stride = taken.multiple
    ranges = {"min": taken.least // stride, "max": taken.most // stride}
    return {taken.axis(axis): stride * Dim(name, **ranges) for axis, name in (("H", "rows"), ("W", "columns"))}


def _quantised(job: Job, program: ExportedProgram) -> ExportedProgram:
    """The program with int8 weights and activations, calibrated on every second image."""
    quantizers, pt2e = need("executorch", _QUANTIZER, _PT2E)
    quantizer = quantizers.XNNPACKQuantizer()
    quantizer.set_global(quantizers.get_symmetric_quantization_config(is_per_channel=True))
    prepared = pt2e.prepare_pt2e(program.module(), quantizer)
    for image in cast(Tensor, job.images)[::2]:
        prepared(image[None])
    return exported_program(job, pt2e.convert_pt2e(prepared), batch=1, free=_free(_taken(job)))


def _lower(program: ExportedProgram, file: Path) -> list[str]:
    """Write a program for XNNPACK.

    Returns:
        the operators that XNNPACK does not take, sorted.

    Raises:
        ExportError: ExecuTorch has no kernel for one, either; it is named.
    """
    exir, partitioner, runtime = need("executorch", _EXIR, _PARTITIONER, _RUNTIME)
    with operators_named("executorch"):
        lowered = exir.to_edge_transform_and_lower(program, partitioner=[partitioner.XnnpackPartitioner()]).to_executorch()
    # a symbol's arithmetic (sides) is done by kernels too, but takes no time
    nodes = [node.target for node in lowered.exported_program().graph.nodes if node.op == "call_function"]
    names = {f"{op._schema.name}.{op._schema.overload_name}".rstrip(".") for op in nodes if hasattr(op, "_schema")}
    absent = sorted(names - set(runtime.Runtime.get().operator_registry.operator_names))
    if absent:
        raise ExportError(
            "operator-not-in-target",
            f"ExecuTorch {version('executorch')} has no kernel for {', '.join(absent)}; use --to onnx or openvino",
        )
    with file.open("wb") as opened:
        lowered.write_to_file(opened)
    return sorted(name for name in names if name.startswith("aten::") and not name.startswith("aten::sym_"))


TARGETS = (
    Target(
        "executorch",
        "ExecuTorch for XNNPACK, one image of any size; int8 on request",
        write_executorch,
        PARTS_WITH_GRAPHS,
        runner=executorch_runner,
        runtime="executorch.runtime",
        preprocessing=True,
    ),
)
