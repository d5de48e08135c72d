"""The student's pooled feature infers the mean token of the whole image from the visible cells.

This project's own addition, no paper's: position-wise objectives train the decoder's output, while k-NN, probes and classifiers
read the mean of the encoder's last level. Here that mean, over the visible positions, predicts by one linear map what the
teacher's tokens are on average over *all* positions, hidden ones included:

    L = mean over channels of smooth_l1_beta( linear(mean over visible positions of the last level) - standardise(m) )
    m = LN0( mean over P of the teacher's tokens ),   P = all positions, or the visible ones (``supervise``)

``standardise`` subtracts each channel's mean over the batch and divides by its std: what all images share is worth
nothing in a feature, and without it the few channels of large variance that ViT tokens have would make up the loss.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hgkd.errors import InvalidValueError
from hgkd.objectives.alignment import DecodingStudent, block_tokens, require_teacher, resolve_block
from hgkd.objectives.distances import layer_norm0, smooth_l1_by_position
from hgkd.objectives.loss_terms import LossTerm, MaskedObjective, Setup
from hgkd.objectives.positions import check_supervise, visible_on
from hgkd.registry import MASKED_OBJECTIVES
from hgkd.structures import StudentOutput, TeacherNeeds, TeacherOutput

if TYPE_CHECKING:
    from hgkd.sparse import CellLayout


def standardised_mean(tokens: Tensor, positions: Tensor | None = None, views: int = 1) -> Tensor:
    """The target: raw teacher tokens (B, D, gh, gw) of several images -> fp32 (B, D) with mean 0 and variance 1 over the batch.

    Args:
        positions: bool (B, gh, gw), the tokens that are averaged, at least one an image; None: all.
        views: how many times each image stands among the tokens.

    Raises:
        ValueError: a batch of one image, whose target would be 0.
    """
    if len(tokens) < 2 * views:
        raise InvalidValueError("batch-of-one", "PooledFeature compares the images of a batch; use a batch size above 1")
    raw = tokens.float()
    if positions is None:
        mean = raw.mean(dim=(2, 3), keepdim=True)
    else:
        chosen = positions[:, None]
        mean = raw.masked_fill(~chosen, 0.0).sum((2, 3), keepdim=True) / chosen.sum((2, 3), keepdim=True)
    mean = layer_norm0(mean).flatten(1)
    centred = mean - mean.mean(0)
    return centred / (centred.square().mean(0) + 1e-6).sqrt()


@MASKED_OBJECTIVES.register_module()
class PooledFeature(MaskedObjective):
    """Prediction of the teacher's mean token by the pooled encoder, see the module's header.

    Args:
        block: encoder block of the teacher; negative counts from the end.
        beta: where smooth L1 turns from square to linear, > 0.
        supervise: whose tokens are averaged: 'all' positions, so that the student infers what it does not see, or the
            'visible' ones, so that it recognises what it sees. The same where nothing is hidden.

    Term: ``pooled``.
    """

    def __init__(self, block: int = -1, beta: float = 2.0, supervise: str = "all") -> None:
        super().__init__()
        if beta <= 0:
            raise InvalidValueError("beta-not-positive", f"beta must be above 0, got {beta}")
        self.supervise = check_supervise(supervise, ("all", "visible"))
        self.beta = beta
        self.head: nn.Linear | None = None
        self._block = block

    @property
    def needs(self) -> TeacherNeeds:
        """One block of the whole image. Before :meth:`prepare`, a negative index stands as it was given."""
        return TeacherNeeds(blocks=(self._block,))

    def decoder_strides(self, student: DecodingStudent) -> tuple[int, ...]:
        """None: it reads the encoder's last level."""
        return ()

    def _build(self, setup: Setup) -> None:
        """Resolve the block and build the head.

        Raises:
            ValueError: no teacher, a block out of range, or with 'visible' a grid that does not fit the mask's.
        """
        teacher_info, teacher_grid = require_teacher(self, setup.teacher_info, setup.teacher_grid)
        if self.supervise == "visible":
            visible_on(torch.ones(1, *setup.mask_grid, dtype=torch.bool), teacher_grid)  # refuses here, before training
        self._block = resolve_block(self._block, teacher_info.depth, "block")
        self.head = nn.Linear(setup.student.feature_channels[-1], teacher_info.width)

    def loss_terms(
        self, student_out: StudentOutput, teacher_out: TeacherOutput | None, layout: CellLayout
    ) -> dict[str, LossTerm]:
        """The term that the class describes; an image is one position."""
        assert teacher_out is not None
        self.require_prepared()
        assert self.head is not None
        pooled: Tensor = student_out.features[-1].mean(dim=(2, 3))
        prediction = self.head(pooled)[:, :, None, None]
        tokens = block_tokens(teacher_out, self._block)
        shown = visible_on(layout.visible, (tokens.shape[2], tokens.shape[3])) if self.supervise == "visible" else None
        target = standardised_mean(tokens, shown, teacher_out.views)[:, :, None, None]
        positions = torch.ones(len(target), 1, 1, dtype=torch.bool, device=target.device)
        smooth_l1 = partial(smooth_l1_by_position, beta=self.beta)
        return {"pooled": LossTerm(prediction, target, positions, len(target), smooth_l1)}
