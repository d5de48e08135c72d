"""Base of distillation on the logits of two classifiers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from hgkd.objectives.finetuning.base import FinetuningObjective

if TYPE_CHECKING:
    from hgkd.networks.classifier import ClassifierOutput


class LogitObjective(FinetuningObjective):
    """An objective of fine-tuning that compares classifiers. Subclasses give :meth:`value`."""

    def value(self, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        """The loss, an fp32 scalar, from fp32 logits and the label targets, all (B, K)."""
        raise NotImplementedError

    def forward(self, student: ClassifierOutput, teacher: ClassifierOutput, targets: Tensor) -> dict[str, Tensor]:
        """Term -> fp32 scalar."""
        logits = student.logits if self.teaches_class_head else student.distilled
        return {"logits": self.value(logits.float(), teacher.logits.detach().float(), targets)}
