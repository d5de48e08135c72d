"""``identify``: the one answer to "what is this file?", with the file's content, which is read once.

Every command that takes a weight file asks here first and hands the answer on instead of the path, so that a user never has to
say what a file is. The kind says what can be done with a file; ``naming`` says whose names its weights have (the tables are in
:mod:`hgkd.weights.cnn_names` and :mod:`hgkd.weights.vit_names`).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from hgkd.errors import InvalidValueError, WeightsError
from hgkd.weights.cnn_names import find_cnn
from hgkd.weights.export_folder import CONFIG_FILE, WEIGHTS_FILE, check_files, read_card, read_config, read_spec
from hgkd.weights.files import average_entry, read_checkpoint, read_metadata, tensors_of
from hgkd.weights.run_file import STUDENT_PREFIX, ClassifierSpec, EncoderSpec
from hgkd.weights.run_folder import last_intact
from hgkd.weights.vit_names import family_of, find_naming, looks_like

MAE_SIZES, MAE_PIXELS = "hgkd_mae", "hgkd_mae_pixels"  # entries of a MAE file's metadata, see hgkd.networks.mae.save_mae
SPARSE = "hgkd_sparse"  # see hgkd.sparse.save_sparse
_MODEL_PARTS = re.compile(
    r"^(?:module\.)?(?:student\.)?(?:neck|rpn_head|roi_head|bbox_head|mask_head|decode_head|auxiliary_head)\."
)
_SPARK = ("mask_tokens.", "sparse_encoder.")


class Kind(str, Enum):
    """Kind of a weight file; the value says it in words."""

    STUDENT = "CNN student of an hgkd run"
    VIT_STUDENT = "ViT student of an hgkd run"
    MAE_RUN = "MAE of an hgkd run"
    CLASSIFIER = "fine-tuned classifier of an hgkd run"
    DISTILLED_MODEL = "distilled detector or segmentor with its training's other parts"
    MODEL = "detector or segmentor (mmdet, mmseg)"
    EXPORT = "folder of hgkd export"
    SPARSE = "sparse network of hgkd.sparse"
    MAE = "MAE"
    MAE_ENCODER = "encoder of a MAE"
    SPARK = "SparK pretraining"
    CNN = "CNN of another project"
    VIT = "ViT of another project"
    NETWORK = "network of another project"
    UNKNOWN = "unknown"

    def __str__(self) -> str:
        return self.value


RUNS = (Kind.STUDENT, Kind.VIT_STUDENT, Kind.MAE_RUN, Kind.CLASSIFIER)
MASKED_AUTOENCODERS = (Kind.VIT_STUDENT, Kind.MAE_RUN, Kind.MAE, Kind.MAE_ENCODER)


@dataclass(frozen=True, eq=False)
class WeightFile(os.PathLike[str]):
    """A file or an export folder, what it is, and its content. Use it wherever a path is taken.

    Attributes:
        path: of the file (of a work folder: its last checkpoint), or of the export folder.
        kind: what it is.
        naming: whose names the weights have, e.g. 'timm', 'torchvision ConvNeXt', 'Hugging Face ViT'; '' for files of hgkd.
        detail: what else is known, in words; may be empty.
        prefix: what stands before the network's names.
        card: of an export: ``target`` and ``part``; else empty.
        entry: the set of weights that was judged; None: the usual one.
    """

    path: Path
    kind: Kind
    naming: str = ""
    detail: str = ""
    prefix: str = ""
    card: Mapping[str, str] = field(default_factory=dict)
    entry: str | None = None
    _content: Any = field(default=None, repr=False)
    _tensors: Mapping[str, Tensor] | None = field(default=None, repr=False)

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def about(self) -> str:
        """Kind, naming and detail in one line."""
        named = f", names of {self.naming}" if self.naming else ""
        return f"{self.kind}{named}" + (f": {self.detail}" if self.detail else "")

    @property
    def source(self) -> str:
        """The file that holds the weights, for messages."""
        return str(self.path / WEIGHTS_FILE if self.kind is Kind.EXPORT else self.path)

    @cached_property
    def content(self) -> Any:
        """Content by :func:`hgkd.weights.files.read_checkpoint`; an export folder's file is read when first asked for.

        Raises:
            WeightsError: a folder of no kind that is known; the message says which of its files to give.
        """
        return read_checkpoint(self.source) if self._content is None else self._content

    @property
    def meta(self) -> Mapping[str, Any]:
        """The runner's notes about the run; empty for other files."""
        return meta_of(self.content)

    @property
    def hgkd(self) -> Mapping[str, Any]:
        """Description of the network by a run of hgkd; empty for other files."""
        return hgkd_of(self.content)

    @cached_property
    def metadata(self) -> Mapping[str, str]:
        """The text metadata of a safetensors file; empty for others."""
        return {} if self.path.is_dir() else read_metadata(self.path)

    @cached_property
    def spec(self) -> EncoderSpec | ClassifierSpec | None:
        """The description of the network in a student's checkpoint, an export or a classifier's checkpoint; else None.

        Raises:
            WeightsError: written by a newer version, or incomplete; an export for another library.
        """
        if self.kind is Kind.EXPORT:
            return read_spec(self.path)
        if self.kind is Kind.CLASSIFIER:
            return ClassifierSpec.parse(self.meta)
        return EncoderSpec.parse(self.hgkd, str(self.path)) if self.kind is Kind.STUDENT else None

    def tensors(self, entry: str | None = None) -> dict[str, Tensor]:
        """The named weights, see :func:`hgkd.weights.files.tensors_of`."""
        if self._tensors is not None and entry in (None, self.entry):
            return dict(self._tensors)
        return tensors_of(self.content, source=self.source, entry=entry)


