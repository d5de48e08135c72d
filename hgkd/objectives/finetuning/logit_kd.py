"""Plain distillation of logits, the control: "Distilling the Knowledge in a Neural Network", arXiv 1503.02531, section 2.

L = T^2 * KL( softmax(teacher / T) || softmax(student / T) ), mean over images
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hgkd.errors import InvalidValueError
from hgkd.objectives.finetuning.logits import LogitObjective
from hgkd.registry import FINETUNING_OBJECTIVES


@FINETUNING_OBJECTIVES.register_module()
class LogitKD(LogitObjective):
    """Distillation of logits at a temperature, see the module's header.

    Args:
        temperature: T, above 0.

    Term: ``logits``.
    """

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__()
        if temperature <= 0.0:
            raise InvalidValueError(
                "temperature-not-positive", f"temperature must be above 0, got {temperature}; 1 to 4 is usual"
            )
        self.temperature = temperature

    def value(self, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        prediction, target = (F.log_softmax(logits / self.temperature, dim=1) for logits in (student, teacher))
        return self.temperature**2 * F.kl_div(prediction, target, reduction="batchmean", log_target=True)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
