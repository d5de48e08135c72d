"""SparK's objective: reconstruct the pixels of hidden cells. H-GKD without a teacher, and its control.

Paper: "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling", arXiv 2301.03580;
released code keyu-tian/SparK (MIT), read for facts only. Target: the cell x cell x 3 pixels of a cell, standardised
by the cell's own mean and variance taken over all its values, colours together; the variance is the unbiased one (n -
1), as in SparK's and MAE's code, and the std is sqrt(variance + 1e-6). Loss: squared error, mean over the
cell's values, then over the cells.

What differs: SparK standardises images that were normalised with ImageNet's mean and std before, here they are
in [0, 1] (a constant shift and scale per colour). SparK decodes to full resolution; here a student with
``out_stride`` s > 1 predicts the s x s x 3 pixels of a position at once by a 1x1 convolution and a pixel shuffle, a
patch-wise linear head, which saves the finest decoder stages. With ``out_stride=1`` it is SparK's own head. The
recipe decides.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hgkd.errors import InvalidValueError
from hgkd.objectives.alignment import DecodingStudent
from hgkd.objectives.loss_terms import LossTerm, MaskedObjective, Setup
from hgkd.objectives.positions import check_supervise, supervised_cells, supervised_positions, visible_on
from hgkd.registry import MASKED_OBJECTIVES
from hgkd.structures import StudentOutput, TeacherOutput

if TYPE_CHECKING:
    from hgkd.sparse import CellLayout


def split_cells(images: Tensor, cell: int) -> Tensor:
    """The values of each cell: (B, C, H, W) -> (B, h, w, C * cell * cell), ordered (channel, row, column)."""
    batch, channels, height, width = images.shape
    split = images.reshape(batch, channels, height // cell, cell, width // cell, cell)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(batch, height // cell, width // cell, channels * cell * cell)


def join_cells(cells: Tensor, cell: int) -> Tensor:
    """Inverse of :func:`split_cells`: (B, h, w, C * cell * cell) -> (B, C, H, W)."""
    batch, h, w, values = cells.shape
    split = cells.reshape(batch, h, w, values // cell**2, cell, cell)
    return split.permute(0, 3, 1, 4, 2, 5).reshape(batch, values // cell**2, h * cell, w * cell)


def cell_statistics(cells: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Mean and std of each cell, fp32 (B, h, w, 1) each: std = sqrt(unbiased variance + eps)."""
    variance, mean = torch.var_mean(cells.float(), dim=-1, keepdim=True)
    return mean, (variance + eps).sqrt()


def cell_maps(images: Tensor, cell: int) -> Tensor:
    """The values of each cell as channels, fp32: (B, C, H, W) -> (B, C * cell * cell, h, w)."""
    return split_cells(images.float(), cell).permute(0, 3, 1, 2)


def standardised_cells(images: Tensor, cell: int) -> Tensor:
    """The target: :func:`cell_maps`, each cell with its own mean and std removed."""
    values = split_cells(images.float(), cell)
    mean, std = cell_statistics(values)
    return ((values - mean) / std).permute(0, 3, 1, 2)


def squared_error_by_position(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error averaged over channels, fp32: two maps (B, D, h, w) -> (B, h, w)."""
    return (prediction.float() - target.float()).square().mean(dim=1)


@MASKED_OBJECTIVES.register_module()
class PixelReconstruction(MaskedObjective):
    """SparK's pixel objective, and MAE's norm-pix one; needs no teacher.

    A student with a pixel head of its own (a ViT: MAE's) uses that; others get a 1x1 convolution here. Cells of one patch
    make it MAE's loss, up to the standardisation of the images named in the header.

    Args:
        supervise: 'masked' (SparK), 'visible' or 'all' cells.
        standardise: predict each cell's pixels without its own mean and std; False: the pixels as the student gets them,
            normalised for the whole data set, as in DMAE's released script and MAE without norm-pix.

    Term: ``reconstruction``.
    """

    _student: DecodingStudent

    def __init__(self, supervise: str = "masked", standardise: bool = True) -> None:
        super().__init__()
        self.supervise = check_supervise(supervise)
        self.standardise = standardise
        self.head: nn.Conv2d | None = None  # None with a student that gives pixels
        self._channels = 3

    def _build(self, setup: Setup) -> None:
        """Build the head."""
        # no submodule, and asked at every step: a checkpoint may bring other statistics of the pixels
        object.__setattr__(self, "_student", setup.student)
        if not setup.student.give_pixels():
            self.head = nn.Conv2d(setup.student.decoded_channels, setup.student.in_chans * setup.student.out_stride**2, 1)
        self._channels = setup.student.in_chans

    def predict(self, student_out: StudentOutput, term: str | None = None) -> Tensor:
        """The predicted pixels, standardised or normalised as the target is, (B, 3, H, W)."""
        if student_out.pixels is not None:
            return student_out.pixels
        self.require_prepared()
        assert self.head is not None
        predicted = self.head(student_out.decoded)
        return F.pixel_shuffle(predicted, math.isqrt(predicted.shape[1] // self._channels))

    def loss_terms(
        self, student_out: StudentOutput, teacher_out: TeacherOutput | None, layout: CellLayout
    ) -> dict[str, LossTerm]:
        """The term that the class describes; ``teacher_out`` is not used. Raises ValueError when not one cell is supervised."""
        prediction = cell_maps(self.predict(student_out), layout.cell)
        images = _images(student_out)
        make = standardised_cells if self.standardise else self._normalised_cells
        target = make(images, layout.cell)
        positions = supervised_positions(layout.visible, self.supervise)
        count = supervised_cells(layout, self.supervise)
        return {"reconstruction": LossTerm(prediction, target, positions, count, squared_error_by_position)}

    @torch.no_grad()
    def reconstruct(self, student_out: StudentOutput, layout: CellLayout) -> Tensor:
        """A picture (B, 3, H, W) in [0, 1]: the image where visible, the prediction where hidden.

        A standardised prediction is brought back to pixels with the true mean and std of each cell, which the student
        never sees: colours and contrast are thus given, only the structure inside a cell is the student's.
        """
        images = _images(student_out).float()
        predicted = self.predict(student_out).float()
        if self.standardise:
            mean, std = cell_statistics(split_cells(images, layout.cell))
            predicted = join_cells(split_cells(predicted, layout.cell) * std + mean, layout.cell)
        else:
            predicted = predicted * self._student.std + self._student.mean
        shown = visible_on(layout.visible, (images.shape[-2], images.shape[-1])).unsqueeze(1)
        return torch.where(shown, images, predicted.clamp(0.0, 1.0))

    def _normalised_cells(self, images: Tensor, cell: int) -> Tensor:
        return cell_maps((images - self._student.mean) / self._student.std, cell)

    def extra_repr(self) -> str:
        return f"supervise={self.supervise!r}, standardise={self.standardise}"


def _images(student_out: StudentOutput) -> Tensor:
    if student_out.images is None:
        raise InvalidValueError(
            "student-images-missing",
            "StudentOutput.images is None; pixel targets are made from the images the student was given",
        )
    return student_out.images
