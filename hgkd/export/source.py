"""The student inside a checkpoint: the description of its encoder, its weights, and where it comes from."""

from __future__ import annotations

import ast
import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor, nn

from hgkd.errors import WeightsError

FORMAT = 1
STUDENT_PREFIX, ENCODER_PREFIX = "student.", "student.encoder."
_TIMINGS = ("val/time", "val/data_time")  # mmengine's, of no interest after the run
_EXPECTED = "expected a .pth file that hgkd train wrote while distilling a student"
_OTHERWISE = "name the network of a file of others, e.g. encoder='resnet50' (--encoder)"


@dataclass(frozen=True)
class EncoderSpec:
    """What ``hgkd.students.build_encoder`` needs to make a student's dense encoder.

    Attributes:
        name: timm model name.
        stem: 'default', or 'cifar' for a 3x3 stride-1 stem without pooling.
        kwargs: further timm arguments.
        pixels: mean and deviation of the pixels in [0, 1], RGB, where they are not those that timm notes for the name.
    """

    name: str
    stem: str = "default"
    kwargs: dict[str, Any] = field(default_factory=dict)
    pixels: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    @classmethod
    def parse(cls, hgkd: object, source: str) -> EncoderSpec:
        """Read the ``hgkd`` section of a checkpoint or an export; ``source`` names the file in messages.

        Raises:
            WeightsError: not such a section, or one of a newer format.
        """
        encoder = hgkd.get("encoder") if isinstance(hgkd, Mapping) else None
        if not isinstance(hgkd, Mapping) or not isinstance(encoder, Mapping) or "name" not in encoder:
            raise WeightsError(f"{source} does not say which encoder it holds; {_EXPECTED}, or a folder of hgkd export")
        if hgkd.get("format") != FORMAT:
            raise WeightsError(
                f"{source} has format {hgkd.get('format')!r}, this version of hgkd reads format {FORMAT}; "
                "use the version of hgkd that wrote it"
            )
        unknown = sorted(set(encoder) - {"name", "stem", "kwargs", "pixels"})
        if unknown:
            raise WeightsError(f"{source} describes its encoder with unknown keys {unknown}; known: name, stem, kwargs, pixels")
        mean, deviation = encoder.get("pixels") or ((), ())
        pixels = (tuple(mean), tuple(deviation)) if mean else None
        return cls(str(encoder["name"]), str(encoder.get("stem") or "default"), dict(encoder.get("kwargs") or {}), pixels)

    def to_dict(self) -> dict[str, Any]:
        pixels = {} if self.pixels is None else {"pixels": [list(values) for values in self.pixels]}
        return {"name": self.name, "stem": self.stem, "kwargs": dict(self.kwargs), **pixels}

    def to_student(self) -> dict[str, Any]:
        """The same as arguments of ``SparseUNet``."""
        return {"encoder": self.name, "stem": self.stem, "encoder_kwargs": dict(self.kwargs)}

    def build(self) -> nn.Module:
        """The dense timm model with random weights, in eval mode."""
        from hgkd.students import build_encoder

        network: Any = build_encoder(self.name, stem=self.stem, **self.kwargs).eval()
        if self.pixels is not None:
            network.pretrained_cfg = {**network.pretrained_cfg, "mean": self.pixels[0], "std": self.pixels[1]}
        return cast(nn.Module, network)


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
        from hgkd.engine.weights import load_strict

        encoder = self.spec.build()
        load_strict(encoder, self.state, source=str(self.path))
        return encoder


class Origin(Protocol):
    """What a run card asks of anything that is exported."""

    @property
    def path(self) -> Path: ...
    @property
    def meta(self) -> Mapping[str, Any]: ...
    @property
    def metrics(self) -> Mapping[str, Any]: ...
    def describe(self) -> dict[str, Any]:
        """The network, as plain values; ``name`` is among them."""


