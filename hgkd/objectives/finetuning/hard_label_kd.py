"""Hard-label distillation: the class that the teacher would answer is a second label.

G2SD's specific stage (arXiv 2302.14771; pengzhiliang/G2SD, engine_finetune_dis.py, read for facts only), after DeiT
(arXiv 2012.12877): with the label loss on the class head and this on the distillation head,

    L = ( CE(class head, label) + CE(distillation head, argmax teacher) ) / 2

which a config writes as ``label_weight=0.5`` and ``weight=0.5``. The teacher sees the student's images, mixed ones too.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from hgkd.objectives.finetuning.logits import LogitObjective
from hgkd.registry import FINETUNING_OBJECTIVES


@FINETUNING_OBJECTIVES.register_module()
class HardLabelKD(LogitObjective):
    """Cross entropy between the student's second head and the teacher's answer. Term: ``logits``."""

    def value(self, student: Tensor, teacher: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(student, teacher.argmax(1))
