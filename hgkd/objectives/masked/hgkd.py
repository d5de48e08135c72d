"""H-GKD: the student generates, at hidden and visible positions, the representation that the teacher infers.

Paper: "Heterogeneous Generative Knowledge Distillation with Masked Image Modeling", arXiv 2309.09571. Its abstract
fixes only a part (sparse UNet student, masked input, mimicry of the representation that the teacher infers); no code
is public. The loss is therefore this project's own definition, in the form that G2SD (arXiv 2302.14771) uses between
two ViTs:

    L = mean over positions p in P and channels c of smooth_l1_beta( prediction[p, c] - LN0(teacher)[p, c] ),   beta = 2

with LN0 = layer normalisation over channels without affine parameters (eps 1e-6, fp32), and P the masked, visible or
all positions of the teacher's grid.

* ``target='full'``: the teacher sees the whole image; the target is the output of encoder block ``block`` everywhere.
* ``target='inferred'``: the teacher sees the visible cells only; visible positions take encoder block ``block``, masked
  ones the hidden state after decoder block ``decoder_block`` (no decoder norm). Widths differ, so each has its own
  projector.

Options of this project: several teacher blocks to several scales of the decoder, and a cosine term
mean over P of 1 - cos( prediction[p], LN0(teacher)[p] ).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hgkd.errors import InvalidValueError
from hgkd.objectives.alignment import (
    DecodingStudent,
    block_tokens,
    build_projector,
    decoder_channels,
    decoder_map,
    decoder_state,
    fit_grid,
    positions_count,
    require_teacher,
    resolve_block,
)
from hgkd.objectives.distances import layer_norm0, smooth_l1_by_position
from hgkd.objectives.loss_terms import Distance, LossTerm, MaskedObjective, Setup
from hgkd.objectives.positions import check_supervise, supervised_cells, supervised_positions, visible_on
from hgkd.registry import MASKED_OBJECTIVES
from hgkd.structures import StudentOutput, TeacherNeeds, TeacherOutput

if TYPE_CHECKING:
    from hgkd.sparse import CellLayout

TARGETS = ("full", "inferred")


def cosine_by_position(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - cosine over channels, in fp32: two maps (B, D, h, w) -> (B, h, w)."""
    return 1.0 - F.cosine_similarity(prediction.float(), target.float(), dim=1)


def weighted(distance: Distance, weights: Tensor) -> Distance:
    """The distance times a weight for each position, (B, gh, gw)."""
    return lambda prediction, target: distance(prediction, target) * weights


def centred_target(normalised: Tensor, views: int = 1) -> Tensor:
    """Tokens without their mean over the batch, which all images share, and of std 1 in each channel.

    Tokens of small or briefly trained ViTs differ from position to position far more than from image to image, and a student
    scores by learning the positions alone. So each position's mean over the batch is subtracted, and each channel divided by
    its std over batch and positions.

    Args:
        normalised: (B, D, gh, gw) after :func:`layer_norm0`, of more than one image.
        views: how many times each image stands in it.

    Raises:
        ValueError: a batch of one image, whose target would be 0.
    """
    if len(normalised) < 2 * views:
        raise InvalidValueError(
            "batch-of-one", "centre=True compares the images of a batch; use a batch size above 1 or centre=False"
        )
    centred = normalised - normalised.mean(0, keepdim=True)
    return centred / (centred.square().mean((0, 2, 3), keepdim=True) + 1e-6).sqrt()


