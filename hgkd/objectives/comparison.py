"""What most objectives are made of: a prediction, a target, the places where they are compared, and a distance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hgkd.objectives.places import mean_over
from hgkd.structures import StudentOutput, TeacherOutput

if TYPE_CHECKING:
    from hgkd.sparse import CellLayout

Distance = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Comparison:
    """One loss term.

    Attributes:
        prediction, target: (B, D, h, w); no gradient goes to the target.
        places: bool (B, h, w), True where compared.
        count: what the sum over places is divided by.
        distance: two maps (B, D, h, w) -> (B, h, w), fp32.
        weight: factor of the term.
    """

    prediction: Tensor
    target: Tensor
    places: Tensor
    count: int | Tensor
    distance: Distance
    weight: float = 1.0

    def loss(self) -> Tensor:
        """The term, an fp32 scalar."""
        return self._mean(self.distance(self.prediction, self.target.detach()))

    @torch.no_grad()
    def loss_of_mean(self) -> Tensor:
        """What the best constant knows: the term of a prediction that is everywhere the mean target of the batch."""
        target, places = self.target.float(), self.places[:, None]
        mean = target.masked_fill(~places, 0.0).sum((0, 2, 3)) / places.sum()
        return self._mean(self.distance(mean[None, :, None, None].expand_as(target), target))

    def _mean(self, values: Tensor) -> Tensor:
        return self.weight * mean_over(values, self.places, self.count)


class ComparingObjective(nn.Module):
    """An objective whose terms are comparisons; subclasses give :meth:`comparisons`."""

    def comparisons(
        self, student_out: StudentOutput, teacher_out: TeacherOutput | None, layout: CellLayout
    ) -> dict[str, Comparison]:
        """Name of a term -> its comparison."""
        raise NotImplementedError

    def forward(self, student_out: StudentOutput, teacher_out: TeacherOutput | None, layout: CellLayout) -> dict[str, Tensor]:
        """Loss terms, fp32 scalars.

        Raises:
            ValueError: not one place is supervised (e.g. ``supervise='masked'`` with mask ratio 0).
        """
        return {term: found.loss() for term, found in self.comparisons(student_out, teacher_out, layout).items()}
