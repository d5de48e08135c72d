"""Base class of the objectives of fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from hgkd.objectives.base import Objective

if TYPE_CHECKING:
    from hgkd.networks.classifier import ClassifierOutput

Shape = tuple[int, int, int]


class FinetuningObjective(Objective):
    """Loss by which a fine-tuned classifier learns from a teacher; subclasses give :meth:`forward`.

    Attributes:
        needs_classes: the teacher must have the student's classes, because the objective compares predictions.
        teaches_class_head: of a student with two heads the class head learns from the teacher, not the second one.
    """

    needs_classes = True
    teaches_class_head = False

    def prepare(self, student: Shape, teacher: Shape) -> None:
        """Build what depends on the shapes (C, h, w) of both last feature maps; called once, before the optimiser is made."""
        self._build(student, teacher)
        self._prepared = True

    def _build(self, student: Shape, teacher: Shape) -> None:
        """The layers of :meth:`prepare`; none by default."""

    def forward(self, student: ClassifierOutput, teacher: ClassifierOutput, targets: Tensor) -> dict[str, Tensor]:
        """Loss terms, fp32 scalars.

        Args:
            student, teacher: logits (B, K) of both heads, and the last feature map (B, C, h, w).
            targets: of the labels, mixed and smoothed, (B, K), rows summing to 1.
        """
        raise NotImplementedError