@MASKED_OBJECTIVES.register_module()
class HGKD(MaskedObjective):
    """H-GKD's objective.

    Args:
        target: 'full' (any teacher) or 'inferred' (an MAE teacher with decoder; see the module's header).
        block: encoder block whose output is the target; negative counts from the end, -1 is the last. With 'full' it may be
            a sequence: several blocks, one term each.
        stride: scale of the student's decoder that predicts, in image pixels per position; None is its finest. As many as
            ``block``, or one for all.
        decoder_block: only with 'inferred': decoder block whose hidden state is the target at masked positions.
            None is the last.
        supervise: 'masked', 'visible' or 'all' positions.
        visible_weight: with ``supervise='all'``, how much a visible position counts against a hidden one.
        beta: where smooth L1 turns from square to linear, > 0.
        cosine: weight of the cosine terms, 0 leaves them out.
        projector: 'linear' (1x1 convolution), 'mlp' or 'mlp2'; see :func:`hgkd.objectives.alignment.build_projector`.
        centre: learn only what differs between images, see :func:`centred_target`; with target='full'.

    Terms: ``distill`` with 'full', ``distill_<block>`` each when there are several blocks; ``visible`` and ``masked`` with
    'inferred' (a term that ``supervise`` excludes is absent, and so is its projector). Their sum is the mean over all
    supervised positions and blocks. With ``cosine`` each has a twin ``<term>_cosine``.
    """

    def __init__(
        self,
        target: str = "full",
        block: int | Sequence[int] = -1,
        stride: int | Sequence[int] | None = None,
        decoder_block: int | None = None,
        supervise: str = "masked",
        beta: float = 2.0,
        cosine: float = 0.0,
        projector: str = "linear",
        centre: bool = False,
        visible_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if target not in TARGETS:
            raise InvalidValueError(
                "hgkd-target-unknown", f"target must be one of {', '.join(map(repr, TARGETS))}, got {target!r}"
            )
        if centre and target != "full":
            raise InvalidValueError(
                "centre-needs-full-target",
                f"centre=True needs target='full', where every image has a token at every position, got {target!r}",
            )
        if target == "full" and decoder_block is not None:
            raise InvalidValueError(
                "decoder-block-without-use",
                f"decoder_block={decoder_block} has no use with target='full', which reads encoder tokens only; "
                "leave it out or use target='inferred'",
            )
        if beta <= 0:
            raise InvalidValueError("beta-not-positive", f"beta must be above 0, got {beta}; G2SD and H-GKD use 2.0")
        if cosine < 0:
            raise InvalidValueError(
                "cosine-weight-negative", f"cosine is the weight of a loss and must not be negative, got {cosine}"
            )
        if not visible_weight > 0.0 or (visible_weight != 1.0 and (supervise != "all" or target != "full")):
            raise InvalidValueError(
                "visible-weight",
                f"visible_weight={visible_weight} must be above 0, and other than 1 only with supervise='all' and "
                f"target='full', got {supervise!r} and {target!r}; supervise='masked' leaves visible positions out",
            )
        build_projector(projector, 1, 1)  # refuses an unknown kind here, before training
        self.target = target
        self.supervise = check_supervise(supervise)
        self.beta = beta
        self.cosine = cosine
        self.centre = centre
        self.visible_weight = visible_weight
        self.projectors = nn.ModuleDict()
        self._projector_kind = projector
        # anything else than a list of them is looked at where the teacher's blocks and the decoder's strides are known
        self._blocks = list(block) if isinstance(block, Sequence) else [block]
        self._strides = list(stride) if isinstance(stride, Sequence) else [stride] * len(self._blocks)
        if not self._blocks or len(self._blocks) != len(self._strides):
            raise InvalidValueError(
                "blocks-and-strides-differ",
                f"block {block!r} and stride {stride!r} must pair up: one stride a block, or one for all",
            )
        if target != "full" and len(self._blocks) > 1:
            raise InvalidValueError(
                "blocks-need-full-target", f"several blocks need target='full', got block={block!r} with target={target!r}"
            )
        self._decoder_block = -1 if decoder_block is None else decoder_block
        self._grid: tuple[int, int] | None = None

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the smooth L1 terms, which are the keys of ``projectors`` too."""
        if self.target == "full":
            return ("distill",) if len(self._blocks) == 1 else tuple(f"distill_{block}" for block in self._blocks)
        return ("visible", "masked") if self.supervise == "all" else (self.supervise,)

    @property
    def needs(self) -> TeacherNeeds:
        """Outputs that the teacher must compute. Before :meth:`prepare`, negative indices stand as they were given."""
        return TeacherNeeds(
            blocks=() if self.terms == ("masked",) else tuple(self._blocks),
            decoder_block=self._decoder_block if "masked" in self.terms else None,
            visible_only=self.target == "inferred",
        )

    def decoder_strides(self, student: DecodingStudent) -> tuple[int, ...]:
        """Those of the blocks."""
        return tuple(student.out_stride if stride is None else stride for stride in self._strides)

    def _build(self, setup: Setup) -> None:
        """Resolve the block indices and build the projectors.

        Raises:
            ValueError: no teacher, no decoder where one is needed, a block or stride that is not there, or grids that do
                not fit.
        """
        teacher_info, teacher_grid = require_teacher(self, setup.teacher_info, setup.teacher_grid)
        if teacher_grid[0] % setup.mask_grid[0] or teacher_grid[1] % setup.mask_grid[1]:
            raise InvalidValueError(
                "teacher-grid-no-multiple",
                f"the teacher's grid {teacher_grid} is no whole multiple of the mask grid {setup.mask_grid}; "
                "use the grid that teacher.prepare(mask_grid, cell) returns",
            )
        self._blocks = [resolve_block(block, teacher_info.depth, "block") for block in self._blocks]
        if len(set(self._blocks)) < len(self._blocks):
            raise InvalidValueError("teacher-block-named-twice", f"block names an encoder block twice: {self._blocks}")
        self._grid = teacher_grid
        widths = dict.fromkeys(self.terms, teacher_info.width)
        if "masked" in self.terms:
            if teacher_info.decoder_width is None or teacher_info.decoder_depth < 1:
                raise InvalidValueError(
                    "teacher-without-decoder",
                    f"target='inferred' reads the teacher's decoder at masked positions, but this teacher "
                    f"({teacher_info.kind}) has none; load an MAE checkpoint with its decoder, or use target='full'",
                )
            self._decoder_block = resolve_block(self._decoder_block, teacher_info.decoder_depth, "decoder_block")
            widths["masked"] = teacher_info.decoder_width
        for term, width in widths.items():
            channels = decoder_channels(setup.student, self._strides[self._level(term)])
            self.projectors[term] = build_projector(self._projector_kind, channels, width)

    def predict(self, student_out: StudentOutput, term: str | None = None) -> Tensor:
        """The student's prediction of the normalised target, (B, D, gh, gw), at all positions.

        Args:
            term: which projector; None is the first of ``terms``.
        """
        term = self._term(term)
        fitted = fit_grid(decoder_map(student_out, self._strides[self._level(term)]), self._prepared_grid)
        prediction: Tensor = self.projectors[term](fitted)
        return prediction

    def target_map(self, teacher_out: TeacherOutput, term: str | None = None) -> Tensor:
        """The normalised target, fp32 (B, D, gh, gw); meaningful at the positions that ``term`` supervises."""
        term = self._term(term)
        if term == "masked":
            return layer_norm0(decoder_state(teacher_out))
        normalised = layer_norm0(block_tokens(teacher_out, self._blocks[self._level(term)]))
        return centred_target(normalised, teacher_out.views) if self.centre else normalised

    def loss_terms(
        self, student_out: StudentOutput, teacher_out: TeacherOutput | None, layout: CellLayout
    ) -> dict[str, LossTerm]:
        """The terms that the class describes; raises ValueError when not one position is supervised."""
        assert teacher_out is not None
        cells = supervised_cells(layout, self.supervise)
        visible = visible_on(layout.visible, self._prepared_grid)
        count: float = positions_count(layout, cells, self._prepared_grid) * len(self._blocks)
        smooth_l1: Distance = partial(smooth_l1_by_position, beta=self.beta)
        cosine: Distance = cosine_by_position
        if self.visible_weight != 1.0:  # a weighted mean: the weights stand in its divisor too
            lost = (1.0 - self.visible_weight) * layout.num_cells / cells
            count = count * (1.0 - lost)
            weights = torch.where(visible, self.visible_weight, 1.0)
            smooth_l1, cosine = weighted(smooth_l1, weights), weighted(cosine, weights)
        found = {}
        for term in self.terms:
            # 'visible' and 'masked' terms are their own positions; the terms of 'full' cover what `supervise` says
            positions = supervised_positions(visible, self.supervise if self.target == "full" else term)
            prediction, target = self.predict(student_out, term), self.target_map(teacher_out, term)
            found[term] = LossTerm(prediction, target, positions, count, smooth_l1)
            if self.cosine:
                found[f"{term}_cosine"] = LossTerm(prediction, target, positions, count, cosine, self.cosine)
        return found

    @property
    def _prepared_grid(self) -> tuple[int, int]:
        self.require_prepared()
        assert self._grid is not None
        return self._grid

    def _level(self, term: str) -> int:
        """Which of the blocks and strides a term uses."""
        return self.terms.index(term) if self.target == "full" else 0

    def _term(self, term: str | None) -> str:
        if term is None:
            return self.terms[0]
        if term not in self.terms:
            raise InvalidValueError("term-unknown", f"this objective has the terms {', '.join(self.terms)}, not {term!r}")
        return term

    def extra_repr(self) -> str:
        return f"target={self.target!r}, block={self._blocks}, supervise={self.supervise!r}, beta={self.beta}"
