"""sparse: the student for masked or partial images, and weights in spconv's layout.

``--to sparse`` writes weights and cell; which backend computes is chosen when reading, in two lines:

>>> from hgkd.export import load_sparse
>>> net = load_sparse("exported/sparse")    # net(images, visible=...), as hgkd.sparse.sparsify gives it

``--part student`` writes encoder and decoder, for :func:`load_student`.

``--to spconv`` writes the encoder's weights with every convolution permuted from torch's (K, C, R, S) to spconv's
(K, R, S, C) (traveller59/spconv 2.x). spconv has no ResNet: the network around them is the user's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hgkd.export.card import write_json
from hgkd.export.job import ExportError, Job, Target, Written, count_parameters, load_all
from hgkd.networks.backbones import Source, build_backbone
from hgkd.networks.encoder import encoder_levels
from hgkd.sparse import save_sparse, sparsify
from hgkd.sparse.spconv import from_krsc, to_krsc
from hgkd.students.exported import ENCODER, build_student, load_sparse, load_student
from hgkd.students.unet import check_cell
from hgkd.weights.cnn_names import TIMM, renamed
from hgkd.weights.export_folder import CONFIG_FILE, WEIGHTS_FILE
from hgkd.weights.run_file import FORMAT, literal_config

if TYPE_CHECKING:
    pass

_GIVEN = {"student": "", "decoder": ", encoder='EXPORTED/BACKBONE'"}  # what load_student must be given besides the folder


def write(job: Job, *, cell: int | None = None) -> Written:
    """Weights, cell and the student's description.

    Args:
        cell: side of a mask cell in pixels; None takes that of the training run, or else the encoder's total stride.
    """
    trained = _student_arguments(job.source).get("cell")
    stride = encoder_levels(job.network)[-1].stride
    side = (trained or stride) if cell is None else cell
    check_cell(side, stride)
    return _write_backbone(job, side) if job.part == "backbone" else _write_student(job, side)


def _write_backbone(job: Job, cell: int) -> Written:
    renormalize = bool(_student_arguments(job.source).get("renormalize", False))  # as it was trained
    save_sparse(sparsify(job.network, cell, renormalize=renormalize), job.folder / WEIGHTS_FILE)
    _describe(job, {"cell": cell, "renormalize": renormalize})
    reference = sparsify(job.network, cell, "masked", renormalize).eval()
    again = load_sparse(job.folder)

    def seen(network: nn.Module, images: Tensor) -> Tensor:
        features = cast(Any, network).forward_features(cast(Any, network).pack(*_masked(job, images, cell)))
        dense: Tensor = features.to_dense(fill=0.0)
        return dense

    return Written(
        load_with=f"from hgkd.export import load_sparse\nnet = load_sparse('{job.out}')",
        proven_with="hgkd.export.load_sparse, backend gather against masked, a quarter of the cells visible",
        reloaded=lambda images: seen(again, images),
        expected=lambda images: seen(reference, images),
        tensors=len(job.network.state_dict()),
        parameters=count_parameters(job.network),
        notes=[f"cell {cell}; net.pack normalises nothing: give images normalised with net.pretrained_cfg's mean and std"],
    )


def _write_student(job: Job, cell: int) -> Written:
    arguments = {**_student_arguments(job.source), **job.source.spec.to_student(), "cell": cell}
    arguments = {
        key: value for key, value in arguments.items() if key not in ("type", "encoder_checkpoint", "pretrained", "backend")
    }
    kept = {key: value for key, value in job.source.student.items() if job.part == "student" or not key.startswith(ENCODER)}
    weights = {key: value.detach().cpu().contiguous().clone() for key, value in kept.items()}
    save_file(weights, job.folder / WEIGHTS_FILE, metadata={"format": "pt"})
    _describe(job, {"cell": cell, job.part: arguments})
    reference = load_all(build_student(arguments, "masked"), dict(job.source.student), "hgkd.students.SparseUNet")
    again = load_student(job.folder, encoder=job.network if job.part == "decoder" else None)

    def decoded(student: nn.Module, images: Tensor) -> Tensor:
        cropped, visible = _masked(job, images, cell, normalise=False)
        out: Tensor = student(cropped, visible).decoded
        return out

    return Written(
        load_with=f"from hgkd.export import load_student\nstudent = load_student('{job.out}'{_GIVEN[job.part]})",
        proven_with="hgkd.export.load_student, backend gather against masked, a quarter of the cells visible",
        reloaded=lambda images: decoded(again, images),
        expected=lambda images: decoded(reference, images),
        tensors=len(weights),
        parameters=count_parameters(reference)
        - (count_parameters(reference.get_submodule("encoder")) if job.part == "decoder" else 0),
        notes=[f"cell {cell}; the decoder's output is what the objectives project, not an image"],
    )


def write_spconv(job: Job) -> Written:
    """The encoder's weights in timm's names, convolutions in spconv's layout."""
    weights = {key: to_krsc(value) if value.dim() == 4 else value for key, value in renamed(job.network, TIMM).items()}
    save_file(weights, job.folder / WEIGHTS_FILE, metadata={"format": "pt", "layout": "KRSC"})
    again = build_backbone(job.source.spec)
    found = load_file(job.folder / WEIGHTS_FILE)
    load_all(again, {key: from_krsc(value) if value.dim() == 4 else value for key, value in found.items()}, "timm")
    return Written(
        load_with=f"safetensors.torch.load_file('{job.out / WEIGHTS_FILE}')",
        proven_with="timm's dense network, weights permuted back (spconv has no such network)",
        reloaded=lambda images: cast(Any, again).forward_features(job.normalise(images)),
        tensors=len(weights),
        parameters=count_parameters(job.network),
        notes=["convolutions are (K, R, S, C); names are timm's; submanifold layers keep the places that the mask keeps"],
    )


def _student_arguments(source: Source) -> dict[str, Any]:
    """Arguments of ``SparseUNet`` in the training run's config; empty when it is not known."""
    model = literal_config(source.meta.get("cfg")).get("model") or {}
    return dict(model.get("student") or {})


def _describe(job: Job, section: dict[str, Any]) -> None:
    write_json({"hgkd": {"format": FORMAT, "encoder": job.source.spec.to_dict(), **section}}, job.folder / CONFIG_FILE)


def _masked(job: Job, images: Tensor, cell: int, normalise: bool = True) -> tuple[Tensor, Tensor]:
    """Images cropped to whole cells, and flags of about a quarter of these, the same for the same images."""
    height, width = (side // cell * cell for side in images.shape[-2:])
    if not height or not width:
        raise ExportError(
            "cells-do-not-fit-images", f"cells of {cell} pixels do not fit into images of {tuple(images.shape[-2:])} pixels"
        )
    generator = torch.Generator().manual_seed(0)
    visible = torch.rand(len(images), height // cell, width // cell, generator=generator) < 0.25
    visible[:, 0, 0] = True
    images = images[..., :height, :width]
    return (job.normalise(images) if normalise else images), visible


TARGETS = (
    Target(
        "sparse",
        "weights and cell of the sparse network, for hgkd.export.load_sparse",
        write,
        ("backbone", "student", "decoder"),
    ),
    Target("spconv", "the encoder's weights with convolutions in spconv's (K, R, S, C) layout", write_spconv),
)
