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
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModel
from mmengine.registry import Registry
from torch import Tensor, nn

from hgkd.data.transforms import as_size
from hgkd.errors import InvalidValueError
from hgkd.masking import CountedMask, MaskGenerator
from hgkd.networks.guest import TeacherOwner
from hgkd.objectives.base import Objective
from hgkd.objectives.loss_terms import LossTerm, MaskedObjective, Setup
from hgkd.pixels import pixels_text, to_unit_range
from hgkd.registry import MASKED_OBJECTIVES, MODELS, unknown_objective_message
from hgkd.structures import FeatureSample, StudentOutput, TeacherInfo, TeacherNeeds, TeacherOutput
from hgkd.students.base import Student
from hgkd.teachers.base import Teacher
from hgkd.teachers.cache import FeatureCache, store_bytes, weights_digest
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

    The teacher is no submodule; see :class:`hgkd.networks.guest.TeacherOwner`.

    Args:
        student: config of a student, e.g. ``dict(type='SparseUNet', encoder='resnet18')``.
        objectives: name -> config of an objective. Names prefix the logged losses; an extra key ``weight`` (default 1.0)
            multiplies all terms of that objective.
        mask: config of a generator of visible cells.
        image_size: side in pixels of the training images, or (H, W); a multiple of the student's cell.
        teacher: config of a teacher; None when no objective needs one.
        flip: probability of mirroring a training image left to right here, rather than in the data's transform, so that
            stored teacher features (see :meth:`store_features`) can tell a picture from its mirror image.
        data_preprocessor: see mmengine's ``BaseModel``; the default only moves data to the device.

    Attributes:
        teacher_seconds: wall time that the teacher (or the reading of its stored features) has taken so far; on a GPU that of
            launching it.

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
        data_preprocessor: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(data_preprocessor=None if data_preprocessor is None else dict(data_preprocessor))
        if not 0.0 <= flip <= 1.0:
            raise InvalidValueError("flip-out-of-range", f"flip must be a probability in [0, 1], got {flip}")
        self.flip = flip
        self.feature_cache: FeatureCache | None = None
        self.teacher_seconds = 0.0
        self.image_size = as_size(image_size)
        self.student: Student = _build_part(student, Student, "model.student", "hgkd.students.Student")
        self.mask: MaskGenerator = _build(mask)
        if not objectives:
            raise InvalidValueError(
                "objectives-empty", "objectives is empty; give at least one, e.g. dict(hgkd=dict(type='HGKD'))"
            )
        self.objectives, self.weights = build_objectives(objectives, MASKED_OBJECTIVES, MaskedObjective)
        built_teacher = None if teacher is None else _build_part(teacher, Teacher, "model.teacher", "hgkd.teachers.Teacher")
        self.keep_teacher(built_teacher)
        self._prepare()

    def _prepare(self) -> None:
        """Find all grids and let every part check that it fits the others."""
        self.mask_grid: tuple[int, int] = self.student.prepare(self.image_size)
        self.mask.check(self.mask_grid)
        teacher: Any = self.teacher
        info: TeacherInfo | None = None
        grid: tuple[int, int] | None = None
        if teacher is not None:
            teacher.require_trained()
            grid = teacher.prepare(self.mask_grid, self.student.cell)
            info = teacher.info
        parts: dict[str, Any] = dict(self.objectives.items())
        for name, objective in parts.items():
            if objective.needs is not None and teacher is None:
                raise InvalidValueError(
                    "objective-without-teacher",
                    f"objective {name!r} ({type(objective).__name__}) learns from a teacher, but the model has none; "
                    "set model.teacher, or use an objective without one such as PixelReconstruction",
                )
            if objective.needs is not None and objective.needs.decoder_block is not None:
                teacher.require_decoder()  # before the objective, whose message could not name the file
            objective.prepare(Setup(self.student, info, grid, self.mask_grid))
            if objective.needs is not None:  # after prepare, which resolves negative block indices
                teacher.check(objective.needs)
        if self.mask.guided and (teacher is None or not teacher.gives_attention):
            raise InvalidValueError(
                "mask-without-attention",
                f"{type(self.mask).__name__} is guided by a teacher's attention, but the model has "
                f"{'none' if teacher is None else 'a ' + type(teacher).__name__}; use a ViT teacher, or RandomMask",
            )
        if self.mask.guided:
            teacher.check_attention()
        asking: dict[str, TeacherNeeds] = {name: part.needs for name, part in parts.items() if part.needs is not None}
        if teacher is not None and not asking and not self.mask.guided:
            raise InvalidValueError(
                "teacher-without-objective",
                "model.teacher is set, but no objective learns from it; remove it or add such an objective",
            )
        self._passes, owner = merge_needs(list(asking.values()))
        self._pass_of = dict(zip(asking, owner, strict=True))
        print_log(f"student: {self._seen()}", "current")

    def _seen(self) -> str:
        """What the student sees, for the log."""
        height, width = self.mask_grid
        text = f"mask grid {height} x {width}"
        if isinstance(self.mask, CountedMask):
            text += f", {self.mask.count(self.mask_grid)} of {height * width} cells visible"
        return f"{text}; {pixels_text(self.student.mean, self.student.std)}"

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskedDistiller:
        """A copy that shares the teacher and its stored features, which no training changes.

        mmengine's ``EMAHook`` copies the model for its average of the weights, and a second teacher would cost its memory. Only
        the student and the objectives are averaged; the copy's teacher follows whichever of the two was moved last.
        """
        for shared in (self.teacher, self.feature_cache):
            memo[id(shared)] = shared
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        made.__dict__ = copy.deepcopy(self.__dict__, memo)
        return made

    def init_weights(self) -> None:
        """Nothing: all weights are set when the parts are built, and pretrained ones must not be overwritten."""

    def forward(  # type: ignore[override]
        self, inputs: Tensor, mode: str = "tensor", **data: Any
    ) -> dict[str, Tensor] | list[FeatureSample] | Tensor:
        """Losses, features or samples of a batch.

        Args:
            inputs: uint8 (B, 3, H, W), RGB.
            mode: 'loss', 'predict' or 'tensor'.
            data: further entries of the batch; 'predict' reads ``label`` and ``index`` (B,), and ``split``.

        Returns:
            'loss': name of a loss -> fp32 scalar. 'predict': one ``FeatureSample`` an image, pooled over the whole image.
            'tensor': last-level features (B, C, h, w) of the whole image.
        """
        images = to_unit_range(inputs)
        if mode == "loss":
            found = self._loss_terms(images, data.get("index"))
            return {name: weight * comparison.loss() for name, (weight, comparison) in found.items()}
        if mode == "predict":
            return feature_samples(self.student.pooled(images).float(), data)
        if mode == "tensor":
            return self.encode(images)
        raise InvalidValueError("mode-unknown", f"mode must be 'loss', 'predict' or 'tensor', got {mode!r}")

    def encode(self, images: Tensor) -> Tensor:
        """Last-level encoder features (B, C, h, w) of whole images (B, 3, H, W) in [0, 1]: the dense network."""
        features: Tensor = self.student.dense_features(images)[-1]
        return features

    def _loss_terms(self, images: Tensor, index: Tensor | None) -> dict[str, tuple[float, LossTerm]]:
        """Name of a loss -> its weight, and what it compares."""
        student_out, teacher_outs = self._see(images, index)
        parts: dict[str, Any] = dict(self.objectives.items())
        return {
            f"{name}_{term}_loss": (self.weights[name], found)
            for name, objective in parts.items()
            for term, found in objective.loss_terms(student_out, teacher_outs.get(name), student_out.layout).items()
        }

    def term_report(self, inputs: Tensor, index: Tensor | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The losses of a batch, and what each would be, were the prediction everywhere the batch's mean target."""
        found = self._loss_terms(to_unit_range(inputs), index)
        losses = {name: weight * comparison.loss() for name, (weight, comparison) in found.items()}
        return losses, {name: weight * comparison.loss_of_mean() for name, (weight, comparison) in found.items()}

    def _see(self, images: Tensor, index: Tensor | None) -> tuple[StudentOutput, dict[str, TeacherOutput]]:
        """What student and teacher make of a batch; the teacher's part by name of the objective."""
        check_size(images, self.image_size)
        # 1. mirror some of the images, and draw the visible cells
        flipped = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        if self.flip > 0.0:
            flipped = torch.rand(len(images), device=images.device) < self.flip
            images = torch.where(flipped[:, None, None, None], images.flip(3), images)
        visible = self.draw_mask(images)
        # 2. the student sees these only; 3. the teacher, once for all objectives that can share a pass
        student_out: StudentOutput = self.student(images, visible)
        return student_out, self.teach(images, visible, index, flipped)

    def _teacher(self) -> Teacher:
        """The teacher, where the parts have been checked to need one and to have one."""
        assert self.teacher is not None
        return self.teacher

    @contextmanager
    def _teacher_at_work(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.teacher_seconds += time.perf_counter() - start

    def draw_mask(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The visible cells of a batch, bool (B, h, w), on the images' device."""
        with self._teacher_at_work():
            scores = self._teacher().attention(images) if self.mask.guided else None
        device = images.device if generator is None else generator.device
        drawn = self.mask(len(images), self.mask_grid, device=device, generator=generator, scores=scores)
        return drawn.to(images.device)

    def teach(
        self, images: Tensor, visible: Tensor, index: Tensor | None = None, flipped: Tensor | None = None
    ) -> dict[str, TeacherOutput]:
        """What the teacher says to each objective that asked: objective name -> output.

        Args:
            images: (B, 3, H, W) in [0, 1].
            visible: bool (B, h, w).
            index, flipped: which picture each image is, (B,); with these, stored features are used where there are any.
        """
        with self._teacher_at_work():
            outs = [self._teacher_pass(needs, images, visible, index, flipped) for needs in self._passes]
        return {name: outs[i] for name, i in self._pass_of.items()}

    def _teacher_pass(
        self, needs: TeacherNeeds, images: Tensor, visible: Tensor, index: Tensor | None, flipped: Tensor | None
    ) -> TeacherOutput:
        teacher = self._teacher()
        cacheable = not needs.visible_only and needs.decoder_block is None
        if self.feature_cache is None or index is None or flipped is None or not cacheable:
            out: TeacherOutput = teacher(images, visible, needs)
            return out

        def compute(selection: Tensor) -> TeacherOutput:
            found: TeacherOutput = teacher(images[selection.to(images.device)], None, needs)
            return found

        return self.feature_cache.tokens(index.to(images.device), flipped, needs.blocks, compute)

    def store_features(self, folder: str | Path, pictures: int, data_identity: Mapping[str, Any]) -> None:
        """Keep the tokens of whole images on disk from now on; see :mod:`hgkd.teachers.cache`.

        Args:
            folder: where.
            pictures: number of training images; the batch's ``index`` is below it.
            data_identity: what the pixels depend on: files, crop, size.

        Raises:
            ValueError: no objective uses tokens of whole images, so there is nothing to store.
        """
        teacher, blocks = self._teacher(), self._stored_blocks()
        assert teacher.grid is not None
        identity = {"teacher": weights_digest(teacher), "input_size": list(teacher.input_size), **data_identity}
        self.feature_cache = FeatureCache(folder, identity, pictures, blocks, teacher.info.width, teacher.grid)

    def stored_bytes(self, pictures: int) -> int:
        """Disk space that :meth:`store_features` takes, in bytes."""
        teacher = self._teacher()
        assert teacher.grid is not None
        return store_bytes(pictures, len(self._stored_blocks()), teacher.info.width, teacher.grid)

    def _stored_blocks(self) -> list[int]:
        blocks = sorted({b for needs in self._passes if not needs.visible_only for b in needs.blocks})
        if not blocks:
            raise InvalidValueError(
                "nothing-to-store",
                "no objective uses the teacher's tokens of whole images, so there is nothing to store; "
                "set teacher_features=None",
            )
        return blocks

    def meta(self) -> dict[str, Any]:
        """What a checkpoint says about the network inside, under ``meta['hgkd']``."""
        return {**self.student.description(), "format": FORMAT}


def _build(cfg: Mapping[str, Any]) -> Any:
    """Build from ``MODELS`` whatever default scope another runner of this process has left behind."""
    return MODELS.build({"_scope_": "hgkd", **cfg})


def _build_part(cfg: Mapping[str, Any], base: type[nn.Module], place: str, path: str) -> Any:
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
