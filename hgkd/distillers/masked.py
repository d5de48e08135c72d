"""Masked distillation: a student that sees part of an image learns what the objectives ask of it.

One model for H-GKD and its controls: with a teacher and ``HGKD`` it is H-GKD (arXiv 2309.09571), with ``PixelReconstruction``
and no teacher SparK's pretraining (arXiv 2301.03580), with ``mask_ratio=0`` ordinary feature distillation.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModel
from mmengine.registry import Registry
from torch import Tensor, nn

from hgkd.data.transforms import as_size
from hgkd.distillers.graphs import StepGraphs, taken_apart
from hgkd.errors import InvalidValueError, unknown_name_message
from hgkd.masking import CountedMask, MaskGenerator, Randomness
from hgkd.networks.guest import TeacherOwner
from hgkd.objectives.base import Objective
from hgkd.objectives.loss_terms import LossTerm, MaskedObjective, Setup
from hgkd.pixels import check_images, pixels_text, to_unit_range
from hgkd.registry import MASKED_OBJECTIVES, MODELS, unknown_objective_message
from hgkd.structures import FeatureSample, StudentOutput, TeacherInfo, TeacherNeeds, TeacherOutput
from hgkd.students.base import Student, check_decode
from hgkd.teachers.base import Teacher
from hgkd.teachers.cache import FeatureCache, store_bytes
from hgkd.weights.run_file import FORMAT


def merge_needs(needs: Sequence[TeacherNeeds]) -> tuple[list[TeacherNeeds], list[int]]:
    """The fewest teacher passes that serve all needs.

    Needs that agree on ``visible_only`` share a pass, which gives the blocks of all of them; two different decoder blocks do
    not share one.

    Returns:
        The passes, and for each of ``needs`` the index of its pass.
    """
    passes: list[TeacherNeeds] = []
    owner: list[int] = []
    for need in needs:
        for i, have in enumerate(passes):
            decoders = {have.decoder_block, need.decoder_block} - {None}
            if have.visible_only == need.visible_only and len(decoders) <= 1:
                blocks = tuple(sorted({*have.blocks, *need.blocks}))
                passes[i] = replace(have, blocks=blocks, decoder_block=next(iter(decoders), None))
                owner.append(i)
                break
        else:
            passes.append(need)
            owner.append(len(passes) - 1)
    return passes, owner


@MODELS.register_module()
class MaskedDistiller(TeacherOwner[Teacher | None], BaseModel):
    """Wires student, teacher, mask and objectives together.

    A teacher is no submodule; see :class:`hgkd.networks.guest.TeacherOwner`.

    Args:
        student: config of a student, e.g. ``dict(type='SparseUNet', encoder='resnet18')``.
        objectives: name -> config of an objective. Names prefix the logged losses; an extra key ``weight`` (default 1.0)
            multiplies all terms of that objective, an extra key ``teacher`` names the one of ``teachers`` that it learns from.
        mask: config of a generator of visible cells.
        image_size: side in pixels of the training images, or (H, W); a multiple of the student's cell.
        teacher: config of a teacher; None when no objective needs one.
        teachers: name -> config of a teacher, in place of ``teacher``.
        teacher_channels: which of the images' channels a teacher sees, in its own order, e.g. (2, 1, 0) for red, green and blue
            of images that begin with blue; a single one is repeated. A dict gives them by the teacher's name. None: all, where
            there are as many as it takes; of one channel the same repeated.
        mask_teacher: the one of ``teachers`` whose attention guides the mask.
        flip: probability of mirroring a training image left to right here, rather than in the data's transform, so that
            stored teacher features (see :meth:`store_features`) can tell a picture from its mirror image.
        masks_per_image: number of masks drawn for each training image, different cells where the generator can; the student
            sees each, and the teacher sees the image once where the objectives ask for whole images. A step then costs one
            teacher pass and ``masks_per_image`` student passes.
        whole_view: the student sees each training image whole as well.
        decode: what the student's decoder computes: 'all' places, or the 'visible' rectangle alone, as if it were the image, so
            that the decoder too costs the visible part only. For :class:`hgkd.masking.RectangleMask` and objectives that learn
            what is visible (``supervise='visible'``).
        cuda_graph: record what follows mask and teachers as a CUDA graph; True, False or 'auto': on a GPU, where every image
            shows a fixed number of cells and one process trains, once a graph's losses and gradients agree with the eager ones.
        data_preprocessor: see mmengine's ``BaseModel``; the default only moves data to the device, without waiting for it.

    Attributes:
        teachers: all teachers by name; a single one is called 'teacher', and is also the attribute ``teacher``.
        teacher_seconds: wall time that the teachers (or the reading of their stored features) have taken so far; on a GPU
            that of launching them.

    Raises:
        ValueError: anything that does not fit together, before the first step.
    """

    objective_registry = MASKED_OBJECTIVES

    def __init__(
        self,
        student: Mapping[str, Any],
        objectives: Mapping[str, Mapping[str, Any]],
        mask: Mapping[str, Any],
        image_size: int | Sequence[int],
        teacher: Mapping[str, Any] | None = None,
        flip: float = 0.0,
        masks_per_image: int = 1,
        whole_view: bool = False,
        data_preprocessor: Mapping[str, Any] | None = None,
        teachers: Mapping[str, Mapping[str, Any]] | None = None,
        teacher_channels: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
        mask_teacher: str | None = None,
        decode: str = "all",
        cuda_graph: bool | str = "auto",
    ) -> None:
        # copies from the loader's pinned memory go on while the host prepares the step
        preprocessor = (
            {"type": "BaseDataPreprocessor", "non_blocking": True} if data_preprocessor is None else data_preprocessor
        )
        super().__init__(data_preprocessor=dict(preprocessor))
        if not 0.0 <= flip <= 1.0:
            raise InvalidValueError("flip-out-of-range", f"flip must be a probability in [0, 1], got {flip}")
        if isinstance(masks_per_image, bool) or not isinstance(masks_per_image, int) or masks_per_image < 1:
            raise InvalidValueError(
                "masks-per-image", f"masks_per_image is the number of masks of an image, 1 or more, got {masks_per_image!r}"
            )
        self._graphs = StepGraphs(cuda_graph)
        self.flip = flip
        self.masks_per_image = masks_per_image
        self.whole_view = whole_view
        self.decode = check_decode(decode)
        self.feature_caches: dict[str, FeatureCache] = {}
        self.teacher_seconds = 0.0
        self.image_size = as_size(image_size)
        self.student: Student = _build_part(student, Student, "model.student", "hgkd.students.Student")
        self.mask: MaskGenerator = _build(mask)
        if not objectives:
            raise InvalidValueError(
                "objectives-empty", "objectives is empty; give at least one, e.g. dict(hgkd=dict(type='HGKD'))"
            )
        named = {name: cfg["teacher"] for name, cfg in objectives.items() if cfg.get("teacher") is not None}
        unnamed = {name: {key: value for key, value in cfg.items() if key != "teacher"} for name, cfg in objectives.items()}
        self.objectives, self.weights = build_objectives(unnamed, MASKED_OBJECTIVES, MaskedObjective)
        self.teachers: dict[str, Teacher] = _build_teachers(teacher, teachers)
        self.keep_teacher(self.teachers["teacher"] if teacher is not None else None)
        self._channels = _teacher_channels(self.teachers, teacher_channels, self.student.in_chans)
        self._prepare(named, mask_teacher)

    def _prepare(self, named: Mapping[str, str], mask_teacher: str | None) -> None:
        """Find all grids and let every part check that it fits the others.

        Args:
            named: objective -> name of the teacher, where its config gives one.
            mask_teacher: see the class.
        """
        self.mask_grid: tuple[int, int] = self.student.prepare(self.image_size)
        self.mask.check(self.mask_grid)
        self._check_views()
        self._check_hidden()
        self._check_counts()
        self._check_graph()
        grids: dict[str | None, tuple[int, int]] = {}
        for name, part in self.teachers.items():
            if len(self.teachers) > 1:
                print_log(f"teacher {name!r}:", "current")
            with _told_of(self._place_of(name)):
                part.require_trained()
                grids[name] = part.prepare(self.mask_grid, self.student.cell)
        asked: dict[str, dict[str, TeacherNeeds]] = {name: {} for name in self.teachers}
        parts: dict[str, Any] = dict(self.objectives.items())
        for name, objective in parts.items():
            chosen = self._teacher_of(name, objective, named.get(name))
            teacher: Any = self.teachers.get(chosen) if chosen is not None else None
            if objective.needs is not None and objective.needs.decoder_block is not None:
                with _told_of(self._place_of(chosen)):
                    teacher.require_decoder()  # before the objective, whose message could not name the file
            info: TeacherInfo | None = None if teacher is None else teacher.info
            objective.prepare(Setup(self.student, info, grids.get(chosen), self.mask_grid))
            if objective.needs is not None and chosen is not None:  # after prepare, which resolves negative block indices
                with _told_of(self._place_of(chosen)):
                    teacher.check(objective.needs)
                asked[chosen][name] = objective.needs
        self._guide = self._guide_of_masks(mask_teacher)
        idle = [name for name, needs in asked.items() if not needs and name != self._guide]
        if idle:
            raise InvalidValueError(
                "teacher-without-objective",
                f"{self._place_of(idle[0])} is set, but no objective learns from it; remove it or add such an objective",
            )
        self._passes: dict[str, list[TeacherNeeds]] = {}  # of each teacher
        self._pass_of: dict[str, tuple[str, int]] = {}  # objective -> teacher, and which of its passes
        for teacher_name, needs in asked.items():
            self._passes[teacher_name], owner = merge_needs(list(needs.values()))
            self._pass_of |= {name: (teacher_name, i) for name, i in zip(needs, owner, strict=True)}
        self._check_decode(grids)
        print_log(f"student: {self._seen()}", "current")

    def _place_of(self, teacher: str | None) -> str:
        """Where a teacher stands in the config."""
        return "model.teacher" if self.teacher is not None else f"model.teachers.{teacher}"

    def _teacher_of(self, name: str, objective: MaskedObjective, chosen: str | None) -> str | None:
        """Name of the teacher that an objective learns from; None where there is none to choose."""
        kind, place = type(objective).__name__, f"model.objectives.{name}.teacher"
        if objective.needs is None:
            if chosen is not None:
                raise InvalidValueError(
                    "teacher-not-needed", f"{place}={chosen!r}: a {kind} learns from no teacher; leave it out"
                )
            return next(iter(self.teachers), None) if len(self.teachers) == 1 else None
        if not self.teachers:
            raise InvalidValueError(
                "objective-without-teacher",
                f"objective {name!r} ({kind}) learns from a teacher, but the model has none; "
                "set model.teacher, or use an objective without one such as PixelReconstruction",
            )
        if chosen is not None and chosen not in self.teachers:
            raise InvalidValueError("teacher-unknown", f"{place}: {unknown_name_message('teacher', chosen, self.teachers)}")
        if chosen is None and len(self.teachers) > 1:
            raise InvalidValueError(
                "teacher-not-named",
                f"objective {name!r} ({kind}) learns from a teacher, and the model has several "
                f"({', '.join(self.teachers)}); "
                f"say which: {place}={next(iter(self.teachers))!r}",
            )
        return chosen or next(iter(self.teachers))

    def _guide_of_masks(self, chosen: str | None) -> str | None:
        """Name of the teacher whose attention guides the mask."""
        if not self.mask.guided:
            if chosen is not None:
                raise InvalidValueError(
                    "teacher-not-needed",
                    f"model.mask_teacher={chosen!r}: a {type(self.mask).__name__} is guided by no teacher; leave it out, "
                    "or use AttentionMask",
                )
            return None
        if chosen is not None and chosen not in self.teachers:
            raise InvalidValueError(
                "teacher-unknown", f"model.mask_teacher: {unknown_name_message('teacher', chosen, self.teachers)}"
            )
        if chosen is None and len(self.teachers) > 1:
            raise InvalidValueError(
                "teacher-not-named",
                f"{type(self.mask).__name__} is guided by a teacher's attention, and the model has several "
                f"({', '.join(self.teachers)}); say which: model.mask_teacher={next(iter(self.teachers))!r}",
            )
        guide = chosen or next(iter(self.teachers), None)
        teacher = None if guide is None else self.teachers[guide]
        if teacher is None or not teacher.gives_attention:
            raise InvalidValueError(
                "mask-without-attention",
                f"{type(self.mask).__name__} is guided by a teacher's attention, but the model has "
                f"{'none' if teacher is None else 'a ' + type(teacher).__name__}; use a ViT teacher, or RandomMask",
            )
        teacher.check_attention()
        return guide

    def _check_views(self) -> None:
        """Raise ValueError when an image would be shown several times alike, which costs more and teaches nothing."""
        if not isinstance(self.mask, CountedMask):
            return
        why = self.mask.why_masks_are_equal(self.mask_grid)
        if self.whole_view and self.mask.hides_nothing(self.mask_grid):
            asked, instead, why = "whole_view=True", "whole_view=False", "nothing is hidden"
        elif self.masks_per_image > 1 and why is not None:
            asked, instead = f"masks_per_image={self.masks_per_image}", "masks_per_image=1"
        else:
            return
        raise InvalidValueError(
            "views-equal",
            f"{asked} would show each image several times alike, because {why}; use {instead}, or a mask that hides other "
            "cells each time",
        )

    def _check_hidden(self) -> None:
        """Raise ValueError when an objective learns from hidden cells alone, and nothing may be hidden in some steps."""
        if not isinstance(self.mask, CountedMask) or not self.mask.shows_whole_images(self.mask_grid):
            return
        for name, objective in self.objectives.items():
            if getattr(objective, "supervise", None) == "masked":
                raise InvalidValueError(
                    "nothing-supervised",
                    f"the mask shows {self.mask.describe(self.mask_grid)}, so there are training steps in which nothing "
                    f"is hidden, or may be by chance; but objective {name!r} ({type(objective).__name__}) learns from hidden "
                    f"cells alone (supervise='masked'): set model.objectives.{name}.supervise='all', or hide something in "
                    "every step",
                )

    def _check_counts(self) -> None:
        """Raise ValueError when images show different numbers of cells, and the student needs as many of each."""
        if not self.student.equal_counts:
            return
        differ = isinstance(self.mask, CountedMask) and self.mask.counts_differ
        if differ or self.whole_view:
            asked = f"mask_ratio={getattr(self.mask, 'mask_ratio', None)}" if differ else "whole_view=True"
            raise InvalidValueError(
                "equal-counts-needed",
                f"{asked} shows different numbers of cells in the images of a batch, but a {type(self.student).__name__} "
                "takes as many of each; use one mask_ratio without a whole view, or a SparseUNet",
            )

    def _check_decode(self, teacher_grids: Mapping[str | None, tuple[int, int]]) -> None:
        """Raise ValueError when the visible rectangle is all that is decoded, and something needs more.

        Args:
            teacher_grids: of each teacher, by name.
        """
        obstacle = self._obstacle_to_decoding_the_visible(teacher_grids) if self.decode == "visible" else None
        if obstacle is not None:
            raise InvalidValueError("decode-visible-impossible", f"decode='visible': {obstacle}, or decode='all'")

    def _obstacle_to_decoding_the_visible(self, teacher_grids: Mapping[str | None, tuple[int, int]]) -> str | None:
        """Why hidden places must be decoded, and what would help; None: they need not."""
        if not self.student.decodes_rectangles:
            return f"a {type(self.student).__name__} decodes whole images; use a SparseUNet"
        if self.whole_view or not isinstance(self.mask, CountedMask) or not self.mask.shows_rectangles:
            shown = "whole_view=True" if self.whole_view else f"a {type(self.mask).__name__}"
            return (
                f"{shown} does not show one rectangle in each image, all of one size; use RectangleMask with one mask_ratio "
                "and without a whole view"
            )
        parts: dict[str, Any] = dict(self.objectives.items())
        for name, objective in parts.items():
            strides, supervise = objective.decoder_strides(self.student), getattr(objective, "supervise", None)
            if strides and supervise != "visible":
                return (
                    f"objective {name!r} ({type(objective).__name__}) reads the decoder at hidden places, too "
                    f"(supervise={supervise!r}); set model.objectives.{name}.supervise='visible'"
                )
            grid = teacher_grids[self._pass_of[name][0]] if name in self._pass_of else self.mask_grid
            per_cell = grid[0] // self.mask_grid[0]
            coarse = [stride for stride in strides if self.student.cell // stride % per_cell]
            if coarse:
                return (
                    f"objective {name!r} would interpolate the decoder's stride {coarse[0]} to the teacher's {per_cell} tokens "
                    "a cell side, across the border to what is hidden; use an out_stride with a multiple of "
                    f"{per_cell} positions in {self.student.cell} px"
                )
        return None

    def _check_graph(self) -> None:
        """Raise ValueError when a CUDA graph is asked for, and its shapes would change from step to step."""
        fixed = isinstance(self.mask, CountedMask) and not self.mask.counts_differ
        if self._graphs.choice is True and not (fixed and self.student.takes_count):
            asked = f"a {type(self.student).__name__}" if fixed else f"{type(self.mask).__name__}"
            raise InvalidValueError(
                "cuda-graph-impossible",
                f"cuda_graph=True needs a SparseUNet or a MaskedViT, and a mask that shows a fixed number of cells, "
                f"not {asked} with mask_ratio={getattr(self.mask, 'mask_ratio', None)}; use cuda_graph='auto', which trains "
                "without it",
            )

    def _seen(self) -> str:
        """What the student sees, for the log."""
        height, width = self.mask_grid
        text = f"mask grid {height} x {width}"
        if isinstance(self.mask, CountedMask):
            text += f", {self.mask.describe(self.mask_grid)}{self.views_text()}"
        return f"{text}; {pixels_text(self.student.mean, self.student.std)}"

    def views_text(self) -> str:
        """The views of an image that a step trains on, for logs; empty when it is one masked view."""
        text = f"; {self.masks_per_image} masks an image" if self.masks_per_image > 1 else ""
        return text + ("; and the whole image" if self.whole_view else "")

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskedDistiller:
        """A copy that shares the teachers and their stored features, which no training changes.

        mmengine's ``EMAHook`` copies the model for its average of the weights, and a second teacher would cost its memory. Only
        the student and the objectives are averaged; the copy's teacher follows whichever of the two was moved last.
        """
        for shared in (*self.teachers.values(), *self.feature_caches.values()):
            memo[id(shared)] = shared
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        made.__dict__ = copy.deepcopy(self.__dict__, memo)
        return made

    def init_weights(self) -> None:
        """Nothing: all weights are set when the parts are built, and pretrained ones must not be overwritten."""

    def forward(  # type: ignore[override]
        self, inputs: Tensor, mode: str = "tensor", **data: Tensor
    ) -> dict[str, Tensor] | list[FeatureSample] | Tensor:
        """Losses, features or samples of a batch.

        Args:
            inputs: uint8 (B, C, H, W), of three channels RGB, or float in [0, 1].
            mode: 'loss', 'predict' or 'tensor'.
            data: further entries of the batch; 'predict' reads ``label`` and ``index`` (B,), and ``split``.

        Returns:
            'loss': name of a loss -> fp32 scalar. 'predict': one ``FeatureSample`` an image, pooled over the whole image.
            'tensor': last-level features (B, C, h, w) of the whole image.
        """
        if mode == "loss":
            return self._losses(inputs, data.get("index"))
        images = to_unit_range(inputs)
        if mode == "predict":
            return feature_samples(self.student.pooled(images).float(), data)
        if mode == "tensor":
            return self.encode(images)
        raise InvalidValueError("mode-unknown", f"mode must be 'loss', 'predict' or 'tensor', got {mode!r}")

    def encode(self, images: Tensor) -> Tensor:
        """Last-level encoder features (B, D, h, w) of whole images (B, C, H, W) in [0, 1]: the dense network."""
        features: Tensor = self.student.dense_features(images)[-1]
        return features

    def _loss_terms(self, inputs: Tensor, index: Tensor | None) -> dict[str, tuple[float, LossTerm]]:
        """Name of a loss -> its weight and its term."""
        return self._terms_of(*self._see(inputs, index))

    def _terms_of(
        self, student_out: StudentOutput, teacher_outs: Mapping[str, TeacherOutput]
    ) -> dict[str, tuple[float, LossTerm]]:
        parts: dict[str, Any] = dict(self.objectives.items())
        return {
            f"{name}_{term}_loss": (self.weights[name], found)
            for name, objective in parts.items()
            for term, found in objective.loss_terms(student_out, teacher_outs.get(name), student_out.layout).items()
        }

    def term_report(self, inputs: Tensor, index: Tensor | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The losses of a batch, and what each would be, were the prediction everywhere the batch's mean target."""
        found = self._loss_terms(inputs, index)
        losses = {name: weight * term.loss() for name, (weight, term) in found.items()}
        return losses, {name: weight * term.loss_of_mean() for name, (weight, term) in found.items()}

    def _see(self, inputs: Tensor, index: Tensor | None) -> tuple[StudentOutput, dict[str, TeacherOutput]]:
        """Outputs of student and teacher for a batch; the teacher's by name of the objective."""
        images, visible, teacher_outs = self._show(inputs, index)
        return self._student_sees(images, visible, self._known(len(images), len(visible))), teacher_outs

    def _losses(self, inputs: Tensor, index: Tensor | None) -> dict[str, Tensor]:
        """Name -> loss, what follows mask and teachers by a CUDA graph where there is one."""
        images, visible, teacher_outs = self._show(inputs, index)
        known = self._known(len(images), len(visible))
        tensors, rebuilt = taken_apart(teacher_outs)

        def compute(images: Tensor, visible: Tensor, *tensors: Tensor) -> dict[str, Tensor]:
            found = self._terms_of(self._student_sees(images, visible, known), rebuilt(tensors))
            return {name: weight * term.loss() for name, (weight, term) in found.items()}

        given = (images, visible, *tensors)
        if known.get("num_cells") is None:
            return compute(*given)
        return self._graphs.losses(self, compute, given, tuple(known.values()))

    def _show(self, inputs: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor, dict[str, TeacherOutput]]:
        """The images in [0, 1], mirrored or not, the visible cells of every view, and the teachers' outputs."""
        check_size(inputs, self.image_size)
        check_images(inputs, self.student.in_chans)
        # 1. mirror some of the images, as bytes where they come so, and draw the visible cells of every view
        flipped = torch.zeros(len(inputs), dtype=torch.bool, device=inputs.device)
        if self.flip > 0.0:
            flipped = torch.rand(len(inputs), device=inputs.device) < self.flip
            inputs = torch.where(flipped[:, None, None, None], inputs.flip(3), inputs)
        images = to_unit_range(inputs)
        visible = self.draw_views(images)
        # 2. the teacher, once for all objectives that can share a pass: its many large operations keep a GPU at work while
        # the host prepares the student's
        return images, visible, self.teach(images, visible, index, flipped, self._cells_an_image)

    def _student_sees(self, images: Tensor, visible: Tensor, known: Mapping[str, Any]) -> StudentOutput:
        views = len(visible) // len(images)
        seen = images if views == 1 else images.repeat(views, 1, 1, 1)
        out: StudentOutput = self.student(seen, visible, **known)
        return out

    def _known(self, batch: int, seen: int) -> dict[str, Any]:
        """What is known of the masks before a look at them: the arguments of that kind that the student takes."""
        known: dict[str, Any] = {}
        if self.student.takes_count:
            known["num_cells"] = self._cells_shown(batch, seen)
        if self.student.takes_rectangle:
            known["rectangle"] = self._rectangle_shown
        if self.decode != "all":
            known["decode"] = self.decode
        return known

    def student_output(self, images: Tensor, visible: Tensor) -> StudentOutput:
        """The student's output for images (B, C, H, W) in [0, 1] and the mask that was drawn last, as in a training step."""
        # of whole views, which a picture does not show, 'visible' allows none: then the counts of a step hold here
        known = self._known(len(images), len(visible)) if self.decode == "visible" else {}
        return self._student_sees(images, visible, known)

    def _cells_shown(self, batch: int, seen: int) -> int | None:
        """How many cells all views of a batch show together, where the mask's generator fixes it; None: to be counted.

        Args:
            batch: images.
            seen: images times views.
        """
        (h, w), views, count = self.mask_grid, seen // batch, self._cells_masked
        whole = self._shows_whole_view
        return None if count is None else batch * ((views - whole) * count + whole * h * w)

    @property
    def _cells_masked(self) -> int | None:
        """How many cells every masked view shows at this moment, where the mask's generator fixes it."""
        mask = self.mask
        if not isinstance(mask, CountedMask) or (mask.counts_differ and not mask.in_unmasked_end):
            return None
        return mask.count(self.mask_grid)

    @property
    def _rectangle_shown(self) -> tuple[int, int] | None:
        """(rows, columns) of the rectangle that every view of the last draw shows, where the mask's generator says so."""
        mask = self.mask
        return mask.rectangle(self.mask_grid) if isinstance(mask, CountedMask) and not self._shows_whole_view else None

    @property
    def _shows_whole_view(self) -> bool:
        """Whether whole images are seen beside the masked views."""
        return self.whole_view and not getattr(self.mask, "in_unmasked_end", False)

    @property
    def _cells_an_image(self) -> int | None:
        """How many cells every view shows, where that is one known number."""
        return None if self._shows_whole_view else self._cells_masked

    @property
    def shown_channels(self) -> Sequence[int] | None:
        """The images' channels that a teacher sees as red, green and blue, for pictures; None where none has been chosen."""
        return next((chosen for chosen in self._channels.values() if chosen is not None and len(chosen) == 3), None)

    def _seen_by(self, name: str, images: Tensor) -> Tensor:
        """The channels of images that a teacher sees."""
        chosen = self._channels[name]
        return images if chosen is None else images[:, list(chosen)]

    @contextmanager
    def _teacher_at_work(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.teacher_seconds += time.perf_counter() - start

    def draw_mask(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The visible cells of a batch, bool (B, h, w), on the images' device."""
        scores = self._mask_scores(images)
        device = images.device if generator is None else generator.device
        drawn = self.mask(len(images), self.mask_grid, device=device, generator=generator, scores=scores)
        return drawn.to(images.device)

    def _mask_scores(self, images: Tensor) -> Tensor | None:
        """Attention of the teacher that guides the mask, (B, h, w); None without one."""
        guide = self._guide
        if guide is None:
            return None
        with self._teacher_at_work():
            return self.teachers[guide].attention(self._seen_by(guide, images))

    def draw_views(self, images: Tensor) -> Tensor:
        """The visible cells of every view that a step trains on, bool (views * B, h, w): view after view."""
        if self.masks_per_image == 1 or getattr(self.mask, "in_unmasked_end", False):
            drawn = self.draw_mask(images)
        elif isinstance(self.mask, CountedMask):
            at, scores = Randomness(images.device), self._mask_scores(images)
            drawn = self.mask.draw_views(self.masks_per_image, len(images), self.mask_grid, at, scores)
        else:
            drawn = torch.cat([self.draw_mask(images) for _ in range(self.masks_per_image)])
        if self._shows_whole_view:
            drawn = torch.cat([torch.ones_like(drawn[: len(images)]), drawn])
        return drawn

    def teach(
        self,
        images: Tensor,
        visible: Tensor,
        index: Tensor | None = None,
        flipped: Tensor | None = None,
        cells_an_image: int | None = None,
    ) -> dict[str, TeacherOutput]:
        """The teachers' outputs for the objectives that ask for one: objective name -> output.

        Args:
            images: (B, C, H, W) in [0, 1].
            visible: bool (B, h, w), or (views * B, h, w), view after view.
            index, flipped: which picture each image is, (B,); with these, stored features are used where there are any.
            cells_an_image: True entries of ``visible`` in every view, where known: teachers that see them alone do not count.
        """

        def taught(name: str, needs: TeacherNeeds) -> TeacherOutput:
            shown = self._seen_by(name, images)
            if needs.visible_only:
                return self._visible_pass(name, needs, shown, visible, cells_an_image)
            return self._whole_pass(name, needs, shown, index, flipped).repeat(len(visible) // len(images))

        with self._teacher_at_work():
            outs = {name: [taught(name, needs) for needs in passes] for name, passes in self._passes.items()}
        return {name: outs[teacher][i] for name, (teacher, i) in self._pass_of.items()}

    def _visible_pass(
        self, name: str, needs: TeacherNeeds, images: Tensor, visible: Tensor, cells_an_image: int | None
    ) -> TeacherOutput:
        """Tokens of the visible cells of every view, of the channels that the teacher sees."""
        views = len(visible) // len(images)
        seen = images if views == 1 else images.repeat(views, 1, 1, 1)
        counted = {} if cells_an_image is None else {"cells_an_image": cells_an_image}
        out: TeacherOutput = self.teachers[name](seen, visible, needs, **counted)
        return out

    def _whole_pass(
        self, name: str, needs: TeacherNeeds, images: Tensor, index: Tensor | None, flipped: Tensor | None
    ) -> TeacherOutput:
        """Tokens of whole images, of the channels that the teacher sees: read where they are stored, computed else."""
        teacher, cache = self.teachers[name], self.feature_caches.get(name)
        if cache is None or index is None or flipped is None or needs.decoder_block is not None:
            out: TeacherOutput = teacher(images, None, needs)
            return out

        def compute(selection: Tensor) -> TeacherOutput:
            found: TeacherOutput = teacher(images[selection.to(images.device)], None, needs)
            return found

        return cache.tokens(index.to(images.device), flipped, needs.blocks, compute)

    def store_features(self, folder: str | Path, pictures: int, data_identity: Mapping[str, Any]) -> None:
        """Keep each teacher's tokens of whole images on disk from now on; see :mod:`hgkd.teachers.cache`.

        Args:
            folder: where.
            pictures: number of training images; the batch's ``index`` is below it.
            data_identity: what the pixels depend on: files, crop, size.

        Raises:
            ValueError: no objective uses tokens of whole images, so there is nothing to store.
        """
        for name, blocks in self._stored_blocks().items():
            teacher, chosen = self.teachers[name], self._channels[name]
            assert teacher.grid is not None
            identity = {"teacher": teacher.identity(), "input_size": list(teacher.input_size), **data_identity}
            identity |= {} if chosen is None else {"channels_seen": list(chosen)}
            self.feature_caches[name] = FeatureCache(folder, identity, pictures, blocks, teacher.info.width, teacher.grid)

    def stored_bytes(self, pictures: int) -> int:
        """Disk space that :meth:`store_features` takes, in bytes."""
        total = 0
        for name, blocks in self._stored_blocks().items():
            teacher = self.teachers[name]
            assert teacher.grid is not None
            total += store_bytes(pictures, len(blocks), teacher.info.width, teacher.grid)
        return total

    def _stored_blocks(self) -> dict[str, list[int]]:
        """Blocks whose tokens of whole images are asked for, of each teacher that has any."""
        found = {
            name: sorted({block for needs in passes if not needs.visible_only for block in needs.blocks})
            for name, passes in self._passes.items()
        }
        blocks = {name: indices for name, indices in found.items() if indices}
        if not blocks:
            raise InvalidValueError(
                "nothing-to-store",
                "no objective uses the teacher's tokens of whole images, so there is nothing to store; "
                "set teacher_features=None",
            )
        return blocks

    def load_meta(self, meta: Mapping[str, Any]) -> str | None:
        """Normalise as the checkpoint did whose meta this is, see :meth:`hgkd.pixels.PixelNormalisation.restore_pixels`."""
        pixels = self.student.pixels_of(meta)
        return None if pixels is None else self.student.restore_pixels(*pixels)

    def meta(self) -> dict[str, Any]:
        """Description of the network for checkpoints, under ``meta['hgkd']``."""
        return {**self.student.description(), "format": FORMAT}


Part = TypeVar("Part", bound=nn.Module)


def _build(cfg: Mapping[str, Any]) -> Any:
    """Build from ``MODELS`` whatever default scope another runner of this process has left behind."""
    return MODELS.build({"_scope_": "hgkd", **cfg})


def _build_part(cfg: Mapping[str, Any], base: type[Part], place: str, path: str) -> Part:
    """Build a part of the model, which must be derived from a base class.

    Raises:
        ValueError: it is not.
    """
    part = _build(cfg)
    if not isinstance(part, base):
        raise InvalidValueError(
            "part-of-wrong-kind",
            f"{place} is a {type(part).__name__}, which is no {path}; use one that is, or derive yours from it",
        )
    return part


def _build_teachers(single: Mapping[str, Any] | None, several: Mapping[str, Mapping[str, Any]] | None) -> dict[str, Teacher]:
    """The teachers by name; a single one is 'teacher'.

    Raises:
        ValueError: both are given, or what building one raises, with the place in the config.
    """
    if single is not None and several:
        raise InvalidValueError(
            "teacher-and-teachers",
            f"the model has a teacher and teachers ({', '.join(several)}); put all of them into model.teachers, under names",
        )
    if single is not None:
        return {"teacher": _build_part(single, Teacher, "model.teacher", "hgkd.teachers.Teacher")}
    built = {}
    for name, cfg in (several or {}).items():
        place = f"model.teachers.{name}"
        with _told_of(place):
            built[name] = _build_part(cfg, Teacher, place, "hgkd.teachers.Teacher")
    return built


@contextmanager
def _told_of(place: str) -> Iterator[None]:
    """Context in which errors of a teacher, whose messages speak of ``model.teacher``, name its own place in the config."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if place == "model.teacher":
            raise
        raise type(error)(f"{place}: {str(error).replace('model.teacher.', f'{place}.')}") from error


def _teacher_channels(
    teachers: Mapping[str, Teacher], given: Sequence[int] | Mapping[str, Sequence[int]] | None, in_chans: int
) -> dict[str, tuple[int, ...] | None]:
    """Which channels each teacher sees; None: all, as they are.

    Raises:
        ValueError: none is said where it must be, or what is said does not fit the images or the teacher.
    """
    named = given if isinstance(given, Mapping) else dict.fromkeys(teachers, given)
    for name in named:
        if name not in teachers:
            raise InvalidValueError(
                "teacher-unknown", f"model.teacher_channels: {unknown_name_message('teacher', name, teachers)}"
            )
    if given is not None and not teachers:
        raise InvalidValueError("teacher-not-needed", "model.teacher_channels is set, but there is no teacher; leave it out")
    found = {}
    for name, teacher in teachers.items():
        found[name] = _seen_channels(named.get(name), in_chans, teacher.in_chans, name)
        if found[name] is not None:
            print_log(f"{name} sees the channels {', '.join(map(str, found[name] or ()))} of {in_chans}", "current")
    return found


def _seen_channels(given: Sequence[int] | None, in_chans: int, wanted: int, name: str) -> tuple[int, ...] | None:
    if given is None:
        if in_chans in (wanted, 1):
            return None if in_chans == wanted else (0,) * wanted
        example = list(range(wanted))[:in_chans] if in_chans >= wanted else [0]
        raise InvalidValueError(
            "teacher-channels-missing",
            f"the images have {in_chans} channels, and {name} sees {wanted}: say which ones it is shown, in its order (of "
            f"most teachers red, green, blue), e.g. model.teacher_channels={example}; a single one is repeated",
        )
    whole = isinstance(given, Sequence) and all(isinstance(c, int) and not isinstance(c, bool) for c in given)
    if not whole or isinstance(given, str) or len(given) not in (1, wanted):
        raise InvalidValueError(
            "teacher-channels-wrong",
            f"model.teacher_channels={given!r} must be {wanted} numbers of channels, one for each that {name} sees, or a "
            "single one, which is repeated",
        )
    beyond = [channel for channel in given if not 0 <= channel < in_chans]
    if beyond:
        raise InvalidValueError(
            "teacher-channels-wrong",
            f"model.teacher_channels={list(given)} names channel {beyond[0]}, but the images have {in_chans}, numbered 0 "
            f"to {in_chans - 1}",
        )
    return tuple(given) * (wanted if len(given) == 1 else 1)


def build_objectives(
    configs: Mapping[str, Mapping[str, Any]], registry: Registry, base: type[Objective]
) -> tuple[nn.ModuleDict, dict[str, float]]:
    """Objectives by name, and the weight of each: an extra key ``weight`` of its config, 1.0 without.

    Raises:
        ValueError: an unknown name, or an objective of another kind; the message names those that serve.
    """
    objectives = nn.ModuleDict()
    weights = {}
    for name, cfg in configs.items():
        cfg = dict(cfg)
        weights[name] = float(cfg.pop("weight", 1.0))
        kind = cfg.get("type")
        found = registry.get(kind) if isinstance(kind, str) else kind
        if not isinstance(found, type) or not issubclass(found, base):
            told = unknown_objective_message(registry, getattr(found, "__name__", str(kind)))
            raise InvalidValueError(
                "objective-of-wrong-kind", f"objective {name!r}: {told}; derive yours from hgkd.objectives.{base.__name__}"
            )
        objectives[name] = registry.build({"_scope_": "hgkd", **cfg})
    return objectives, weights


def check_size(images: Tensor, size: tuple[int, int]) -> None:
    """Raise ValueError when images (B, 3, H, W) are not of the size (H, W) that a model was built for."""
    if tuple(images.shape[-2:]) != size:
        raise InvalidValueError(
            "images-of-another-size",
            f"the images are {images.shape[-2]} x {images.shape[-1]} pixels, the model was built for {size[0]} x {size[1]}; "
            "set image_size of model and data alike",
        )


def feature_samples(features: Tensor, data: Mapping[str, Any]) -> list[FeatureSample]:
    count = len(features)
    labels = data.get("label", [-1] * count)
    indices = data.get("index", range(count))
    splits = data.get("split", ["query"] * count)
    return [FeatureSample(features[i], label=int(labels[i]), index=int(indices[i]), split=str(splits[i])) for i in range(count)]
