"""LiteRT, formerly TensorFlow Lite (Apache-2.0): ``model.tflite`` for Android, Raspberry Pi and microcontrollers.

Converted by litert-torch from the network itself, for one image (1, C, H, W) of the network's own size: LiteRT plans its memory
once. int8 is ai-edge-quantizer's static quantisation (weights per channel; activations per tensor; float32 in and out),
calibrated on every second one of the given images. https://ai.google.dev/edge/litert

litert-torch 0.10.0 declares torch 2.4 to 2.14. Tried with ai-edge-litert 2.3.0 and ai-edge-quantizer 0.10.0 on torch 2.14.1
and, past the declaration, on 2.15. Where it imports it is used: the proof says whether the file is right.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from hgkd.errors import InvalidValueError
from hgkd.export.job import Job, Target, Written, count_parameters, need
from hgkd.export.targets.graphs import (
    PARTS_WITH_GRAPHS,
    fused_for_inference,
    graph_of,
    lower_precisions,
    norms_note,
    operators_named,
    precision_table,
    quiet,
)
from hgkd.export.targets.runtimes import TOLERANCE, silent, suffix
from hgkd.weights.signature import Output


def write_litert(
    job: Job,
    *,
    output: str | None = None,
    classifier: str | os.PathLike[str] | None = None,
    precision: Sequence[str] = (),
) -> Written:
    """``model.tflite``, and ``model_int8.tflite`` when asked for; arguments as for OpenVINO."""
    extra = lower_precisions(job, precision, ("fp32", "int8"))
    trained = graph_of(job, output, classifier)
    with quiet():
        (converter,) = need("litert", "litert_torch")
        need("litert", "ai_edge_litert.interpreter", *(["ai_edge_quantizer"] if extra else []))
    graph, notes = fused_for_inference(trained)
    height, width = job.image_size
    taken = replace(job.fixed_input, name="args_0")
    files = {name: job.folder / f"model{suffix(name)}.tflite" for name in ("fp32", *extra)}
    with quiet(), silent():
        with operators_named("litert"):
            model = converter.convert(graph, (job.random_images(1, height, width),))
        model.export(str(files["fp32"]))
        if extra:
            _quantise(job, files["fp32"], files["int8"])
    return Written(
        load_with=f"run = ai_edge_litert.interpreter.Interpreter('{job.out / files['fp32'].name}').get_signature_runner()\n"
        f"run(args_0=image)['output_0']  # {taken.about}",
        proven_with=f"ai-edge-litert {version('ai-edge-litert')}",
        reloaded=litert_runner(files["fp32"]),
        expected=trained,
        tensors=len(graph.state_dict()),
        parameters=count_parameters(graph),
        notes=[
            f"input: {taken.about}; output {trained.output}",
            f"converted by litert-torch {version('litert-torch')} with torch {torch.__version__}",
            *notes,
            norms_note(trained),
        ],
        table=precision_table(job, trained.output, files, litert_runner),
        tolerance=TOLERANCE,
        input=taken,
        outputs=(Output("output_0", trained.output),),
    )


def litert_runner(file: Path, threads: int = 1) -> Callable[[Tensor], Tensor]:
    """A model of LiteRT on the CPU (XNNPACK): images as it takes them, one after the other -> its output.

    Raises:
        ValueError: by what it returns, for an image of another size.
    """
    with quiet():
        (litert,) = need("litert", "ai_edge_litert.interpreter")
    interpreter = litert.Interpreter(model_path=str(file), num_threads=threads)
    forward = interpreter.get_signature_runner()
    (name, about), *_ = forward.get_input_details().items()
    shape = tuple(int(side) for side in about["shape"][1:])

    def run(images: Tensor) -> Tensor:
        if images.shape[1:] != shape:
            raise InvalidValueError(
                "image-size-fixed",
                f"{file.name} takes images of the shape {shape} alone, got {tuple(images.shape[1:])}; resize them",
            )
        # the interpreter owns its result and writes into it again
        made = [next(iter(forward(**{name: image[None].contiguous().numpy()}).values())) for image in images]
        return torch.cat([torch.tensor(values) for values in made])

    return run


def _quantise(job: Job, file: Path, lower: Path) -> None:
    """Write a model in int8, calibrated on every second image."""
    quantizer, recipe, kinds = need(
        "litert", "ai_edge_quantizer.quantizer", "ai_edge_quantizer.recipe", "ai_edge_quantizer.qtyping"
    )
    (litert,) = need("litert", "ai_edge_litert.interpreter")
    ((signature, about),) = litert.Interpreter(model_path=str(file)).get_signature_list().items()
    (name,) = about["inputs"]
    work = quantizer.Quantizer(str(file), recipe.static_wi8_ai8())
    for end in (kinds.TFLOperationName.INPUT, kinds.TFLOperationName.OUTPUT):
        work.update_quantization_recipe(".*", end, algorithm_key="no_quantize")
    images = cast(Tensor, job.images)[::2]
    found = work.calibrate({signature: [{name: image[None].numpy()} for image in images]})
    work.quantize(found).export_model(str(lower))


TARGETS = (
    Target(
        "litert",
        "LiteRT (.tflite), one image of the network's size; int8 on request",
        write_litert,
        PARTS_WITH_GRAPHS,
        runner=litert_runner,
        runtime="ai_edge_litert.interpreter",
        preprocessing=True,
    ),
)