def meta_of(content: object) -> Mapping[str, Any]:
    """``content['meta']`` of a runner's checkpoint; empty for other contents."""
    meta = content.get("meta") if isinstance(content, Mapping) else None
    return meta if isinstance(meta, Mapping) else {}


def hgkd_of(content: object) -> Mapping[str, Any]:
    """``content['meta']['hgkd']``, the description of a run's network; empty for other contents."""
    hgkd = meta_of(content).get("hgkd")
    return hgkd if isinstance(hgkd, Mapping) else {}


def describe_network(hgkd: object) -> str:
    """The network that ``meta['hgkd']`` of a checkpoint describes, in words."""
    found: Mapping[str, Any] = hgkd if isinstance(hgkd, Mapping) else {}
    if isinstance(found.get("encoder"), Mapping):
        return f"a student {found['encoder'].get('name')!r}"
    if isinstance(found.get("classifier"), Mapping):
        spec = found["classifier"]
        heads = "two heads" if spec.get("two_heads") else "one head"
        return f"a classifier {spec.get('name')!r} of {spec.get('num_classes')} classes with {heads}"
    return "a masked autoencoder" if "mae" in found else "a model that it does not describe"


def identify(path: str | os.PathLike[str], entry: str | None = None) -> WeightFile:
    """Say what a weight file, a run's work folder (its last checkpoint) or a folder of ``hgkd export`` is.

    Args:
        path: the file or folder; a :class:`WeightFile` is returned as it is, without reading anything.
        entry: which set of weights to judge, in a file that holds several; see :func:`hgkd.weights.files.tensors_of`.

    Raises:
        FileNotFoundError: there is no such file or folder.
        WeightsError: damaged, or unsafe to read; see :func:`hgkd.weights.files.read_checkpoint`; of an export, and changed.
    """
    if isinstance(path, WeightFile):
        return path
    found = Path(path).expanduser()
    if not found.is_dir():
        check_files(found.parent, found.name)  # where it lies in an export
        return _file(found, read_checkpoint(found), entry)
    last = last_intact(found)
    return _folder(found) if last is None else _file(*last, entry)


def chosen_entry(checkpoint: str | os.PathLike[str], entry: str | None, ema: bool) -> tuple[WeightFile, str | None]:
    """A file, and the entry of it that was asked for by name or as its moving average.

    Raises:
        ValueError: both were.
        FileNotFoundError, WeightsError: the file is absent or damaged, or holds no average.
    """
    if not ema:
        return identify(checkpoint, entry), entry
    if entry is not None:
        raise InvalidValueError(
            "entry-and-average", f"entry={entry!r} and ema=True both choose a set of weights of {checkpoint}; give one of them"
        )
    file = identify(checkpoint)
    entry = average_entry(file.content, str(file))
    return file, entry


def _folder(path: Path) -> WeightFile:
    card = read_card(path)
    if not card and not (path / CONFIG_FILE).is_file():
        return WeightFile(path, Kind.UNKNOWN, detail="a folder without checkpoints of a run, and no export")
    if not card and not isinstance(read_config(path).get("hgkd"), Mapping):
        return WeightFile(path, Kind.UNKNOWN, detail="a folder of another project; give the weight file in it")
    check_files(path)
    target, part = card.get("target", "timm"), card.get("part", "backbone")
    return WeightFile(path, Kind.EXPORT, detail=f"{part} for {target}", card=card)


