"""NKD, normalised knowledge distillation: arXiv 2303.13005, its loss L_nkd; in G2SD an option of the specific stage.

With s and t the student's and the teacher's probabilities, c the true class, and N(.)^T the distribution over the other classes
at temperature T, renormalised to 1:

    L = - t_c log s_c - gamma * T^2 * sum_{i != c} N(t)^T_i log N(s)^T_i , mean over images

It holds the label's own term, so it trains the class head, and a student needs no second one: G2SD's released code leaves its
second head out with NKD. For a mixed label c is its largest part, as there. That code renormalises by dividing; a softmax
over the other classes' logits is the same and cannot divide by zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hgkd.errors import InvalidValueError
from hgkd.objectives.finetuning.logits import LogitObjective
from hgkd.registry import FINETUNING_OBJECTIVES


@FINETUNING_OBJECTIVES.register_module()
class NKD(LogitObjective):
    """Normalised knowledge distillation, see the module's header. G2SD uses it without another label loss: ``label_weight=0``.

    Args:
        temperature: T, above 0.
        gamma: weight of the other classes' part; 1 in G2SD, 1.5 in the paper's ImageNet runs, which add a label loss.

    Term: ``logits``.
    """

    teaches_class_head = True

    def __init__(self, temperature: float = 1.0, gamma: float = 1.0) -> None:
        super().__init__()
        if temperature <= 0.0 or gamma < 0.0:
            raise InvalidValueError(
                "temperature-or-gamma-out-of-range",
                f"temperature must be above 0 and gamma 0 or more, got {temperature} and {gamma}",
            )
        self.temperature = temperature
        self.gamma = gamma

    def value(self, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        true = targets.argmax(1, keepdim=True)
        weight = teacher.softmax(1).gather(1, true)
        of_true = -(weight * F.log_softmax(student, dim=1).gather(1, true)).mean()
        if student.shape[1] < 2:
            return of_true
        others = torch.ones_like(student, dtype=torch.bool).scatter_(1, true, False)
        logits = [(part[others].view(len(part), -1) / self.temperature) for part in (student, teacher)]
        of_others = -(logits[1].softmax(1) * F.log_softmax(logits[0], dim=1)).sum(1).mean()
        return of_true + self.gamma * self.temperature**2 * of_others

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, gamma={self.gamma}"
