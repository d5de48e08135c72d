"""Dense encoders with weights, out of checkpoints, exports and files of other projects."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from hgkd.errors import MissingFileError, WeightsError
from hgkd.networks.encoder import build_encoder
from hgkd.networks.vit import head_names, is_vit
from hgkd.pixels import PixelStatistics, channels_of, note_pixels, pixel_statistics
from hgkd.weights.export_folder import read_spec
from hgkd.weights.identify import MASKED_AUTOENCODERS, Kind, WeightFile, identify
from hgkd.weights.importing import import_weights
from hgkd.weights.loading import load_strict
from hgkd.weights.run_file import (
    ENCODER_PREFIX,
    EXPECTED_RUN,
    STUDENT_PREFIX,
    ClassifierSpec,
    EncoderSpec,
    network_state,
    run_metrics,
)


def build_backbone(spec: EncoderSpec) -> nn.Module:
    """The dense encoder that a spec describes, with random weights, in eval mode."""
    network = build_encoder(spec.name, stem=spec.stem, **spec.kwargs).eval()
    if spec.pixels is not None:
        note_pixels(network, pixels=spec.pixels)
    return network


def trained_pixels(file: WeightFile) -> PixelStatistics | None:
    """Mean and std of the pixels that a run's network or an export was trained with; None: of others, whose files say none."""
    spec = file.spec
    if spec is None:
        return None
    if isinstance(spec, ClassifierSpec):
        return spec.mean, spec.std
    return spec.trained_pixels()


def load_backbone(
    path: str | os.PathLike[str],
    encoder: str | EncoderSpec | None = None,
    *,
    prefix: str | None = None,
    allow: Sequence[str] = (),
) -> nn.Module:
    """The dense timm encoder of a folder of ``hgkd export`` or of a weight file, in eval mode, for ``forward_features``.

    Its input is normalised with ``model.pretrained_cfg['mean']`` and ``['std']``. Every weight must be there, with the right
    shape, and none may be left over.

    Args:
        path: a folder written with ``--to timm`` or ``sparse``; a checkpoint of hgkd; or a file of another project, in any of
            the styles of :mod:`hgkd.weights.cnn_names`.
        encoder: timm's name (or a full description) of the network in a file of others. Files and folders of hgkd say it
            themselves.
        prefix, allow: see :func:`import_weights`; for files of others.

    Raises:
        FileNotFoundError: no such file or folder, or a file of it is missing.
        WeightsError: damaged, of an unknown style, or not fitting.
        ValueError: a file of others without ``encoder``, or an unknown name.
    """
    return read_source(path, encoder, prefix=prefix, allow=allow).network


def read_source(
    path: str | os.PathLike[str],
    encoder: str | EncoderSpec | None = None,
    *,
    prefix: str | None = None,
    allow: Sequence[str] = (),
) -> Source:
    """Read a backbone as :func:`load_backbone` does, with its origin; arguments and errors are the same."""
    if encoder is None:
        found = Path(path).expanduser()
        if not found.exists() and not found.suffix:
            read_spec(found)  # says that a folder was expected
        if not found.is_dir():
            _require_run(found)
        file = identify(path)
        if file.path.is_dir():
            return _read(file, read_spec(file), None, ())
        student = read_student(file)
        return Source(file.path, student.spec, student.build(), student.student, student.meta, student.metrics)
    file = identify(path)
    if isinstance(encoder, EncoderSpec):
        return _read(file, encoder, prefix, allow)
    pixels = file.spec.pixels if isinstance(file.spec, EncoderSpec) else None  # a name alone does not say them
    return _read(file, EncoderSpec(encoder, pixels=pixels), prefix, allow)


def _read(file: WeightFile, spec: EncoderSpec, prefix: str | None, allow: Sequence[str]) -> Source:
    network = build_backbone(spec)
    report = import_weights(network, file, prefix=prefix, allow=allow)
    return Source(Path(file.source), spec, network, read_as=str(report))


_OTHERWISE = "name the network of a file of others, e.g. encoder='resnet50' (--encoder)"


