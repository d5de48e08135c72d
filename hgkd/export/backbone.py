"""Export of a student's encoder as plain dense weights, proven by reading it back.

The folder written for ``to='timm'`` is what timm 1.0.20 and later read as ``timm.create_model('local-dir:FOLDER',
pretrained=True)``: ``model.safetensors`` and a ``config.json`` with the fields of ``timm.models.save_for_hf``
(https://github.com/huggingface/pytorch-image-models, timm/models/_hub.py), plus our own section ``hgkd`` and a
``run_card.json``.

A stem of ours (``stem='cifar'``) is nothing that timm can build from a config. Such a folder carries an architecture
name that timm refuses, rather than one it would build another network for, and is read by :func:`load_backbone` alone.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

import hgkd
from hgkd.errors import WeightsError, unknown_name_message
from hgkd.export.source import FORMAT, EncoderSpec, StudentCheckpoint, file_digest, read_student

TARGETS = ("timm",)
WEIGHTS_FILE, CONFIG_FILE, CARD_FILE = "model.safetensors", "config.json", "run_card.json"
_FILES = {WEIGHTS_FILE, CONFIG_FILE, CARD_FILE}
_TOLERANCE = 1e-5
# Facts of the network itself; names, licences and addresses of timm's own weights are not facts of ours
_KEPT_CFG = (
    "input_size",
    "min_input_size",
    "fixed_input_size",
    "interpolation",
    "crop_pct",
    "crop_mode",
    "mean",
    "std",
    "pool_size",
    "first_conv",
    "classifier",
)


class ExportError(RuntimeError):
    """What was written, read back, is not what went in; nothing was left on disk."""


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote and how it was proven.

    Attributes:
        out: the folder.
        target: e.g. 'timm'.
        encoder: the encoder's description (name, stem, kwargs).
        tensors: number of tensors in ``model.safetensors``.
        parameters: number of trainable values among them.
        loaded_with: the call that reads the folder, and that was used for the proof.
        max_difference: largest difference of ``forward_features`` between source and re-read network, relative to the
            largest source value.
        source_sha256: digest of the checkpoint.
        notes: what a user should know.
    """

    out: Path
    target: str
    encoder: dict[str, Any]
    tensors: int
    parameters: int
    loaded_with: str
    max_difference: float
    source_sha256: str
    notes: list[str] = field(default_factory=list)


def export_backbone(
    checkpoint: str | os.PathLike[str], out: str | os.PathLike[str], to: str = "timm", force: bool = False
) -> ExportReport:
    """Write the encoder of a checkpoint as a folder that others load, after reading it back and comparing outputs.

    Args:
        checkpoint: a .pth file of hgkd's runner.
        out: folder to make. It appears complete or not at all.
        to: target, one of ``TARGETS``.
        force: replace an earlier export. A folder that holds anything else is never replaced.

    Raises:
        ValueError: unknown target, or ``out`` is not an export and would be replaced.
        FileNotFoundError: no such checkpoint.
        FileExistsError: ``out`` exists and ``force`` is not set.
        WeightsError: the checkpoint is damaged, not ours, or its weights do not fit its encoder.
        ExportError: the written folder does not give the source's outputs.
    """
    if to not in TARGETS:
        raise ValueError(unknown_name_message("export target", to, TARGETS))
    out = Path(out).expanduser().absolute()
    _check_free(out, force)
    student = read_student(checkpoint)
    source = student.build()
    _check_finite(student, source)

    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        report = _write(student, source, work, out, to)
        os.chmod(work, 0o777 & ~_umask())  # mkdtemp gives the owner alone access
        _move(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return report


def load_backbone(path: str | os.PathLike[str]) -> nn.Module:
    """The dense timm encoder of an exported folder, in eval mode, ready for ``forward_features``.

    Its input is normalised with ``model.pretrained_cfg['mean']`` and ``['std']``. Every weight must be there, with the
    right shape, and none may be left over.

    Raises:
        FileNotFoundError: no such folder, or a file of it is missing.
        WeightsError: not an export of hgkd, damaged, or not fitting.
    """
    from hgkd.engine.weights import load_strict

    path = Path(path).expanduser()
    model = read_spec(path).build()
    load_strict(model, _read_tensors(path / WEIGHTS_FILE), source=str(path / WEIGHTS_FILE))
    return model


def read_spec(path: str | os.PathLike[str]) -> EncoderSpec:
    """The description of the encoder in an exported folder; raises as :func:`load_backbone` does."""
    path = Path(path).expanduser()
    return EncoderSpec.parse(_read_config(path).get("hgkd"), str(path / CONFIG_FILE))


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise FileNotFoundError(f"export folder {path} does not exist; expected one that tools/export.py wrote")
    file = path / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{path} has no {CONFIG_FILE}; expected a folder that tools/export.py wrote")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{file} is not valid JSON ({error}); export the checkpoint again") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{file} holds a {type(config).__name__}, expected an object; export the checkpoint again")
    return config


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}; export the checkpoint again")
    try:
        return safetensors.torch.load_file(file)
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{file} is damaged ({error}); export the checkpoint again") from error


def _check_free(out: Path, force: bool) -> None:
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise FileExistsError(f"{out} exists and is not a folder; choose another --out")
    names = {entry.name for entry in out.iterdir()}
    if not names:
        return
    if not force:
        raise FileExistsError(f"{out} exists and is not empty; choose another --out, or --force to replace an export")
    if not names <= _FILES:
        raise ValueError(
            f"{out} holds other things than an export ({', '.join(sorted(names - _FILES)[:3])}), "
            "so --force does not replace it; choose another --out"
        )