@dataclass(frozen=True)
class Source:
    """What is exported: a dense encoder with its weights, and all that is known of its origin.

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


def read_student(path: str | os.PathLike[str], *, otherwise: str = _OTHERWISE) -> StudentCheckpoint:
    """Read a checkpoint of hgkd's runner, without running code that the file may hold.

    Args:
        otherwise: how the caller's user reads a file of others, for the message.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: the file is damaged, or holds no student of ours.
    """
    from hgkd.classifiers.network import ClassifierSpec, ImageClassifier, network_state
    from hgkd.engine.weights import read_checkpoint
    from hgkd.students.encoder import pixel_statistics

    path = Path(path).expanduser()
    if path.is_dir():
        raise WeightsError(f"{path} is a folder; {_EXPECTED}")
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist; {_EXPECTED}")
    found = read_checkpoint(path)
    checkpoint: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    meta, weights = checkpoint.get("meta"), checkpoint.get("state_dict")
    if not isinstance(meta, Mapping) or "hgkd" not in meta or not isinstance(weights, Mapping):
        raise WeightsError(
            f"{path} is not a checkpoint of hgkd: it lacks meta['hgkd'] or state_dict; {_EXPECTED}, or {otherwise}"
        )
    if isinstance(meta["hgkd"], Mapping) and "mae" in meta["hgkd"]:
        raise WeightsError(f"{path} holds a masked autoencoder and no student; hgkd evaluate takes it as mae:{path}")
    classifier = ClassifierSpec.parse(meta)
    if classifier is not None:  # fine-tuned: the network without its head
        model = ImageClassifier.from_spec(classifier)
        encoder = network_state(checkpoint, str(path))
        inside = {key: value for key, value in encoder.items() if not key.startswith(model.head_names())}
        pixels = (classifier.mean, classifier.deviation)
        noted = pixel_statistics(model.network)
        spec = EncoderSpec(classifier.name, classifier.stem, dict(classifier.kwargs), None if pixels == noted else pixels)
        return StudentCheckpoint(path, spec, inside, {}, dict(meta), run_metrics(checkpoint))
    spec = EncoderSpec.parse(meta["hgkd"], str(path))
    state = {k.removeprefix(ENCODER_PREFIX): v for k, v in weights.items() if k.startswith(ENCODER_PREFIX)}
    if not state:
        examples = ", ".join(list(weights)[:3]) or "none at all"
        raise WeightsError(f"{path} holds no weights named {ENCODER_PREFIX}*; its weights are called {examples}")
    student = {k.removeprefix(STUDENT_PREFIX): v for k, v in weights.items() if k.startswith(STUDENT_PREFIX)}
    return StudentCheckpoint(path, spec, state, student, dict(meta), run_metrics(checkpoint))


def run_metrics(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The last validation results before the file was written, as mmengine's message hub keeps them: name -> number."""
    hub = checkpoint.get("message_hub")
    scalars = hub.get("log_scalars") if isinstance(hub, Mapping) else None
    if not isinstance(scalars, Mapping):
        return {}
    found = {}
    for name, history in scalars.items():
        # a reader that refuses foreign classes may have left a plain placeholder
        if str(name).startswith("val/") and name not in _TIMINGS and callable(getattr(history, "current", None)):
            found[str(name).removeprefix("val/")] = float(history.current())
    return found


def literal_config(text: object) -> dict[str, Any]:
    """The plain values of a config that mmengine wrote into a checkpoint, read without running it.

    Args:
        text: ``checkpoint['meta']['cfg']``: assignments of constants, lists, tuples and ``dict(...)``.

    Returns:
        name -> value; whatever is no plain value is left out, and no config at all gives an empty dict.
    """
    try:
        tree = ast.parse(text) if isinstance(text, str) else ast.parse("")
    except SyntaxError:
        return {}
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            with contextlib.suppress(ValueError):
                found[node.targets[0].id] = _literal(node.value)
    return found


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {str(keyword.arg): _literal(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.List):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_literal(item) for item in node.elts)
    if isinstance(node, ast.Dict) and None not in node.keys:
        return {_literal(key): _literal(value) for key, value in zip(node.keys, node.values, strict=True) if key is not None}
    return ast.literal_eval(node)
