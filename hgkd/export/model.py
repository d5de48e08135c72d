"""``--part model``: the whole network of a checkpoint that mmengine's runner wrote, without what only its training needed.

For detectors, segmentors and any other model of mmengine: ``model.pth`` (mmengine's layout, for ``load_checkpoint`` and
``init_model``) and ``model.safetensors``, both under the model's own names. Of a distillation the student alone is kept, its
names without ``student.``; teacher, objectives, optimiser, schedule and log stay behind.

The proof: both files are read back and compared bit for bit; where the library imports and the checkpoint describes its model
as plain values, the library's own model takes the weights strictly.

As a graph (ONNX, OpenVINO) a detector or segmentor leaves with its post-processing, by what is registered for the target in
``hgkd.registry.MODEL_WRITERS``; see :mod:`hgkd.openmmlab.deployment`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pprint import pformat
from typing import Any

import torch
from mmengine.config import Config
from mmengine.runner.checkpoint import load_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from hgkd.errors import InvalidValueError, WeightsError
from hgkd.export.card import run_card, write_cards
from hgkd.export.folder import new_folder
from hgkd.export.job import ExportError, ExportReport, Target, optional, options_of
from hgkd.export.measure import measured
from hgkd.registry import MODEL_WRITERS
from hgkd.weights.export_folder import WEIGHTS_FILE
from hgkd.weights.files import read_checkpoint
from hgkd.weights.identify import meta_of
from hgkd.weights.loading import check_finite
from hgkd.weights.run_file import literal_config, run_metrics
from hgkd.weights.run_folder import checkpoint_file
from hgkd.weights.signature import Signature

MODEL_FILE, MODEL_CONFIG = "model.pth", "model_config.py"
LIBRARIES = ("mmdet", "mmseg", "mmpretrain")
_STUDENT = "student."
# parts of a model that only its training needs, by the first part of the name
_TRAINING_ONLY = ("teacher", "objectives", "generators", "second_head", "losses", "loss", "connectors")


@dataclass(frozen=True)
class ModelSource:
    """A whole model out of a checkpoint.

    Attributes:
        path: the file.
        state: its weights under its own names.
        config: what builds it; empty when the checkpoint does not say, or not in plain values.
        aside: number of the checkpoint's weights that were left out, by the first part of the name.
        meta, metrics: as in :class:`hgkd.networks.backbones.Source`.
    """

    path: Path
    state: dict[str, Tensor]
    config: dict[str, Any]
    aside: Mapping[str, int]
    meta: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """The model's registered name."""
        return {"name": str(self.config.get("type", "unknown: the checkpoint does not describe its model in plain values"))}


@dataclass(frozen=True)
class ModelJob:
    """One export of a whole model, as its writer sees it.

    Attributes:
        source: the model.
        folder: where to write; it becomes ``out`` when the proof has passed.
        out: the folder that the user asked for, for messages.
        images: folder of pictures for the proof, or None when none was given.
        max_images: how many of them at most.
    """

    source: ModelSource
    folder: Path
    out: Path
    images: Path | None = None
    max_images: int = 64


@dataclass(frozen=True)
class WrittenModel:
    """What a writer wrote and proved; attributes as in :class:`hgkd.export.job.ExportReport`."""

    load_with: str
    proven_with: str
    tensors: int
    parameters: int
    max_difference: float = 0.0
    images: int = 0
    notes: list[str] = field(default_factory=list)
    table: list[dict[str, Any]] = field(default_factory=list)
    signature: Signature | None = None


def model_options(to: str) -> tuple[str, ...]:
    """Names of the options with which a whole model leaves for a target."""
    return () if to in LIBRARIES else options_of(_graph_writer(to))


def _graph_writer(to: str) -> Callable[..., WrittenModel]:
    found: Callable[..., WrittenModel] | None = MODEL_WRITERS.get(to)
    if found is None:  # a target of the user's own that says that it holds whole models
        raise InvalidValueError(
            "model-writer-missing",
            f"no function in hgkd.registry.MODEL_WRITERS writes whole models for {to!r}",
        )
    return found


