"""MGD: the student's feature map, randomly masked, must generate the teacher's whole one.

Paper: "Masked Generative Distillation", arXiv 2205.01529; released code yzd-v/MGD, read for facts only. With A a 1x1
convolution (only where the channels differ), M a random mask, drawn anew on every forward, and G the generator (3x3
convolution, ReLU, 3x3 convolution):

    L = alpha * sum over images, channels and places of ( G( M * A(S) ) - T )^2 / N

Classification masks channels (ratio 0.15, alpha 7e-5), detection places (0.65, 2e-5), segmentation places (0.75, 2e-5). Nothing
is rescaled by 1 / (1 - ratio). The mean-reduced form, mean of the squares times alpha, needs no tuning to the size of the map.

:class:`MGDLoss` is a loss between any two maps; :class:`MGD` makes it an objective of masked distillation.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hgkd.objectives.alignment import (
    DecodingStudent,
    block_tokens,
    encoder_map,
    fit_grid,
    places_count,
    require_teacher,
    resolve_block,
    resolve_level,
)
from hgkd.objectives.comparison import ComparingObjective, Comparison
from hgkd.objectives.hgkd import layer_norm0
from hgkd.objectives.places import check_supervise, supervised_cells, supervised_places, visible_on
from hgkd.registry import MODELS
from hgkd.structures import StudentOutput, TeacherInfo, TeacherNeeds, TeacherOutput

if TYPE_CHECKING:
    from hgkd.sparse import CellLayout

MASKS = ("channel", "place")
REDUCTIONS = ("sum", "mean")


def draw_visible(feature: Tensor, mask: str, ratio: float, generator: torch.Generator | None = None) -> Tensor:
    """What stays of a map (N, C, H, W), True = visible: bool (N, C, 1, 1) for 'channel', (N, 1, H, W) for 'place'.

    Each entry is hidden with probability ``ratio``, independently.
    """
    count, channels, height, width = feature.shape
    shape = (count, channels, 1, 1) if mask == "channel" else (count, 1, height, width)
    return torch.rand(shape, device=feature.device, generator=generator) >= ratio


def error_by_place(restored: Tensor, teacher: Tensor, reduction: str) -> Tensor:
    """Squared error, fp32, summed or averaged over channels: two maps (N, C, H, W) -> (N, H, W).

    Raises:
        ValueError: the shapes differ (they would broadcast silently).
    """
    if restored.shape != teacher.shape:
        raise ValueError(f"restored {tuple(restored.shape)} and teacher's {tuple(teacher.shape)} feature map differ in shape")
    squares = (restored.float() - teacher.float()).square()
    return squares.sum(dim=1) if reduction == "sum" else squares.mean(dim=1)


class MGDLoss(nn.Module):
    """MGD between two feature maps.

    Args:
        student_channels, teacher_channels: of the two maps.
        mask: 'channel' (classification) or 'place' (detection, segmentation).
        ratio: share of hidden channels or places, in [0, 1).
        alpha: weight of the loss.
        reduction: 'sum' over an image, as published, or 'mean'.

    Raises:
        ValueError: an unknown mask or reduction, or a ratio out of range.
    """

    def __init__(
        self,
        student_channels: int,
        teacher_channels: int,
        mask: str = "channel",
        ratio: float = 0.15,
        alpha: float = 7e-5,
        reduction: str = "sum",
    ) -> None:
        super().__init__()
        if mask not in MASKS:
            raise ValueError(f"mask must be one of {', '.join(map(repr, MASKS))}, got {mask!r}")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {reduction!r}")
        if not 0.0 <= ratio < 1.0:
            raise ValueError(f"ratio is the share that is hidden and must be in [0, 1), got {ratio}")
        if reduction == "mean" and alpha < 1e-2:
            raise ValueError(f"alpha {alpha} is for reduction='sum'; with 'mean', which is near 1, use 1.0")
        self.mask = mask
        self.ratio = ratio
        self.alpha = alpha
        self.reduction = reduction
        differ = student_channels != teacher_channels
        self.align = nn.Conv2d(student_channels, teacher_channels, 1) if differ else nn.Identity()
        self.generation = nn.Sequential(
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(teacher_channels, teacher_channels, 3, padding=1),
        )

    def restore(self, student: Tensor) -> Tensor:
        """The teacher's map as generated from the masked student's: (N, C, H, W) -> (N, C', H, W)."""
        aligned = self.align(student)
        restored: Tensor = self.generation(aligned * draw_visible(aligned, self.mask, self.ratio))
        return restored

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss, an fp32 scalar; no gradient reaches the teacher.

        Args:
            student: (N, C, H, W).
            teacher: (N, C', H, W).
        """
        values = error_by_place(self.restore(student), teacher.detach(), self.reduction)
        return self.alpha * values.sum() / (len(values) if self.reduction == "sum" else values.numel())

    def extra_repr(self) -> str:
        return f"mask={self.mask!r}, ratio={self.ratio}, alpha={self.alpha}, reduction={self.reduction!r}"


@MODELS.register_module()
class MGD(ComparingObjective):
    """MGD as an objective of masked distillation: a block of the teacher from a map of the student.

    Args:
        feature: the student's map: 'decoded', or the index of an encoder level (of a ViT: a block), which is zero at hidden
            cells before anything more is masked; None is the coarsest level that fits the teacher's grid.
        block: encoder block of the teacher, which sees the whole image; negative counts from the end.
        supervise: 'masked', 'visible' or 'all' places.
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
        mask: str = "place",
        ratio: float = 0.65,
        alpha: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        if isinstance(feature, str) and feature != "decoded":
            raise ValueError(f"feature must be 'decoded', the index of an encoder level, or None, got {feature!r}")
        self.supervise = check_supervise(supervise)
        self.normalise = normalise
        self._build = partial(MGDLoss, mask=mask, ratio=ratio, alpha=alpha, reduction=reduction)
        self._build(1, 1)  # refuses what is wrong here, before training
        self._feature = feature
        self._block = block
        self._grid = (0, 0)
        self.loss: MGDLoss | None = None

    terms = ("generation",)

    @property
    def needs(self) -> TeacherNeeds:
        """What the teacher must compute."""
        return TeacherNeeds(blocks=(self._block,))

    def prepare(
        self,
        student: DecodingStudent,
        teacher_info: TeacherInfo | None,
        teacher_grid: tuple[int, int] | None,
        mask_grid: tuple[int, int],
    ) -> None:
        """Resolve block and level and build the generator; called once, before the optimiser is made.

        Raises:
            ValueError: no teacher, or a block or level that is not there or does not fit.
        """
        teacher_info, self._grid = require_teacher(self, teacher_info, teacher_grid)
        self._block = resolve_block(self._block, teacher_info.depth, "block")
        channels = student.decoded_channels
        if not isinstance(self._feature, str):
            self._feature = resolve_level(self._feature, student, self._grid, mask_grid)
            channels = student.feature_channels[self._feature]
        self.loss = self._build(channels, teacher_info.width)

    def predict(self, student_out: StudentOutput, term: str | None = None) -> Tensor:
        """The generated map (B, D, gh, gw), from a fresh mask."""
        if self.loss is None:
            raise RuntimeError("MGD.prepare() must be called before the objective is used")
        if isinstance(self._feature, int):
            return self.loss.restore(encoder_map(student_out, self._feature, self._grid))
        return self.loss.restore(fit_grid(student_out.decoded, self._grid))

    def target_map(self, teacher_out: TeacherOutput, term: str | None = None) -> Tensor:
        """What is to be generated, fp32 (B, D, gh, gw)."""
        tokens = block_tokens(teacher_out, self._block)
        return layer_norm0(tokens) if self.normalise else tokens.float()

    def comparisons(
        self, student_out: StudentOutput, teacher_out: TeacherOutput | None, layout: CellLayout
    ) -> dict[str, Comparison]:
        """See the class; raises ValueError when not one place is supervised."""
        prediction = self.predict(student_out)
        assert teacher_out is not None
        assert self.loss is not None
        count = places_count(layout, supervised_cells(layout, self.supervise), self._grid)
        places = supervised_places(visible_on(layout.visible, self._grid), self.supervise)
        summed = self.loss.reduction == "sum"
        distance = partial(error_by_place, reduction=self.loss.reduction)
        return {
            "generation": Comparison(
                prediction, self.target_map(teacher_out), places, layout.batch if summed else count, distance, self.loss.alpha
            )
        }

    def extra_repr(self) -> str:
        return f"feature={self._feature!r}, block={self._block}, supervise={self.supervise!r}, normalise={self.normalise}"
