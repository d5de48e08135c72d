"""MGD for classification: the student's last feature map, with channels masked, generates the teacher's.

Paper and formula: :mod:`hgkd.objectives.masked.mgd` (arXiv 2205.01529; released cls/configs/distillers: ratio 0.15, alpha
7e-5), added to the label loss with weight 1. Of a ViT the map is its patch tokens after the last norm; where the grids differ,
the student's is brought to the teacher's.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from hgkd.objectives.alignment import fit_grid
from hgkd.objectives.distances import layer_norm0
from hgkd.objectives.generation import MGDLoss
from hgkd.registry import MODELS

if TYPE_CHECKING:
    from hgkd.networks.classifier import ClassifierOutput


@MODELS.register_module()
class LastMapMGD(nn.Module):
    """See the module's header; the defaults are the published ones.

    Args:
        normalise: compare with LN0 of the teacher's map over channels, of one scale for every teacher; False: as published.
        mask, ratio, alpha, reduction: see :class:`hgkd.objectives.generation.MGDLoss`.

    Term: ``generation``.
    """

    needs_classes = False

    def __init__(
        self,
        normalise: bool = False,
        mask: str = "channel",
        ratio: float = 0.15,
        alpha: float = 7e-5,
        reduction: str = "sum",
    ) -> None:
        super().__init__()
        self.normalise = normalise
        self._build = partial(MGDLoss, mask=mask, ratio=ratio, alpha=alpha, reduction=reduction)
        self._build(1, 1)  # refuses what is wrong here, before training
        self._grid = (0, 0)
        self.loss: MGDLoss | None = None

    def prepare(self, student: tuple[int, int, int], teacher: tuple[int, int, int]) -> None:
        """Build the generator from both maps' shapes (C, h, w); called once, before the optimiser is made."""
        self._grid = teacher[1:]
        self.loss = self._build(student[0], teacher[0])

    def forward(self, student: ClassifierOutput, teacher: ClassifierOutput, targets: Tensor) -> dict[str, Tensor]:
        """Term -> fp32 scalar."""
        if self.loss is None:
            raise RuntimeError("LastMapMGD.prepare() must be called before the objective is used")
        target = layer_norm0(teacher.feature) if self.normalise else teacher.feature
        return {"generation": self.loss(fit_grid(student.feature, self._grid), target)}
