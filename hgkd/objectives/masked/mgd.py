"""MGD: the student's feature map, randomly masked, must generate the teacher's whole one.

Paper: "Masked Generative Distillation", arXiv 2205.01529; released code yzd-v/MGD, read for facts only. With A a 1x1
convolution (only where the channels differ), M a random mask, drawn anew on every forward, and G the generator (3x3
convolution, ReLU, 3x3 convolution):

    L = alpha * sum over images, channels and positions of ( G( M * A(S) ) - T )^2 / N

Classification masks channels (ratio 0.15, alpha 7e-5), detection and segmentation positions (0.65 and 0.75, 2e-5). Nothing is
rescaled by 1 / (1 - ratio). The mean-reduced form, mean of the squares times alpha, needs no tuning to the size of the map.

:class:`MGDLoss` is a loss between any two maps; :class:`MGD` makes it an objective of masked distillation.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from hgkd.errors import InvalidValueError
from hgkd.objectives.alignment import (
    DecodingStudent,
    block_tokens,
    encoder_map,
    fit_grid,
    positions_count,
    require_teacher,
    resolve_block,
    resolve_level,
)
from hgkd.objectives.distances import layer_norm0
from hgkd.objectives.generation import MGDLoss, error_by_position
from hgkd.objectives.loss_terms import LossTerm, MaskedObjective, Setup
from hgkd.objectives.positions import check_supervise, supervised_cells, supervised_positions, visible_on
from hgkd.registry import MASKED_OBJECTIVES
from hgkd.structures import StudentOutput, TeacherNeeds, TeacherOutput

if TYPE_CHECKING:
    from hgkd.sparse import CellLayout


@MASKED_OBJECTIVES.register_module()
class MGD(MaskedObjective):
    """MGD as an objective of masked distillation: a block of the teacher from a map of the student.

    Args:
        feature: the student's map: 'decoded', or the index of an encoder level (of a ViT: a block), which is zero at hidden
            cells before anything more is masked; None is the coarsest level that fits the teacher's grid.
        block: encoder block of the teacher, which sees the whole image; negative counts from the end.
        supervise: 'masked', 'visible' or 'all' positions.
        normalise: compare with LN0(tokens), whose scale is the same in every block and teacher; False: raw, as published.
        mask, ratio, alpha, reduction: see :class:`MGDLoss`.

    Term: ``generation``.
    """

    def __init__(
        self,
        feature: str | int | None = "decoded",
        block: int = -1,
        supervise: str = "all",
        normalise: bool = True,
        mask: str = "position",
        ratio: float = 0.65,
        alpha: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if isinstance(feature, str) and feature != "decoded":
            raise InvalidValueError(
                "feature-unknown", f"feature must be 'decoded', the index of an encoder level, or None, got {feature!r}"
            )
        self.supervise = check_supervise(supervise)
        self.normalise = normalise
        self._make_loss = partial(MGDLoss, mask=mask, ratio=ratio, alpha=alpha, reduction=reduction)
        self._make_loss(1, 1)  # refuses what is wrong here, before training
        self._feature = feature
        self._block = block
        self._grid = (0, 0)
        self.loss: MGDLoss | None = None

    terms = ("generation",)

    @property
    def needs(self) -> TeacherNeeds:
        """Outputs that the teacher must compute."""
        return TeacherNeeds(blocks=(self._block,))

    def decoder_strides(self, student: DecodingStudent) -> tuple[int, ...]:
        """The decoder's output, or none with an encoder level."""
        return super().decoder_strides(student) if self._feature == "decoded" else ()

    def _build(self, setup: Setup) -> None:
        """Resolve block and level and build the generator.

        Raises:
            ValueError: no teacher, or a block or level that is not there or does not fit.
        """
        teacher_info, self._grid = require_teacher(self, setup.teacher_info, setup.teacher_grid)
        self._block = resolve_block(self._block, teacher_info.depth, "block")
        channels = setup.student.decoded_channels
        if not isinstance(self._feature, str):
            self._feature = resolve_level(self._feature, setup.student, self._grid, setup.mask_grid)
            channels = setup.student.feature_channels[self._feature]
        self.loss = self._make_loss(channels, teacher_info.width)

    def predict(self, student_out: StudentOutput, term: str | None = None) -> Tensor:
        """The generated map (B, D, gh, gw), from a fresh mask."""
        self.require_prepared()
        assert self.loss is not None
        if isinstance(self._feature, int):
            return self.loss.restore(encoder_map(student_out, self._feature, self._grid))
        return self.loss.restore(fit_grid(student_out.decoded, self._grid))

    def target_map(self, teacher_out: TeacherOutput, term: str | None = None) -> Tensor:
        """The teacher's map that is to be generated, fp32 (B, D, gh, gw)."""
        tokens = block_tokens(teacher_out, self._block)
        return layer_norm0(tokens) if self.normalise else tokens.float()

    def loss_terms(
        self, student_out: StudentOutput, teacher_out: TeacherOutput | None, layout: CellLayout
    ) -> dict[str, LossTerm]:
        """The terms that the class describes; raises ValueError when not one position is supervised."""
        prediction = self.predict(student_out)
        assert teacher_out is not None
        assert self.loss is not None
        count = positions_count(layout, supervised_cells(layout, self.supervise), self._grid)
        positions = supervised_positions(visible_on(layout.visible, self._grid), self.supervise)
        summed = self.loss.reduction == "sum"
        distance = partial(error_by_position, reduction=self.loss.reduction)
        return {
            "generation": LossTerm(
                prediction,
                self.target_map(teacher_out),
                positions,
                layout.batch if summed else count,
                distance,
                self.loss.alpha,
            )
        }

    def extra_repr(self) -> str:
        return f"feature={self._feature!r}, block={self._block}, supervise={self.supervise!r}, normalise={self.normalise}"
