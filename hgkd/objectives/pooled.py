"""The student's pooled feature infers the mean token of the whole image from the visible cells.

This project's own addition, no paper's: place-wise objectives train the decoder's output, while k-NN, probes and classifiers
read the mean of the encoder's last level. Here that mean, over the visible places, predicts by one linear map what the
teacher's tokens are on average over *all* places, hidden ones included:

    L = mean over channels of smooth_l1_beta( linear(mean over visible places of the last level) - whiten(m) )
    m = LN0( mean over all places of the teacher's tokens )

``whiten`` brings the channels of m to mean 0, deviation 1 and no correlation, by the statistics of all images so far. What all
images share is worth nothing in a feature, and without it the few directions of large variance that ViT tokens have would make
up the loss. Whitening of distillation targets: PHI-S (arXiv 2410.01680, section 3), there in another basis; the basis does
not matter where smooth L1 is square.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from mmengine.dist import all_reduce
from torch import Tensor, nn

from hgkd.objectives.alignment import DecodingStudent, block_tokens, require_teacher, resolve_block
from hgkd.objectives.comparison import ComparingObjective, Comparison
from hgkd.objectives.hgkd import layer_norm0, smooth_l1_by_place
from hgkd.registry import MODELS
from hgkd.structures import StudentOutput, TeacherInfo, TeacherNeeds, TeacherOutput

if TYPE_CHECKING:
    from hgkd.sparse import CellLayout


class RunningWhitening(nn.Module):
    """Whitens rows by the mean and covariance of all rows that it has seen in training mode.

    The correlation matrix is drawn towards the identity by ``max(floor, D / (D + rows seen))``: with few rows it only
    standardises each channel, with many it decorrelates, and directions without variance are not blown up.

    Args:
        width: channels D.
        floor: least share of the identity.

    The statistics are fp64 buffers; in a distributed run they cover all processes.
    """

    count: Tensor
    mean: Tensor
    moment: Tensor

    def __init__(self, width: int, floor: float = 0.01) -> None:
        super().__init__()
        self.floor = floor
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("moment", torch.zeros(width, width, dtype=torch.float64))

    @torch.no_grad()
    def forward(self, rows: Tensor) -> Tensor:
        """(N, D) -> whitened fp32 (N, D); in training mode the rows count first."""
        rows = rows.double()
        if self.training:
            self._add(rows)
        covariance = self.moment - self.mean.outer(self.mean)
        deviation = covariance.diagonal().clamp_min(1e-12).sqrt()
        share = (len(self.mean) / (len(self.mean) + self.count)).clamp_min(self.floor)
        correlation = (1.0 - share) * covariance / deviation.outer(deviation)
        correlation.diagonal().add_(share)
        root = torch.linalg.cholesky_ex(correlation).L  # of `_ex`, because the plain one makes a GPU wait
        standardised = (rows - self.mean) / deviation
        return torch.linalg.solve_triangular(root, standardised.t(), upper=False).t().float()

    def _add(self, rows: Tensor) -> None:
        sums = torch.full_like(self.count, len(rows)), rows.sum(0), rows.t() @ rows
        for value in sums:
            all_reduce(value)
        count, total, products = sums
        self.count += count
        self.mean += (total - count * self.mean) / self.count
        self.moment += (products - count * self.moment) / self.count


@MODELS.register_module()
class PooledFeature(ComparingObjective):
    """See the module's header.

    Args:
        block: encoder block of the teacher; negative counts from the end.
        beta: where smooth L1 turns from square to linear, > 0.

    Term: ``pooled``.
    """

    def __init__(self, block: int = -1, beta: float = 2.0) -> None:
        super().__init__()
        if beta <= 0:
            raise ValueError(f"beta must be above 0, got {beta}")
        self.beta = beta
        self.head: nn.Linear | None = None
        self.whitening: RunningWhitening | None = None
        self._block = block

    @property
    def needs(self) -> TeacherNeeds:
        """One block of the whole image. Before :meth:`prepare`, a negative index stands as it was given."""
        return TeacherNeeds(blocks=(self._block,))

    def prepare(
        self,
        student: DecodingStudent,
        teacher_info: TeacherInfo | None,
        teacher_grid: tuple[int, int] | None,
        mask_grid: tuple[int, int],
    ) -> None:
        """Resolve the block and build the head; called once, before the optimiser is made.

        Raises:
            ValueError: no teacher, or a block out of range.
        """
        teacher_info, _ = require_teacher(self, teacher_info, teacher_grid)
        self._block = resolve_block(self._block, teacher_info.depth, "block")
        self.head = nn.Linear(student.feature_channels[-1], teacher_info.width)
        self.whitening = RunningWhitening(teacher_info.width)

    def comparisons(
        self, student_out: StudentOutput, teacher_out: TeacherOutput | None, layout: CellLayout
    ) -> dict[str, Comparison]:
        """See the class; an image is one place."""
        assert teacher_out is not None
        if self.head is None or self.whitening is None:
            raise RuntimeError("PooledFeature.prepare() must be called before the objective is used")
        pooled: Tensor = student_out.features[-1].mean(dim=(2, 3))
        prediction = self.head(pooled)[:, :, None, None]
        mean = block_tokens(teacher_out, self._block).float().mean(dim=(2, 3), keepdim=True)
        target = self.whitening(layer_norm0(mean).flatten(1))[:, :, None, None]
        places = torch.ones(len(target), 1, 1, dtype=torch.bool, device=target.device)
        smooth_l1 = partial(smooth_l1_by_place, beta=self.beta)
        return {"pooled": Comparison(prediction, target, places, len(target), smooth_l1)}
