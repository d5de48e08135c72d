"""MGD for classification: the student's last feature map, with channels masked, generates the teacher's.

Paper and formula: :mod:`hgkd.objectives.masked.mgd` (arXiv 2205.01529; released cls/configs/distillers: ratio 0.15, alpha
7e-5), added to the label loss with weight 1. Of a ViT the map is its patch tokens after the last norm; where the grids differ,
the student's is brought to the teacher's.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from hgkd.errors import InvalidValueError
from hgkd.objectives.alignment import fit_grid
from hgkd.objectives.distances import layer_norm0
from hgkd.objectives.finetuning.base import FinetuningObjective, Shape
from hgkd.objectives.generation import MGDLoss
from hgkd.registry import FINETUNING_OBJECTIVES

if TYPE_CHECKING:
    from hgkd.networks.classifier import ClassifierOutput


@FINETUNING_OBJECTIVES.register_module()
class FeatureMapMGD(FinetuningObjective):
    """MGD on the last feature map of classifiers, see the module's header; the defaults are the published ones.

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
        self._make_loss = partial(MGDLoss, mask=mask, ratio=ratio, alpha=alpha, reduction=reduction)
        self._make_loss(1, 1)  # refuses what is wrong here, before training
        self._grid = (0, 0)
        self.loss: MGDLoss | None = None

    def _build(self, student: Shape, teacher: Shape) -> None:
        """The generator.

        Raises:
            ValueError: one of the two gives no feature map.
        """
        for whose, shape in (("student", student), ("teacher", teacher)):
            if len(shape) != 3:
                raise InvalidValueError(
                    "classifier-without-map",
                    f"FeatureMapMGD compares last feature maps (C, h, w), and the {whose} gives features of shape {shape}: "
                    "tokens on no grid; take another network, or an objective on answers such as LogitKD",
                )
        self._grid = teacher[1:]
        self.loss = self._make_loss(student[0], teacher[0])

    def forward(self, student: ClassifierOutput, teacher: ClassifierOutput, targets: Tensor) -> dict[str, Tensor]:
        """Term -> fp32 scalar."""
        self.require_prepared()
        assert self.loss is not None
        target = layer_norm0(teacher.feature) if self.normalise else teacher.feature
        return {"generation": self.loss(fit_grid(student.feature, self._grid), target)}
