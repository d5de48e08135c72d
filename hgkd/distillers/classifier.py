"""Fine-tuning: a backbone becomes a classifier, with labels alone or with a teacher as well.

One model for plain fine-tuning, G2SD's specific stage (arXiv 2302.14771: ``HardLabelKD`` or ``NKD``), logit distillation
(``LogitKD``) and MGD for classification (``FeatureMapMGD``, arXiv 2205.01529), so that they differ in their objectives only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from mmengine.model import BaseModel
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from hgkd.data.transforms import as_size
from hgkd.distillers.masked import build_objectives
from hgkd.errors import InvalidValueError
from hgkd.networks.classifier import ImageClassifier
from hgkd.networks.guest import TeacherOwner
from hgkd.objectives.finetuning.base import FinetuningObjective
from hgkd.objectives.finetuning.labels import LabelLoss
from hgkd.pixels import to_unit_range
from hgkd.registry import FINETUNING_OBJECTIVES, MODELS
from hgkd.structures import ClassSample
from hgkd.teachers.classifier import ClassifierTeacher
from hgkd.weights.run_file import FORMAT, ClassifierSpec


@MODELS.register_module()
class ClassifierTraining(TeacherOwner[ClassifierTeacher | None], BaseModel):
    """A classifier being fine-tuned.

    The teacher is no submodule; see :class:`hgkd.networks.guest.TeacherOwner`.

    Args:
        classifier: options of :class:`hgkd.networks.ImageClassifier`, but for the two below.
        num_classes: K; must be that of the data, which the run checks before the first step.
        image_size: side in pixels of the training images, or (H, W); those of validation may have another, with a CNN.
        labels: options of :class:`hgkd.objectives.finetuning.labels.LabelLoss`.
        label_weight: factor of the label loss; 0 leaves it out.
        erasing: probability of erasing a random rectangle of an image with noise (timm's, arXiv 1708.04896), before the
            images are mixed.
        teacher: options of :class:`hgkd.teachers.ClassifierTeacher`; None when no objective needs one.
        objectives: name -> config of an objective that learns from the teacher; an extra key ``weight`` (default 1.0)
            multiplies it.
        data_preprocessor: see mmengine's ``BaseModel``; the default only moves data to the device.

    Raises:
        ValueError: anything that does not fit together, before the first step.
        FileNotFoundError, WeightsError: see the classifier and the teacher.
    """

    objective_registry = FINETUNING_OBJECTIVES

    def __init__(
        self,
        classifier: Mapping[str, Any],
        num_classes: int,
        image_size: int | Sequence[int],
        labels: Mapping[str, Any] | None = None,
        label_weight: float = 1.0,
        erasing: float = 0.0,
        teacher: Mapping[str, Any] | None = None,
        objectives: Mapping[str, Mapping[str, Any]] | None = None,
        data_preprocessor: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(data_preprocessor=None if data_preprocessor is None else dict(data_preprocessor))
        if not 0.0 <= erasing <= 1.0:
            raise InvalidValueError("erasing-out-of-range", f"erasing is a probability in [0, 1], got {erasing}")
        if label_weight < 0.0 or (label_weight == 0.0 and not objectives):
            raise InvalidValueError(
                "label-weight-zero",
                f"label_weight={label_weight} leaves nothing to learn; it must be above 0, or 0 beside objectives",
            )
        self.image_size = as_size(image_size)
        options = {key: value for key, value in classifier.items() if key not in ("type", "_scope_")}
        self.classifier = ImageClassifier(num_classes=num_classes, image_size=self.image_size, **options)
        self.labels = LabelLoss(num_classes, **(labels or {}))
        self.label_weight = label_weight
        self.erasing = erasing
        self.objectives, self.weights = build_objectives(objectives or {}, FINETUNING_OBJECTIVES, FinetuningObjective)
        built = None if teacher is None else MODELS.build({"_scope_": "hgkd", **teacher})
        self.keep_teacher(built)
        self._prepare(num_classes)

    def _prepare(self, num_classes: int) -> None:
        """Let every part check that it fits the others."""
        feature = self.classifier.feature_shape(self.image_size)
        teacher = self.teacher
        if (teacher is None) != (not self.objectives):
            which = f"objectives={list(self.objectives)} but no teacher" if teacher is None else "a teacher but no objectives"
            raise InvalidValueError(
                "teacher-and-objectives-half-set", f"the model has {which}; set model.teacher and model.objectives, or neither"
            )
        if teacher is None:
            return
        needing = [name for name, part in self.objectives.items() if part.needs_classes]
        if needing and teacher.num_classes != num_classes:
            raise InvalidValueError(
                "teacher-classes-needed",
                f"the teacher ({teacher.info}) must be fine-tuned on the {num_classes} classes of this training, because "
                f"objective {needing[0]!r} learns from its answers; give another teacher_checkpoint, or use FeatureMapMGD",
            )
        if teacher.classifier.in_chans != self.classifier.in_chans:
            raise InvalidValueError(
                "channels-differ",
                f"the classifier's images have {self.classifier.in_chans} channels, the teacher sees "
                f"{teacher.classifier.in_chans}; "
                "fine-tune with a teacher of as many, or without one (a masked distillation can show an RGB teacher three "
                "of the channels: model.teacher_channels)",
            )
        taught = teacher.prepare(self.image_size)
        for part in self.objectives.values():
            cast(Any, part).prepare(feature, taught)

    def init_weights(self) -> None:
        """Nothing: all weights are set when the parts are built, and pretrained ones must not be overwritten."""

    def forward(  # type: ignore[override]
        self, inputs: Tensor, mode: str = "tensor", **data: Tensor
    ) -> dict[str, Tensor] | list[ClassSample] | Tensor:
        """Losses, predictions or logits of a batch.

        Args:
            inputs: uint8 (B, 3, H, W), RGB.
            mode: 'loss' -> name of a loss -> fp32 scalar; 'predict' -> one ``ClassSample`` an image; 'tensor' -> (B, K) logits,
                the mean of both heads where there are two.
            data: further entries of the batch: ``label`` and ``index`` (B,).
        """
        normalised = self.classifier.normalise(to_unit_range(inputs))
        if mode == "loss":
            return self._losses(normalised, data["label"])
        logits = self.classifier.predict(normalised)
        if mode == "tensor":
            return logits
        if mode == "predict":
            rows = zip(logits.float(), data["label"].tolist(), data["index"].tolist(), strict=True)
            return [ClassSample(scores, label, index) for scores, label, index in rows]
        raise InvalidValueError("mode-unknown", f"mode must be 'loss', 'predict' or 'tensor', got {mode!r}")

    def _losses(self, normalised: Tensor, labels: Tensor) -> dict[str, Tensor]:
        # 1. erase and mix, as timm does: on the normalised batch, in this order
        if self.erasing > 0.0:
            normalised = RandomErasing(self.erasing, mode="pixel", device=normalised.device)(normalised)
        inputs, targets = self.labels.mix(normalised, labels)
        # 2. the student; 3. the teacher, on the same erased and mixed images
        out = self.classifier(inputs)
        losses = {}
        if self.label_weight > 0.0:
            losses["label_loss"] = self.label_weight * self.labels(out.logits, targets)
        if self.teacher is not None:
            said = self.teacher(self.classifier.denormalise(inputs))
            for name, objective in self.objectives.items():
                for term, value in objective(out, said, targets).items():
                    losses[f"{name}_{term}_loss"] = self.weights[name] * value
        return losses

    def check_heads(self) -> None:
        """Every head must learn, because each counts in the answers.

        Raises:
            ValueError: one would keep its random weights.
        """
        spec = self.classifier.spec
        kinds = [part for part in self.objectives.values() if part.needs_classes]
        class_head = self.label_weight > 0.0 or any(part.teaches_class_head for part in kinds)
        second_head = any(not part.teaches_class_head for part in kinds)
        if spec.two_heads and not (class_head and second_head):
            idle, remedy = (
                ("class", "set label_weight above 0") if second_head else ("second", "add an objective such as HardLabelKD")
            )
            raise InvalidValueError(
                "head-not-trained",
                f"{spec.name} is to be trained with two heads, whose answers are averaged, but nothing trains the {idle} one; "
                f"{remedy}, or leave the second head out (model.classifier.two_heads=False and a network without a "
                "distillation token)",
            )

    def set_classes(self, classes: Sequence[str]) -> None:
        """Note the names of the classes, for the checkpoint.

        Raises:
            ValueError: not as many as the network has outputs, or others than those of the teacher.
        """
        spec = self.classifier.spec
        if len(classes) != spec.num_classes:
            raise InvalidValueError(
                "classes-differ",
                f"the images are of {len(classes)} classes ({', '.join(classes[:3])} ...), the model has "
                f"{spec.num_classes} outputs; set num_classes={len(classes)}",
            )
        teacher = self.teacher
        known = () if teacher is None or teacher.num_classes is None else teacher.classes
        if known and tuple(known) != tuple(classes):
            differ = sorted(set(known) ^ set(classes))[:5]
            raise InvalidValueError(
                "teacher-classes-differ",
                f"the teacher was fine-tuned on other classes than the images have: {', '.join(differ) or 'in another order'}; "
                "give a teacher_checkpoint of the same data",
            )
        self.classifier.spec = replace(spec, classes=tuple(classes))

    def load_meta(self, meta: Mapping[str, Any]) -> str | None:
        """Normalise as the checkpoint did whose meta this is, see :meth:`hgkd.pixels.PixelNormalisation.restore_pixels`."""
        spec = ClassifierSpec.parse({"hgkd": meta})
        return None if spec is None else self.classifier.restore_pixels(spec.mean, spec.std)

    def meta(self) -> dict[str, Any]:
        """Description of the network for checkpoints, under ``meta['hgkd']``."""
        return {"classifier": self.classifier.spec.to_dict(), "format": FORMAT}