def _file(path: Path, content: object, entry: str | None) -> WeightFile:
    hgkd = hgkd_of(content)
    state = content.get("state_dict") if isinstance(content, Mapping) else None
    names = [str(key) for key in state] if isinstance(state, Mapping) else []
    if "hgkd" in meta_of(content):
        return WeightFile(path, _run(hgkd, names), detail=describe_network(hgkd), _content=content)
    if any(_MODEL_PARTS.match(name) for name in names) and not any(name.startswith(_SPARK) for name in names):
        distilled = any(name.startswith(STUDENT_PREFIX) for name in names)
        return WeightFile(path, Kind.DISTILLED_MODEL if distilled else Kind.MODEL, _content=content)
    try:
        weights = tensors_of(content, source=str(path), entry=entry)
    except WeightsError as error:
        return WeightFile(path, Kind.UNKNOWN, detail=str(error), _content=content)
    kind, naming, detail, prefix = _by_names(weights, read_metadata(path))
    return WeightFile(path, kind, naming, detail, prefix, entry=entry, _content=content, _tensors=weights)


def _run(hgkd: Mapping[str, Any], names: list[str]) -> Kind:
    if "mae" in hgkd:
        return Kind.VIT_STUDENT if any(name.startswith(STUDENT_PREFIX) for name in names) else Kind.MAE_RUN
    if "classifier" in hgkd:
        return Kind.CLASSIFIER
    return Kind.STUDENT if "encoder" in hgkd else Kind.UNKNOWN


def _by_names(weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[Kind, str, str, str]:
    """Kind, naming, detail and prefix of plain weights."""
    if MAE_SIZES in metadata:
        sizes = json.loads(metadata[MAE_SIZES])
        decoder = "with its decoder" if sizes.get("decoder_depth", 1) else "the encoder alone"
        return Kind.MAE, "", f"written by hgkd, {decoder}", ""
    if SPARSE in metadata:
        return Kind.SPARSE, "", "", ""
    vit, cnn, other = find_naming(weights), find_cnn(weights), looks_like(weights)
    if vit is not None:
        naming, places = vit
        place = places[0]
        if any(key.endswith("decoder_embed.weight") for key in weights):
            return Kind.MAE, naming.kind, "with its decoder", place
        if other is not None:
            return Kind.NETWORK, naming.kind, f"it looks like {other}", place
        moco = _looks_like_moco(weights, place)
        if moco:
            return Kind.VIT, naming.kind, moco, place
        if _computed_positions(weights, place):
            return Kind.MAE_ENCODER, naming.kind, "positions are computed, as MAE's are", place
        return Kind.VIT, naming.kind, _with_places(family_of(weights), places), place
    if cnn is not None:
        style, places, network = cnn
        spark = any(key.startswith(_SPARK) for key in weights)
        return Kind.SPARK if spark else Kind.CNN, style.name, _with_places(network, places), places[0]
    if other is not None:
        return Kind.NETWORK, "", f"it looks like {other}", ""
    return Kind.UNKNOWN, "", f"its first names are {', '.join(list(weights)[:3])}", ""


def _with_places(detail: str, places: list[str]) -> str:
    """What is known of a network, and where it stands in a file that does not say which one is meant."""
    several = f"{len(places)} of them, under {', '.join(map(repr, places))}" if len(places) > 1 else ""
    return ": ".join(filter(None, (detail, several)))


def _computed_positions(weights: Mapping[str, Tensor], place: str) -> bool:
    """Whether a ViT's positions are MAE's sine and cosine table.

    The class token's are 0 there, and the first patch's are sin(0) = 0 and cos(0) = 1; learned ones never are.
    """
    found = next((weights.get(place + name) for name in ("pos_embed", "embeddings.position_embeddings")), None)
    if found is None or found.ndim != 3 or found.shape[1] < 2:
        return False
    quarters = found[0, 1].float().chunk(4)
    waves = all(bool((part - value).abs().max() < 1e-3) for part, value in zip(quarters, (0, 1, 0, 1), strict=False))
    return waves and bool(found[0, 0].abs().max() < 1e-3)


def _looks_like_moco(weights: Mapping[str, Tensor], place: str) -> str:
    """Words when a ViT with computed positions is MoCo v3's and no MAE; '' otherwise.

    MoCo v3 (arXiv 2104.02057) never trains its projection of patches: the bias stays 0, and the weights fill evenly what Glorot
    and Bengio's bound allows. MAE trains both.
    """
    weight, bias = (weights.get(f"{place}patch_embed.proj.{part}") for part in ("weight", "bias"))
    if not _computed_positions(weights, place) or weight is None or bias is None or weight.ndim != 4 or bool(bias.any()):
        return ""
    bound = math.sqrt(6.0 / (weight[0].numel() + weight.shape[0]))
    values = weight.float()
    even = abs(float(values.std()) * math.sqrt(3.0) / bound - 1.0) < 0.02 and float(values.abs().max()) <= 1.001 * bound
    return "MoCo v3 (computed positions, and a projection of patches that was never trained)" if even else ""
