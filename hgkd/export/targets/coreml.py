"""Core ML, the runtime of Apple's systems: ``model.mlpackage`` (an ML program of iOS 16 and macOS 13 or later).

Converted by coremltools (BSD-3) from ``torch.export``, for one image (1, C, H, W) of the network's own size. fp16 keeps weights
in half the bytes and lets Core ML compute in it, which its neural engine needs.

Core ML runs on Apple's systems alone, and this is written on others too. Checked is what the file says: it is read back, and
each of its operators is computed with torch (:mod:`hgkd.export.targets.mil`). That proves the weights, the graph and the
conversion, and not Apple's kernels: speed and accuracy on a device stay to be measured there. Written and tried with
coremltools 9.0, which says that torch 2.7 is the last that it was tested with, on torch 2.15.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hgkd.export.job import Job, Target, Written, count_parameters, need
from hgkd.export.targets.graphs import (
    PARTS_WITH_GRAPHS,
    agreement,
    exported_program,
    fused_for_inference,
    graph_of,
    lower_precisions,
    norms_note,
    operators_named,
    quiet,
)
from hgkd.export.targets.mil import mil_runner
from hgkd.export.targets.runtimes import TOLERANCE, silent, suffix


def write_coreml(
    job: Job,
    *,
    output: str | None = None,
    classifier: str | os.PathLike[str] | None = None,
    precision: Sequence[str] = (),
) -> Written:
    """``model.mlpackage``, and ``model_fp16.mlpackage`` when asked for; arguments as for OpenVINO."""
    extra = lower_precisions(job, precision, ("fp32", "fp16"))
    trained = graph_of(job, output, classifier)
    with quiet(), silent():
        (coremltools,) = need("coreml", "coremltools")
    graph, notes = fused_for_inference(trained)
    height, width = job.image_size
    taken = job.fixed_input
    files = {name: job.folder / f"model{suffix(name)}.mlpackage" for name in ("fp32", *extra)}
    with quiet(), silent(), torch.no_grad():
        program = exported_program(job, graph, batch=1, free={}).run_decompositions({})
        for name, file in files.items():
            with operators_named("coreml"):
                model = coremltools.convert(
                    program,
                    convert_to="mlprogram",
                    compute_precision=coremltools.precision.FLOAT32 if name == "fp32" else coremltools.precision.FLOAT16,
                    minimum_deployment_target=coremltools.target.iOS16,
                    inputs=[coremltools.TensorType(name="images", shape=(1, taken.channels, height, width), dtype=float)],
                    outputs=[coremltools.TensorType(name=trained.output, dtype=float)],
                    skip_model_load=True,
                )
            model.save(str(file))
        run = mil_runner(files["fp32"])
        table = _table(job, trained.output, files, run)
    return Written(
        load_with=f"model = coremltools.models.MLModel('{job.out / files['fp32'].name}')  # on a Mac\n"
        f"model.predict({{'images': image}})['{trained.output}']  # {taken.about}",
        proven_with=f"coremltools {coremltools.__version__} and hgkd's own reading of the program, not by Core ML",
        reloaded=run,
        expected=trained,
        tensors=len(graph.state_dict()),
        parameters=count_parameters(graph),
        notes=[
            f"input: {taken.about}; output {trained.output}",
            "checked as far as this is possible away from Apple's systems: what the file says, computed with torch in fp32; "
            "run it on a device before you ship it",
            *notes,
            norms_note(trained),
        ],
        table=table,
        tolerance=TOLERANCE,
        input=taken,
    )


def _table(job: Job, output: str, files: dict[str, Path], full: Callable[[Tensor], Tensor]) -> list[dict[str, Any]]:
    """A row a precision: size of the package, and with real images how alike what it says is to fp32."""
    rows = []
    for name, file in files.items():
        size = sum(part.stat().st_size for part in file.rglob("*") if part.is_file())
        row: dict[str, Any] = {"file": file.name, "precision": name, "bytes": size}
        rows.append(row if job.images is None else row | agreement(job, output, full, mil_runner(file)))
    return rows


TARGETS = (
    Target(
        "coreml",
        "Core ML (.mlpackage), one image of the network's size, checked without Core ML; fp16 on request",
        write_coreml,
        PARTS_WITH_GRAPHS,
    ),
)