def _check_finite(student: StudentCheckpoint, source: nn.Module) -> None:
    broken = [name for name, tensor in source.state_dict().items() if not tensor.isfinite().all()]
    if broken:
        raise WeightsError(
            f"{student.path} holds NaN or infinite values in {len(broken)} of its weights, e.g. {broken[0]}; "
            "training has diverged, export an earlier checkpoint"
        )


def _write(student: StudentCheckpoint, source: nn.Module, work: Path, out: Path, target: str) -> ExportReport:
    """Fill ``work``, prove it, and describe it as ``out``."""
    spec = student.spec
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in source.state_dict().items()}
    safetensors.torch.save_file(weights, work / WEIGHTS_FILE, metadata={"format": "pt"})
    config = _config(spec, source)
    _dump(config, work / CONFIG_FILE)

    if spec.stem == "default":
        loaded_with = f"timm.create_model('local-dir:{out}', pretrained=True)"
        again = timm.create_model(f"local-dir:{work}", pretrained=True).eval()
        notes = ["forward_features gives the feature map; calling the model pools it as its architecture does"]
    else:
        loaded_with = f"hgkd.export.load_backbone('{out}')"
        again = load_backbone(work)
        notes = [
            f"timm cannot build the {spec.stem} stem from a config and refuses this folder; read it with "
            "hgkd.export.load_backbone, which loads strictly; the proof was made with it"
        ]
    difference = _prove_equal(source, again)

    report = ExportReport(
        out=out,
        target=target,
        encoder=spec.to_dict(),
        tensors=len(weights),
        parameters=sum(p.numel() for p in source.parameters()),
        loaded_with=loaded_with,
        max_difference=difference,
        source_sha256=file_digest(student.path),
        notes=notes,
    )
    _dump(_run_card(student, report), work / CARD_FILE)
    return report


def _config(spec: EncoderSpec, source: nn.Module) -> dict[str, Any]:
    architecture = spec.name.partition(".")[0]  # what follows the dot names weights of timm's
    known: Mapping[str, Any] = source.pretrained_cfg  # type: ignore[assignment]
    cfg = {key: known[key] for key in _KEPT_CFG if known.get(key) is not None or key == "classifier"}
    return {
        "architecture": architecture if spec.stem == "default" else f"{architecture} with hgkd's {spec.stem} stem",
        "num_classes": 0,
        "num_features": source.num_features,
        "model_args": spec.kwargs,
        "pretrained_cfg": {**cfg, "num_classes": 0, "custom_load": False},
        "hgkd": {"format": FORMAT, "encoder": spec.to_dict()},
    }


def _run_card(student: StudentCheckpoint, report: ExportReport) -> dict[str, Any]:
    meta = student.meta
    return {
        "source": {
            "checkpoint": str(student.path.absolute()),
            "sha256": report.source_sha256,
            "epoch": meta.get("epoch"),
            "iter": meta.get("iter"),
        },
        "encoder": report.encoder,
        "export": {
            "target": report.target,
            "load_with": report.loaded_with,
            "max_difference": report.max_difference,
            "written": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        },
        "versions": {
            "hgkd": hgkd.__version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "python": platform.python_version(),
        },
        "metrics": student.metrics,
        "config": meta.get("cfg"),
    }


def _prove_equal(source: nn.Module, again: nn.Module) -> float:
    """Relative difference of ``forward_features`` on random images.

    Raises:
        ExportError: keys or values differ, or outputs do by more than 1e-5.
    """
    before, after = source.state_dict(), again.state_dict()
    missing, added = sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())
    if missing or added:
        raise ExportError(f"the re-read network lacks the weights {missing[:5]} and has {added[:5]} beyond the source's")
    changed = [name for name, value in before.items() if not torch.equal(value.cpu(), after[name].cpu())]
    if changed:
        raise ExportError(f"{len(changed)} tensors changed on the way to disk and back, e.g. {changed[:3]}")

    size: tuple[int, int, int] = tuple(source.pretrained_cfg["input_size"])  # type: ignore[index, assignment, arg-type]
    images = torch.rand(2, *size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = source.eval().forward_features(images)  # type: ignore[operator]
        found = again.eval().forward_features(images)  # type: ignore[operator]
    if expected.shape != found.shape or not expected.isfinite().all():
        raise ExportError(
            f"forward_features gives {tuple(found.shape)} after reading back, {tuple(expected.shape)} before"
            + ("" if expected.isfinite().all() else "; the source's outputs are NaN or infinite")
        )
    difference = ((expected - found).abs().max() / expected.abs().max().clamp_min(1e-12)).item()
    if difference > _TOLERANCE:
        raise ExportError(f"forward_features differs by {difference:.2e} after reading back; at most {_TOLERANCE} is due")
    return difference


def _dump(content: Mapping[str, Any], file: Path) -> None:
    try:
        text = json.dumps(content, indent=2)
    except TypeError as error:
        raise WeightsError(f"cannot write {file.name}: {error}; encoder arguments must be plain values") from error
    file.write_text(text + "\n", encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _move(work: Path, out: Path) -> None:
    """Put ``work`` in the place of ``out``; an earlier export is moved aside first and deleted last."""
    if not out.exists():
        work.rename(out)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    out.rename(aside / "export")
    try:
        work.rename(out)
    except OSError:
        (aside / "export").rename(out)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)
