"""A classifier as a teacher: its logits, and the last feature map that leads to them, of whole images.

For G2SD's specific stage and logit distillation it must be fine-tuned on the same classes; for MGD a backbone is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hgkd.data.transforms import as_size
from hgkd.errors import InvalidValueError, WeightsError
from hgkd.networks.classifier import ClassifierOutput, ImageClassifier, load_classifier
from hgkd.registry import MODELS
from hgkd.teachers.base import DTYPES
from hgkd.teachers.health import check_outputs, weight_health
from hgkd.weights.identify import Kind, identify
from hgkd.weights.loading import load_strict


@MODELS.register_module()
class ClassifierTeacher(nn.Module):
    """A frozen classifier, in eval whatever ``train()`` is called.

    Args:
        checkpoint: what fine-tuning wrote (or its work folder), or with ``name`` a weight file in timm's naming, MAE's
            fine-tuned ones included.
        name: timm's name of the network in a file of others.
        image_size: side in pixels, or (H, W), that images are resized to; None: they are taken as they come, and a ViT's
            positions are fitted to them.
        backbone_only: take a file without classifier (DINOv2, an export): there are no logits to learn from, only features.
        normalize: (mean, std) of the pixels in [0, 1], RGB, for a file of others; None: what timm notes for the name.
        dtype: 'float32', 'float16' or 'bfloat16'; outputs are fp32.
        allow_random: accept weights that look random, or none (tests).
        kwargs: further arguments of ``timm.create_model``, e.g. ``global_pool='avg'`` for MAE's fine-tuned files.

    Attributes:
        info: in words, for reports.
        num_classes: K; None with ``backbone_only``.
        classes: their names, empty when unknown.

    Raises:
        ValueError: options that do not fit together.
        FileNotFoundError, WeightsError: the file is absent, damaged, does not fit, or looks random.
    """

    def __init__(
        self,
        checkpoint: str | Path | None = None,
        name: str | None = None,
        image_size: int | Sequence[int] | None = None,
        backbone_only: bool = False,
        normalize: Sequence[Sequence[float]] | None = None,
        dtype: str = "float32",
        allow_random: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise InvalidValueError("dtype-unknown", f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        if checkpoint is None and (name is None or not allow_random):
            raise InvalidValueError(
                "teacher-without-weights",
                "the teacher has no weights: set model.teacher.checkpoint (the short option teacher_checkpoint) to a "
                "fine-tuned classifier",
            )
        if backbone_only and name is None:
            raise InvalidValueError(
                "backbone-only-without-name",
                "backbone_only=True is for a backbone's file: name its network, e.g. teacher=vit_small_patch14_dinov2",
            )
        self._options = (checkpoint, name, backbone_only, normalize, kwargs)
        self.image_size = None if image_size is None else as_size(image_size)
        self.dtype = DTYPES[dtype]
        self.allow_random = allow_random
        self._proved = False
        self.backbone_only = backbone_only
        self._build(self.image_size)

    def prepare(self, image_size: Sequence[int]) -> tuple[int, int, int]:
        """Fit a ViT to the training's images; returns channels and grid (C, h, w) of the feature."""
        if self.image_size is None and self.classifier.is_vit and tuple(image_size) != self.classifier.spec.image_size:
            self._build(tuple(image_size))
        with torch.autocast(self.classifier.mean.device.type, enabled=False), torch.no_grad():
            probe = torch.zeros(1, self.classifier.in_chans, *image_size, device=self.classifier.mean.device)
            return tuple(self(probe).feature.shape[1:])  # type: ignore[return-value]

    @torch.no_grad()
    def forward(self, images: Tensor) -> ClassifierOutput:
        """Logits and features of images (B, 3, H, W) in [0, 1]; fp32. ``distilled`` is ``logits``, the heads' mean."""
        if self.image_size is not None and tuple(images.shape[-2:]) != self.image_size:
            images = F.interpolate(images.float(), self.image_size, mode="bicubic", align_corners=False, antialias=True)
        with torch.autocast(images.device.type, enabled=False):
            inputs = self.classifier.normalise(images).to(self.dtype)
            out = self.classifier(inputs)
            logits = out.prediction.float()
            if not self._proved:
                source = str(self._options[0] or self.classifier.spec.name)
                check_outputs(self.classifier, (logits, out.feature), lambda: self.classifier(inputs), source, self.dtype)
                self._proved = bool(images.any())  # the images of zeros that size the feature prove nothing
        return ClassifierOutput(logits, logits, out.feature.float())

    def train(self, mode: bool = True) -> ClassifierTeacher:
        """A teacher stays in eval mode, whatever it is told."""
        return super().train(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> ClassifierTeacher:
        return self  # a moving average of the model (EMAHook copies it) needs no second teacher: this one never changes

    def _build(self, image_size: tuple[int, ...] | None) -> None:
        checkpoint, name, backbone_only, normalize, kwargs = self._options
        if name is None:
            assert checkpoint is not None
            if kwargs or normalize:
                raise InvalidValueError(
                    "option-without-name",
                    f"{sorted(kwargs) or 'normalize'} is for a file of others (name=...); {checkpoint} says it itself",
                )
            classifier = load_classifier(checkpoint, image_size)
        elif checkpoint is None or backbone_only:
            classes = int(kwargs.get("num_classes", 1000)) if not backbone_only else 1
            rest = {key: value for key, value in kwargs.items() if key != "num_classes"}
            classifier = ImageClassifier(name, classes, image_size or 224, backbone=checkpoint, normalize=normalize, **rest)
        else:
            classifier = _timm_classifier(name, checkpoint, image_size or 224, normalize, kwargs)
        why = None if self.allow_random else _why_random(classifier)
        if why is not None:
            raise WeightsError(
                "teacher-looks-random",
                f"{checkpoint}: this teacher {why}. A student would learn noise from it; when it is meant to be so, set "
                "model.teacher.allow_random=True",
            )
        classifier.requires_grad_(False)
        classifier.network.to(self.dtype)
        if classifier.distillation_head is not None:
            classifier.distillation_head.to(self.dtype)
        self.classifier = classifier
        self.num_classes = None if backbone_only else classifier.spec.num_classes
        self.classes = classifier.spec.classes
        size = "x".join(map(str, classifier.spec.image_size))
        self.info = f"{classifier.spec.name}, {self.num_classes or 'no'} classes" + (f", {size}" if classifier.is_vit else "")
        super().train(False)


def _why_random(classifier: ImageClassifier) -> str | None:
    """What says that nobody has trained a classifier; None: nothing does."""
    if classifier.is_vit:
        health = weight_health(classifier.network.state_dict())
        return str(health) if health.looks_random else None
    norms: list[Any] = [module for module in classifier.network.modules() if isinstance(module, nn.BatchNorm2d)]
    if norms and not any(norm.running_mean.any() for norm in norms):
        return "looks random: its batch normalisations have seen no image"
    return None


def _timm_classifier(
    name: str,
    path: str | Path,
    image_size: int | tuple[int, ...],
    normalize: Sequence[Sequence[float]] | None,
    kwargs: dict[str, Any],
) -> ImageClassifier:
    """A timm classifier with all weights of a file, its head included, whose size says the number of classes."""
    file = identify(path)
    if file.kind is Kind.CLASSIFIER:
        raise InvalidValueError("name-not-needed", f"{file} says itself which network it holds; leave name={name!r} out")
    path, weights = file.path, file.tensors()
    trial = ImageClassifier(name, 1, image_size, **kwargs)
    head = trial.head_names()[0] + "weight"
    if head not in weights:
        raise WeightsError(
            "teacher-without-classifier",
            f"{path} has no classifier ({head}); give a fine-tuned {name}, or for MGD set model.teacher.backbone_only=True",
        )
    built = ImageClassifier(name, len(weights[head]), image_size, normalize=normalize, **kwargs)
    if built.is_vit:
        weights = built.fit_positions(weights, str(path))
    load_strict(built.network, weights, source=str(path))
    return built