def read_model(path: str | os.PathLike[str]) -> ModelSource:
    """Read a checkpoint of mmengine's runner, without running code that the file may hold.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: damaged, no checkpoint of a runner, of hgkd's own pretraining or classification, or nothing but parts of
            a training.
    """
    path = checkpoint_file(path)
    checkpoint = read_checkpoint(path)
    meta = meta_of(checkpoint)
    weights = checkpoint.get("state_dict") if isinstance(checkpoint, Mapping) else None
    if not isinstance(weights, Mapping) or not isinstance(checkpoint.get("meta"), Mapping):
        raise WeightsError(
            "checkpoint-not-of-mmengine", f"{path} is no checkpoint of mmengine's runner: it lacks 'state_dict' or 'meta'"
        )
    _refuse_own(path, meta.get("hgkd"))
    config = dict(literal_config(meta.get("cfg")).get("model") or {})
    state = {key.removeprefix(_STUDENT): value for key, value in weights.items() if key.startswith(_STUDENT)}
    if state:
        left = [key for key in weights if not key.startswith(_STUDENT)]
        student = config.get("student")
        config = dict(student) if isinstance(student, Mapping) else {}
    else:
        left = [key for key in weights if key.partition(".")[0] in _TRAINING_ONLY]
        state = {key: value for key, value in weights.items() if key not in set(left)}
    if not state:
        raise WeightsError(
            "checkpoint-of-training-parts",
            f"{path} holds nothing but parts of a training ({', '.join(sorted({k.partition('.')[0] for k in left}))})",
        )
    aside = Counter(key.partition(".")[0] for key in left)
    return ModelSource(path, state, config, aside, dict(meta), run_metrics(checkpoint))


def _refuse_own(path: Path, described: object) -> None:
    """Raise WeightsError for networks that hgkd describes in ``meta['hgkd']``: no model of another library."""
    if not isinstance(described, Mapping):
        return
    if "encoder" in described:
        way = "a student of pretraining; --part backbone exports its encoder for mmdet, mmseg or mmpretrain"
    elif "classifier" in described:
        way = "a classifier of hgkd; --part classifier exports it with its head, --part backbone without"
    else:
        way = f"a masked autoencoder of hgkd, which is a teacher: model.teacher.checkpoint={path}"
    raise WeightsError("model-of-another-kind", f"{path} holds no model of mmdet, mmseg or mmpretrain but {way}")


def _refuse_other_library(path: Path, cfg: Mapping[str, Any], library: str) -> None:
    """Raise ValueError when a run's config says that its model is another library's."""
    scope = cfg.get("default_scope")
    if scope in LIBRARIES and scope != library:
        raise InvalidValueError(
            "trained-with-another-library", f"{path} was trained with {scope}, not {library}; use --to {scope}"
        )


def export_model(
    checkpoint: str | os.PathLike[str],
    out: Path,
    target: Target,
    licences: Mapping[str, str],
    images: str | os.PathLike[str] | None = None,
    max_images: int = 64,
    latency: int | None = None,
    **options: object,
) -> ExportReport:
    """Write a whole model, read it back, and only then let the folder appear.

    Args:
        checkpoint: see :func:`read_model`; of a work folder the last one.
        out: folder to make, checked before.
        target: 'mmdet', 'mmseg' or 'mmpretrain', whose model it is, or a graph's.
        licences, images, max_images, latency: see :func:`hgkd.export.export`; graphs alone take the last three.
        options: of the target's writer.

    Raises:
        FileNotFoundError, WeightsError: see :func:`read_model`; or the weights are not finite.
        ValueError: the model is another library's, or has a part that the target lacks.
        ExportError: what was read back differs, or the library's own model does not take it.
    """
    to, source = target.name, read_model(checkpoint)
    check_finite(source.path, source.state)
    with new_folder(out) as work:
        job = ModelJob(source, work, out, None if images is None else Path(images).expanduser(), max_images)
        written = _write_weights(job, to) if to in LIBRARIES else _graph_writer(to)(job, **options)
        table = written.table
        if latency is not None and written.signature is not None:
            table = measured(target, work, table, written.signature.input, latency)
        usage = written.load_with.replace(str(out), "PATH/OF/THIS/FOLDER")  # no paths of this machine in public
        facts: dict[str, Any] = {"target": to, "part": "model", "load_with": usage, "proven_with": written.proven_with}
        facts |= {"max_difference": written.max_difference, "real_images": written.images, "table": table}
        left = ", ".join(f"{count} of {name}" for name, count in source.aside.items())
        notes = [*([f"left behind, as only the training needs it: {left}"] if left else []), *written.notes]
        card = run_card(source, facts, work, licences, notes)
        if written.signature is not None:
            card["signature"] = written.signature.to_dict()
        write_cards(card, work)
        return ExportReport(
            out=out,
            target=to,
            part="model",
            network=source.describe(),
            tensors=written.tensors,
            parameters=written.parameters,
            loaded_with=written.load_with,
            proven_with=written.proven_with,
            max_difference=written.max_difference,
            images=written.images,
            source_sha256=card["source"]["sha256"],
            files={name: entry["bytes"] for name, entry in card["files"].items()},
            notes=notes,
            table=table,
            signature=written.signature,
        )


