"""Description of a run in its checkpoint: network, config, results."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from timm.models import get_pretrained_cfg
from torch import Tensor

from hgkd.errors import WeightsError
from hgkd.pixels import IMAGENET_MEAN, IMAGENET_STD, PixelStatistics, pixels_noted
from hgkd.weights.files import tensors_of

FORMAT = 1  # of what checkpoints, exports and MAE files say about themselves
STUDENT_PREFIX, ENCODER_PREFIX = "student.", "student.encoder."
SCORED_STEP = "scored_step"  # in the message hub: steps that were done when the scores in it were measured
_TIMINGS = ("val/time", "val/data_time")  # mmengine's, of no interest after the run
EXPECTED_RUN = "expected a .pth file that hgkd train wrote while distilling a student"


def check_format(found: object, source: str) -> None:
    """Refuse a file of another version; ``source`` names it in the message.

    Args:
        found: the number that the file notes with its description.

    Raises:
        WeightsError: it is not ``FORMAT``.
    """
    if found != FORMAT:
        raise WeightsError(
            "checkpoint-format",
            f"{source} has format {found!r}, this version of hgkd reads format {FORMAT}; use the version of hgkd that wrote it",
        )


@dataclass(frozen=True)
class EncoderSpec:
    """Arguments of ``hgkd.networks.build_encoder`` for a student's dense encoder.

    Attributes:
        name: timm model name, or one of another library (``mmdet.CSPNeXt``) or of the user.
        stem: 'default', or 'cifar' for a 3x3 stride-1 stem without pooling.
        kwargs: further arguments of the network.
        pixels: mean and std of the pixels in [0, 1], a number a channel, where they are not those that timm notes for
            the name.
    """

    name: str
    stem: str = "default"
    kwargs: dict[str, Any] = field(default_factory=dict)
    pixels: PixelStatistics | None = None

    @classmethod
    def parse(cls, hgkd: object, source: str) -> EncoderSpec:
        """Read the ``hgkd`` section of a checkpoint or an export; ``source`` names the file in messages.

        Raises:
            WeightsError: not such a section, or one of a newer format.
        """
        encoder = hgkd.get("encoder") if isinstance(hgkd, Mapping) else None
        if not isinstance(hgkd, Mapping) or not isinstance(encoder, Mapping) or "name" not in encoder:
            raise WeightsError(
                "encoder-not-described",
                f"{source} does not say which encoder it holds; {EXPECTED_RUN}, or a folder of hgkd export",
            )
        check_format(hgkd.get("format"), source)
        unknown = sorted(set(encoder) - {"name", "stem", "kwargs", "pixels"})
        if unknown:
            raise WeightsError(
                "encoder-keys-unknown",
                f"{source} describes its encoder with unknown keys {unknown}; known: name, stem, kwargs, pixels",
            )
        mean, std = encoder.get("pixels") or ((), ())
        pixels = (tuple(mean), tuple(std)) if mean else None
        return cls(str(encoder["name"]), str(encoder.get("stem") or "default"), dict(encoder.get("kwargs") or {}), pixels)

    def trained_pixels(self) -> PixelStatistics:
        """Mean and std of the pixels that the network was trained with."""
        known = get_pretrained_cfg(self.name, allow_unregistered=True)
        return self.pixels or ((IMAGENET_MEAN, IMAGENET_STD) if known is None else (known.mean, known.std))

    def without_head(self) -> EncoderSpec:
        """The encoder of a classifier that this describes: how its head pools is none of the encoder's arguments."""
        return replace(self, kwargs={key: value for key, value in self.kwargs.items() if key != "global_pool"})

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a checkpoint: ``name``, ``stem``, ``kwargs``, and ``pixels`` where they are not timm's own."""
        pixels = {} if self.pixels is None else {"pixels": [list(values) for values in self.pixels]}
        return {"name": self.name, "stem": self.stem, "kwargs": dict(self.kwargs), **pixels}

    def to_student(self) -> dict[str, Any]:
        """Arguments of ``SparseUNet`` for this encoder."""
        pixels = {} if self.pixels is None else {"normalize": [list(values) for values in self.pixels]}
        return {"encoder": self.name, "stem": self.stem, "encoder_kwargs": dict(self.kwargs), **pixels}


def run_metrics(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Results of the validation of a checkpoint's weights, as mmengine's message hub keeps them: name -> number.

    Most checkpoints are written before the validation of their epoch, when the hub holds the scores of an earlier one: empty
    then. Files of before 0.2.0 do not say; of them the last scores are taken.
    """
    hub, meta = checkpoint.get("message_hub"), checkpoint.get("meta")
    if not isinstance(hub, Mapping) or not isinstance(scalars := hub.get("log_scalars"), Mapping):
        return {}
    scored = (hub.get("runtime_info") or {}).get(SCORED_STEP)
    if scored is not None and isinstance(meta, Mapping) and scored != meta.get("iter"):
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


def _literal(node: ast.expr) -> object:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict" and not node.args:
        return {str(keyword.arg): _literal(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.List):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_literal(item) for item in node.elts)
    if isinstance(node, ast.Dict) and None not in node.keys:
        return {_literal(key): _literal(value) for key, value in zip(node.keys, node.values, strict=True) if key is not None}
    return ast.literal_eval(node)


NETWORK_PREFIX = "classifier.network."


@dataclass(frozen=True)
class ClassifierSpec:
    """Description that rebuilds a classifier without its weights; ``meta['hgkd']['classifier']`` of its checkpoint.

    Attributes:
        name: timm's.
        num_classes: K.
        image_size: (H, W) that a ViT's positions are for.
        stem: see :func:`hgkd.students.build_encoder`.
        two_heads: see the module's header.
        kwargs: further arguments of ``timm.create_model``.
        mean, std: of the pixels in [0, 1], RGB.
        classes: names, in the order of the logits; empty when unknown.
    """

    name: str
    num_classes: int
    image_size: tuple[int, int]
    stem: str = "default"
    two_heads: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    classes: tuple[str, ...] = ()

    @classmethod
    def parse(cls, meta: object) -> ClassifierSpec | None:
        """The spec in ``checkpoint['meta']``; None when the checkpoint is of something else.

        Raises:
            WeightsError: written by a newer version.
        """
        hgkd = meta.get("hgkd") if isinstance(meta, Mapping) else None
        found = hgkd.get("classifier") if isinstance(hgkd, Mapping) else None
        if not isinstance(hgkd, Mapping) or not isinstance(found, Mapping):
            return None
        check_format(hgkd.get("format"), "the checkpoint of a classifier")
        found = pixels_noted(found)
        sequences = {key: tuple(found[key]) for key in ("image_size", "mean", "std", "classes")}
        return cls(**{**found, **sequences})

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a checkpoint: every attribute by its name."""
        return asdict(self)


def network_state(content: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The timm network's entries, head included, of a checkpoint of fine-tuning.

    Raises:
        WeightsError: there are none.
    """
    weights = tensors_of(content, source=source)
    state = {key.removeprefix(NETWORK_PREFIX): value for key, value in weights.items() if key.startswith(NETWORK_PREFIX)}
    if not state:
        raise WeightsError(
            "network-weights-missing",
            f"{source} holds no weights named {NETWORK_PREFIX}*; its weights are called {list(weights)[:3]}",
        )
    return state