@dataclass
class StudentCheckpoint:
    """A checkpoint of hgkd's runner.

    Attributes:
        path: the file.
        spec: the encoder's description.
        state: the encoder's weights under the keys of the timm model.
        student: all of the student's weights, under the keys of ``SparseUNet``.
        meta: ``checkpoint['meta']``.
        metrics: results that the checkpoint carries, may be empty.
    """

    path: Path
    spec: EncoderSpec
    state: dict[str, Tensor]
    student: dict[str, Tensor]
    meta: dict[str, Any]
    metrics: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The dense encoder with the checkpoint's weights, in eval mode.

        Raises:
            WeightsError: a weight is missing, left over or of another shape.
        """
        encoder = build_backbone(self.spec)
        load_strict(encoder, self.state, source=str(self.path))
        return encoder


@dataclass(frozen=True)
class Source:
    """Source of an export: a dense encoder with its weights, and all that is known of its origin.

    Attributes:
        path: the file.
        spec: the encoder's description.
        network: the dense encoder in eval mode.
        student: weights of the whole student; empty when the file holds an encoder alone.
        meta: what the training run wrote into the checkpoint; empty for files of others.
        metrics: results of the run; empty when unknown.
        read_as: how a file without a run was read: key style, what was loaded, what was left aside.
        classes: of a classifier, in the order of its logits; empty when unknown.
    """

    path: Path
    spec: EncoderSpec
    network: nn.Module
    student: Mapping[str, Tensor] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    read_as: str = ""
    classes: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """The encoder's description."""
        return self.spec.to_dict()


def _require_run(path: Path) -> None:
    if not path.exists():
        raise MissingFileError("checkpoint-missing", f"checkpoint {path} does not exist; {EXPECTED_RUN}")


def read_student(path: str | os.PathLike[str], *, otherwise: str = _OTHERWISE) -> StudentCheckpoint:
    """Read a checkpoint of hgkd's runner, without running code that the file may hold.

    Args:
        otherwise: how the caller's user reads a file of others, for the message.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: the file is damaged, or holds no student of ours.
    """
    _require_run(Path(path).expanduser())
    file = identify(path)
    if file.path.is_dir():
        raise WeightsError("checkpoint-is-a-folder", f"{path} is a folder; {EXPECTED_RUN}")
    path, meta = file.path, file.meta
    checkpoint: Mapping[str, Any] = file.content if isinstance(file.content, Mapping) else {}
    weights = checkpoint.get("state_dict")
    if file.kind in MASKED_AUTOENCODERS:
        raise WeightsError(
            "mae-where-student-needed",
            f"{path} holds a masked autoencoder and no CNN student; hgkd evaluate --backbone {path} takes it",
        )
    if "hgkd" not in meta or not isinstance(weights, Mapping):
        raise WeightsError(
            "checkpoint-not-of-hgkd",
            f"{path} is not a checkpoint of hgkd: it lacks meta['hgkd'] or state_dict ({file.about}); {EXPECTED_RUN}, or "
            f"{otherwise}",
        )
    if file.kind is Kind.CLASSIFIER:  # fine-tuned: the network without its head
        classifier = cast(ClassifierSpec, file.spec)
        if is_vit(classifier.name):
            raise WeightsError(
                "vit-where-cnn-needed",
                f"{path} holds a fine-tuned ViT ({classifier.name}), expected a CNN; a ViT stays with hgkd: hgkd evaluate "
                f"--backbone {path}, hgkd.networks.load_classifier, and further fine-tuning with student={classifier.name} "
                f"backbone={path}",
            )
        spec = EncoderSpec(classifier.name, classifier.stem, dict(classifier.kwargs)).without_head()
        encoder = build_backbone(spec)
        entries = network_state(checkpoint, str(path))
        inside = {key: value for key, value in entries.items() if not key.startswith(head_names(encoder))}
        pixels = (classifier.mean, classifier.std)
        noted = pixel_statistics(encoder) if channels_of(encoder) == len(pixels[0]) == 3 else None
        spec = replace(spec, pixels=None if pixels == noted else pixels)
        return StudentCheckpoint(path, spec, inside, {}, dict(meta), run_metrics(checkpoint))
    spec = EncoderSpec.parse(meta["hgkd"], str(path))
    state = {k.removeprefix(ENCODER_PREFIX): v for k, v in weights.items() if k.startswith(ENCODER_PREFIX)}
    if not state:
        examples = ", ".join(list(weights)[:3]) or "none at all"
        raise WeightsError(
            "student-weights-missing", f"{path} holds no weights named {ENCODER_PREFIX}*; its weights are called {examples}"
        )
    student = {k.removeprefix(STUDENT_PREFIX): v for k, v in weights.items() if k.startswith(STUDENT_PREFIX)}
    return StudentCheckpoint(path, spec, state, student, dict(meta), run_metrics(checkpoint))