def _write_weights(job: ModelJob, library: str) -> WrittenModel:
    """The weights alone, for the library whose model it is."""
    source, work, out = job.source, job.folder, job.out
    _refuse_other_library(source.path, literal_config(source.meta.get("cfg")), library)
    state = {key: value.detach().cpu().contiguous().clone() for key, value in source.state.items()}
    named = {key: value for key, value in source.meta.items() if key == "dataset_meta"}  # names of the classes, for inferencers
    torch.save({"meta": named, "state_dict": state}, work / MODEL_FILE)
    save_file(state, work / WEIGHTS_FILE, metadata={"format": "pt"})
    if source.config:
        page = f"default_scope = {library!r}\n{_imports(source)}model = {pformat(source.config, sort_dicts=False)}\n"
        (work / MODEL_CONFIG).write_text(page, encoding="utf-8")
    _same_files(state, work)
    proven_with = f"torch {torch.__version__} and safetensors, bit for bit; " + _prove_in(library, source.config, work)
    load_with = f"mmengine.runner.load_checkpoint(model, '{out / MODEL_FILE}', strict=True)"
    load_with += f"  # model = {library}.registry.MODELS.build(Config.fromfile('{out / MODEL_CONFIG}').model)" * bool(
        source.config
    )
    parameters = sum(value.numel() for key, value in state.items() if value.is_floating_point() and ".running_" not in key)
    return WrittenModel(load_with, proven_with, len(state), parameters)


def _imports(source: ModelSource) -> str:
    """The line by which reading the config imports what registers the model's parts: the run's modules, hgkd's where needed."""
    imported = literal_config(source.meta.get("cfg")).get("custom_imports") or {}
    imported = imported if isinstance(imported, Mapping) else {}
    given = imported.get("imports") or []
    named = [given] if isinstance(given, str) else [str(name) for name in given]
    modules = [name for name in named if name.partition(".")[0] != "hgkd"]
    if _has_own_parts(source.config):  # others are built without hgkd
        modules.append("hgkd.openmmlab")
    allowed = bool(imported.get("allow_failed_imports", False))
    return f"custom_imports = dict(imports={modules!r}, allow_failed_imports={allowed})\n" if modules else ""


def _has_own_parts(part: object) -> bool:
    """Whether a config names a class of hgkd's, such as ``hgkd.TimmBackbone``."""
    if isinstance(part, Mapping):
        return str(part.get("type")).startswith("hgkd.") or any(map(_has_own_parts, part.values()))
    return isinstance(part, (list, tuple)) and any(map(_has_own_parts, part))


def _same_files(state: Mapping[str, Tensor], folder: Path) -> None:
    again = (load_file(folder / WEIGHTS_FILE), read_checkpoint(folder / MODEL_FILE)["state_dict"])
    for found in again:
        if found.keys() != state.keys() or not all(torch.equal(found[key], value) for key, value in state.items()):
            raise ExportError("export-weights-changed", "weights changed on the way to disk and back")


def _prove_in(library: str, config: dict[str, Any], folder: Path) -> str:
    """Let the library's own model take the weights, strictly; what was proven, in words."""
    if not config:
        return "no model was built: the checkpoint does not describe it in plain values"
    registry, version = optional(f"{library}.registry")
    if registry is None:
        return f"no model was built: {version}"
    try:
        model = registry.MODELS.build(Config({"model": {**config, "_scope_": library}}).model)
    except Exception as error:
        # modules of the user's own that are not imported here, files that the config names
        return f"no model was built: {library} cannot ({type(error).__name__}: {error})"
    try:
        load_checkpoint(model, str(folder / MODEL_FILE), map_location="cpu", strict=True)
    except RuntimeError as error:
        raise ExportError(
            "library-refuses-weights", f"{library}'s {config.get('type')} does not take the weights: {error}"
        ) from error
    return f"{version}: its own model takes every weight"
