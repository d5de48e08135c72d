"""G2SD, first ("generic") stage: the student's decoder predicts a hidden state of the teacher's decoder.

Paper: "Generic-to-Specific Distillation of Masked Autoencoders", arXiv 2302.14771; released code pengzhiliang/G2SD, read for
facts only. Teacher and student see the same visible patches; P is a 2-layer MLP with GELU on the raw output of the student's
decoder, h the teacher's hidden state after its fourth decoder block (index 3, no decoder norm):

    L = mean over positions and channels of smooth_l1_beta( P(student)[p, c] - LN0(h)[p, c] ),   beta = 2

The paper and the class default supervise masked positions, the released run all of them (``supervise_all``).

What differs: the class token is not supervised (one of 197 tokens of the released run, and a CNN has none); the encoder loss of
the released code is left out, which multiplies it by 0; the teacher is in eval mode. A sparse CNN with its UNet decoder is a
student like any other.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from hgkd.errors import InvalidValueError
from hgkd.objectives.alignment import (
    build_projector,
    decoder_state,
    fit_grid,
    positions_count,
    require_teacher,
    resolve_block,
)
from hgkd.objectives.distances import layer_norm0, smooth_l1_by_position
from hgkd.objectives.loss_terms import LossTerm, MaskedObjective, Setup
from hgkd.objectives.positions import check_supervise, supervised_cells, supervised_positions, visible_on
from hgkd.registry import MASKED_OBJECTIVES
from hgkd.structures import StudentOutput, TeacherNeeds, TeacherOutput

if TYPE_CHECKING:
    from hgkd.sparse import CellLayout


@MASKED_OBJECTIVES.register_module()
class G2SD(MaskedObjective):
    """G2SD's generic distillation; needs a MAE teacher with its decoder.

    Args:
        decoder_block: index of the teacher's decoder block whose hidden state is the target; negative counts from the end.
        supervise: 'masked', 'visible' or 'all' positions.
        beta: where smooth L1 turns from square to linear, > 0.

    Term: ``decoder``. A good final value is near 0.02 (G2SD's authors, issue 7 of their repository); 0.2 means a target without
    structure, which is why a teacher without decoder weights is refused.
    """

    def __init__(self, decoder_block: int = 3, supervise: str = "masked", beta: float = 2.0) -> None:
        super().__init__()
        if beta <= 0:
            raise InvalidValueError("beta-not-positive", f"beta must be above 0, got {beta}; G2SD uses 2.0")
        self.supervise = check_supervise(supervise)
        self.beta = beta
        self.projector: nn.Module | None = None
        self._block = decoder_block
        self._grid = (0, 0)

    terms = ("decoder",)

    @property
    def needs(self) -> TeacherNeeds:
        """Outputs that the teacher must compute."""
        return TeacherNeeds(decoder_block=self._block, visible_only=True)

    def _build(self, setup: Setup) -> None:
        """Resolve the block and build the MLP.

        Raises:
            ValueError: no teacher, one without decoder, or no such block in it.
        """
        teacher_info, self._grid = require_teacher(self, setup.teacher_info, setup.teacher_grid)
        if teacher_info.decoder_width is None or teacher_info.decoder_depth < 1:
            raise InvalidValueError(
                "teacher-without-decoder",
                f"G2SD learns from the teacher's decoder, but this teacher ({teacher_info.kind}) has none; load a MAE "
                "checkpoint with its decoder. With a random decoder the loss would stay near 0.2 instead of 0.02",
            )
        self._block = resolve_block(self._block, teacher_info.decoder_depth, "decoder_block")
        self.projector = build_projector("mlp", setup.student.decoded_channels, teacher_info.decoder_width)

    def predict(self, student_out: StudentOutput, term: str | None = None) -> Tensor:
        """The student's prediction of the normalised target, (B, D', gh, gw)."""
        self.require_prepared()
        assert self.projector is not None
        prediction: Tensor = self.projector(fit_grid(student_out.decoded, self._grid))
        return prediction

    def target_map(self, teacher_out: TeacherOutput, term: str | None = None) -> Tensor:
        """The normalised target, fp32 (B, D', gh, gw)."""
        return layer_norm0(decoder_state(teacher_out))

    def loss_terms(
        self, student_out: StudentOutput, teacher_out: TeacherOutput | None, layout: CellLayout
    ) -> dict[str, LossTerm]:
        """The terms that the class describes; raises ValueError when not one position is supervised."""
        assert teacher_out is not None
        count = positions_count(layout, supervised_cells(layout, self.supervise), self._grid)
        positions = supervised_positions(visible_on(layout.visible, self._grid), self.supervise)
        distance = partial(smooth_l1_by_position, beta=self.beta)
        prediction, target = self.predict(student_out), self.target_map(teacher_out)
        return {"decoder": LossTerm(prediction, target, positions, count, distance)}

    def extra_repr(self) -> str:
        return f"decoder_block={self._block}, supervise={self.supervise!r}, beta={self.beta}"
