"""What distillation on the logits of two classifiers has in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from hgkd.networks.classifier import ClassifierOutput


class LogitObjective(nn.Module):
    """An objective of fine-tuning that compares classifiers. Subclasses give :meth:`value`.

    Attributes:
        needs_classes: the teacher must have the student's classes.
        teaches_class_head: of a student with two heads the class head learns from the teacher, not the second one.
    """

    needs_classes = True
    teaches_class_head = False

    def prepare(self, student: tuple[int, int, int], teacher: tuple[int, int, int]) -> None:
        """Build what depends on the shapes (C, h, w) of both last feature maps; called once, before the optimiser is made."""

    def value(self, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        """The loss, an fp32 scalar, from fp32 logits and the label targets, all (B, K)."""
        raise NotImplementedError

    def forward(self, student: ClassifierOutput, teacher: ClassifierOutput, targets: Tensor) -> dict[str, Tensor]:
        """Term -> fp32 scalar."""
        logits = student.logits if self.teaches_class_head else student.distilled
        return {"logits": self.value(logits.float(), teacher.logits.detach().float(), targets)}
