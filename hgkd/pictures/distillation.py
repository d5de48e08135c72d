"""Pictures of student and teacher, for every objective of a distillation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from mmengine.model import BaseModel
from torch import Tensor

from hgkd.pictures.columns import as_rgb, colour_basis, hide_cells, token_colours


class _Shown(Protocol):
    """What an objective gives for pictures of its terms; see ``hgkd.objectives.MaskedObjective``."""

    @property
    def terms(self) -> Sequence[str]: ...

    def predict(self, student_out: object, term: str) -> Tensor: ...

    def target_map(self, teacher_out: object, term: str) -> Tensor: ...


@torch.no_grad()
def distillation_columns(model: BaseModel, inputs: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Columns for :func:`hgkd.pictures.columns.picture_grid` of a ``MaskedDistiller``, computed in eval mode.

    Args:
        inputs: uint8 (B, C, H, W), or float in [0, 1]; of other channels than RGB those are shown that the teacher sees, else
            the first three.
        seed: of the mask.

    Returns:
        Title -> (B, 3, h, w) in [0, 1].
    """
    training, progress = model.training, model.mask.progress
    model.eval()
    model.mask.progress = 0.0  # pictures of different epochs hide the same cells
    try:
        device = next(model.parameters()).device
        images = inputs.to(device)
        images = images if images.is_floating_point() else images.float() / 255
        generator = torch.Generator().manual_seed(seed)
        visible = model.draw_mask(images, generator)
        student_out = model.student_output(images, visible)
        teacher_outs = model.teach(images, visible)
        shown: Sequence[int] | None = getattr(model, "shown_channels", None)
        pictures = as_rgb(images, shown) if shown is not None or images.shape[1] != 3 else images
        columns = {"image": pictures, "seen": hide_cells(pictures, visible)}
        for name, objective in model.objectives.items():
            if objective.terms:
                columns.update(_feature_columns(name, objective, student_out, teacher_outs[name]))
            reconstruction = objective.reconstruct(student_out, student_out.layout)
            if reconstruction is not None:
                columns[name] = as_rgb(reconstruction, shown) if pictures is not images else reconstruction
    finally:
        model.train(training)
        model.mask.progress = progress
    return columns


def _feature_columns(name: str, objective: _Shown, student_out: object, teacher_out: object) -> dict[str, Tensor]:
    terms = objective.terms
    columns = {}
    for term in terms:
        label = name if len(terms) == 1 else f"{name} {term}"
        target = objective.target_map(teacher_out, term)
        basis = colour_basis(target)
        columns[f"{label}: teacher"] = token_colours(target, basis)
        columns[f"{label}: student"] = token_colours(objective.predict(student_out, term), basis)
    return columns
