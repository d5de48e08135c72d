"""DMAE: at visible positions, a middle layer of the student looks like a middle block of the teacher.

Paper: "Masked Autoencoders Enable Efficient Knowledge Distillers", arXiv 2208.12256; released code UCSC-VLAA/DMAE, read for
facts only. For every tap (student layer s, teacher block t), with P a projector and n the L2 normalisation over channels:

    L = mean over visible positions and channels of | n( P(student_s) ) - n( teacher_t ) |       (or the square of it)

The pixel loss that the paper adds is a second objective, :class:`hgkd.objectives.masked.pixels.PixelReconstruction`. Teacher
and student see the same visible patches, and the teacher runs only up to its deepest tap.

What differs: the released code runs the whole teacher, here the paper's abstract is followed; the released code compares the
class tokens as well (one of 50 tokens), which a CNN does not have. With a CNN student the layer is the encoder level whose grid
fits the teacher's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from hgkd.errors import InvalidValueError
from hgkd.objectives.alignment import (
    DecodingStudent,
    block_tokens,
    build_projector,
    encoder_map,
    positions_count,
    require_teacher,
    resolve_block,
    resolve_level,
)
from hgkd.objectives.loss_terms import LossTerm, MaskedObjective, Setup
from hgkd.objectives.positions import visible_on
from hgkd.registry import MASKED_OBJECTIVES
from hgkd.structures import StudentOutput, TeacherNeeds, TeacherOutput

if TYPE_CHECKING:
    from hgkd.sparse import CellLayout


def l1_of_directions(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over channels of the absolute difference of L2-normalised maps, fp32: two (B, D, h, w) -> (B, h, w)."""
    return (F.normalize(prediction.float(), dim=1) - F.normalize(target.float(), dim=1)).abs().mean(dim=1)


def l2_of_directions(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared distance of directions; see :func:`l1_of_directions`."""
    return (F.normalize(prediction.float(), dim=1) - F.normalize(target.float(), dim=1)).square().mean(dim=1)


DISTANCES = {"l1": l1_of_directions, "l2": l2_of_directions}


def _is_pair(tap: object) -> bool:
    """Whether it is (student layer or None, teacher block)."""
    if not isinstance(tap, Sequence) or len(tap) != 2:
        return False
    return (tap[0] is None or isinstance(tap[0], int)) and isinstance(tap[1], int)


@MASKED_OBJECTIVES.register_module()
class DMAE(MaskedObjective):
    """DMAE's feature alignment.

    Args:
        taps: pairs (student layer, teacher block), 0 = first, negative from the end. A student layer is a block of a ViT or a
            level of a CNN's encoder; None is the coarsest level that fits the teacher's grid (of a ViT: the last block).
            Published, ViT-L to ViT-B: ((8, 17),).
        projector: 'linear' (released script), 'mlp' or 'mlp2'; see :func:`hgkd.objectives.alignment.build_projector`.
        distance: 'l1' (released script) or 'l2'.

    Terms: ``align_<teacher block>`` for every tap.
    """

    def __init__(
        self, taps: Sequence[Sequence[int | None]] = ((None, -1),), projector: str = "linear", distance: str = "l1"
    ) -> None:
        super().__init__()
        if not taps or not all(map(_is_pair, taps)):
            raise InvalidValueError(
                "taps-not-pairs", f"taps must be pairs (student layer or None, teacher block), e.g. ((8, 17),), got {taps!r}"
            )
        if distance not in DISTANCES:
            raise InvalidValueError(
                "distance-unknown", f"distance must be one of {', '.join(map(repr, DISTANCES))}, got {distance!r}"
            )
        build_projector(projector, 1, 1)  # refuses an unknown kind here, before training
        self._taps: list[tuple[int | None, int]] = [(level, int(block or 0)) for level, block in taps]
        self._projector_kind = projector
        self._distance = DISTANCES[distance]
        self._grid: tuple[int, int] | None = None
        self.projectors = nn.ModuleDict()

    @property
    def needs(self) -> TeacherNeeds:
        """Outputs that the teacher must compute. Before :meth:`prepare`, negative indices stand as they were given."""
        return TeacherNeeds(blocks=tuple(block for _, block in self._taps), visible_only=True)

    def decoder_strides(self, student: DecodingStudent) -> tuple[int, ...]:
        """None: it reads the encoder's levels."""
        return ()

    def _build(self, setup: Setup) -> None:
        """Resolve the taps and build a projector each.

        Raises:
            ValueError: no teacher, a block or level that is not there or does not fit, or a teacher block tapped twice.
        """
        teacher_info, self._grid = require_teacher(self, setup.teacher_info, setup.teacher_grid)
        taps = []
        for level, block in self._taps:
            level = resolve_level(level, setup.student, self._grid, setup.mask_grid)
            taps.append((level, resolve_block(block, teacher_info.depth, "block")))
            channels = setup.student.feature_channels[level]
            self.projectors[str(taps[-1][1])] = build_projector(self._projector_kind, channels, teacher_info.width)
        if len(self.projectors) < len(taps):
            raise InvalidValueError("teacher-block-named-twice", f"taps name a teacher block twice: {taps}")
        self._taps = list(taps)

    def loss_terms(
        self, student_out: StudentOutput, teacher_out: TeacherOutput | None, layout: CellLayout
    ) -> dict[str, LossTerm]:
        """The terms that the class describes."""
        self.require_prepared()
        assert self._grid is not None
        assert teacher_out is not None
        positions = visible_on(layout.visible, self._grid)
        count = positions_count(layout, layout.num_cells, self._grid)
        found = {}
        for level, block in self._taps:
            assert level is not None
            prediction = self.projectors[str(block)](encoder_map(student_out, level, self._grid))
            found[f"align_{block}"] = LossTerm(prediction, block_tokens(teacher_out, block), positions, count, self._distance)
        return found

    def extra_repr(self) -> str:
        return f"taps={self._taps}, distance={self._distance.__name__}"
