"""Objectives of masked distillation, and their loss terms: a prediction, a target, positions and a distance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hgkd.errors import InvalidTypeError
from hgkd.objectives.alignment import DecodingStudent
from hgkd.objectives.base import Objective
from hgkd.objectives.positions import mean_over
from hgkd.structures import StudentOutput, TeacherInfo, TeacherNeeds, TeacherOutput

if TYPE_CHECKING:
    from hgkd.sparse import CellLayout

Distance = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LossTerm:
    """A loss term: a prediction compared with a target at some positions.

    Attributes:
        prediction, target: (B, D, h, w); no gradient goes to the target.
        positions: bool (B, h, w), True where compared.
        count: what the sum over positions is divided by.
        distance: two maps (B, D, h, w) -> (B, h, w), fp32.
        weight: factor of the term.
    """

    prediction: Tensor
    target: Tensor
    positions: Tensor
    count: float | Tensor
    distance: Distance
    weight: float = 1.0

    def loss(self) -> Tensor:
        """The term, an fp32 scalar."""
        return self._mean(self.distance(self.prediction, self.target.detach()))

    @torch.no_grad()
    def loss_of_mean(self) -> Tensor:
        """Loss of predicting the batch's mean target everywhere; a term that has learnt something is below it."""
        target, positions = self.target.float(), self.positions[:, None]
        mean = target.masked_fill(~positions, 0.0).sum((0, 2, 3)) / positions.sum()
        return self._mean(self.distance(mean[None, :, None, None].expand_as(target), target))

    def _mean(self, values: Tensor) -> Tensor:
        return self.weight * mean_over(values, self.positions, self.count)


@dataclass(frozen=True)
class Setup:
    """Student, teacher and grids that an objective of masked distillation is built for.

    Attributes:
        student: the student.
        teacher_info, teacher_grid: of the teacher, its (gh, gw) tokens; None without one.
        mask_grid: (h, w) cells.
    """

    student: DecodingStudent
    teacher_info: TeacherInfo | None
    teacher_grid: tuple[int, int] | None
    mask_grid: tuple[int, int]


class MaskedObjective(Objective):
    """An objective of masked distillation; subclasses give :meth:`loss_terms`, and :meth:`_build` where they have layers.

    Everything else that the model and the hooks ask of an objective has a default here. One with ``terms`` gives
    :meth:`predict` and :meth:`target_map` as well, of which pictures are made during the training.
    """

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if cls.terms is not MaskedObjective.terms:
            absent = [name for name in ("predict", "target_map") if getattr(cls, name) is getattr(MaskedObjective, name)]
            if absent:
                raise InvalidTypeError(
                    "terms-without-methods",
                    f"{cls.__name__} has terms, of which pictures are made, but gives no {' and no '.join(absent)}; define "
                    "them, or leave terms out",
                )

    @property
    def needs(self) -> TeacherNeeds | None:
        """Outputs that the teacher must compute, or None where the objective learns from no teacher."""
        return None

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms that compare features position by position and can be shown as pictures; none by default."""
        return ()

    def decoder_strides(self, student: DecodingStudent) -> tuple[int, ...]:
        """Scales of the student's decoder that the objective reads, by default its output; none where it reads no decoder."""
        return (student.out_stride,)

    def prepare(self, setup: Setup) -> None:
        """Build what depends on student and teacher; called once, before the optimiser is made.

        Raises:
            ValueError: the objective does not fit the two.
        """
        self._build(setup)
        self._prepared = True

    def _build(self, setup: Setup) -> None:
        """The layers of :meth:`prepare`; none by default."""

    def predict(self, student_out: StudentOutput, term: str | None = None) -> Tensor:
        """The student's prediction (B, D, h, w) of one of ``terms``."""
        raise NotImplementedError(f"{type(self).__name__} gives no predict")

    def target_map(self, teacher_out: TeacherOutput, term: str | None = None) -> Tensor:
        """The teacher's target (B, D, h, w) for one of ``terms``."""
        raise NotImplementedError(f"{type(self).__name__} gives no target_map")

    def reconstruct(self, student_out: StudentOutput, layout: CellLayout) -> Tensor | None:
        """A picture (B, 3, H, W) in [0, 1] of what the student generates; None: there is none."""
        return None

    def loss_terms(
        self, student_out: StudentOutput, teacher_out: TeacherOutput | None, layout: CellLayout
    ) -> dict[str, LossTerm]:
        """The loss terms by name."""
        raise NotImplementedError

    def forward(self, student_out: StudentOutput, teacher_out: TeacherOutput | None, layout: CellLayout) -> dict[str, Tensor]:
        """Loss terms, fp32 scalars.

        Raises:
            ValueError: not one position is supervised (e.g. ``supervise='masked'`` with mask ratio 0).
        """
        return {term: found.loss() for term, found in self.loss_terms(student_out, teacher_out, layout).items()}
