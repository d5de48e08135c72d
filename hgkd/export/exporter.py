"""``export``: write a student in the form that a target's users load, read it back, compare, and only then let it appear."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hgkd.data.images import find_images, read_rgb
from hgkd.data.transforms import eval_transform
from hgkd.errors import DataError, WeightsError, unknown_name_message
from hgkd.export.card import CARD_FILE, CARD_PAGE, LICENCE_FIELDS, card_page, model_card, run_card, write_json
from hgkd.export.importing import read_source
from hgkd.export.job import ExportError, Job, Target, Written
from hgkd.export.source import EncoderSpec, Source
from hgkd.export.targets import TARGETS

PARTS = ("backbone", "student")
TOLERANCE = 1e-5
_PAGE = "README.md"
_CARDS = {CARD_FILE, CARD_PAGE, _PAGE}


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote and how it was proven.

    Attributes:
        out: the folder.
        target: e.g. 'timm'.
        what: which part of the student.
        encoder: the encoder's description (name, stem, kwargs).
        tensors: number of tensors written.
        parameters: number of trainable values among them.
        loaded_with: the lines that read the folder.
        proven_with: the library, with its version, that read it back for the proof.
        max_difference: largest difference of outputs between source and re-read network, relative to the largest source value.
        images: number of real images in the proof, besides random ones.
        source_sha256: digest of the checkpoint.
        files: name -> size in bytes.
        notes: what a user should know.
        table: rows about the files, e.g. agreement of quantised graphs.
    """

    out: Path
    target: str
    what: str
    encoder: dict[str, Any]
    tensors: int
    parameters: int
    loaded_with: str
    proven_with: str
    max_difference: float
    images: int
    source_sha256: str
    files: dict[str, int]
    notes: list[str] = field(default_factory=list)
    table: list[dict[str, Any]] = field(default_factory=list)


def export(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str = "timm",
    *,
    what: str = "backbone",
    force: bool = False,
    encoder: str | EncoderSpec | None = None,
    prefix: str | None = None,
    allow: Sequence[str] = (),
    images: str | os.PathLike[str] | None = None,
    max_images: int = 64,
    licences: Mapping[str, str] | None = None,
    **options: Any,
) -> ExportReport:
    """Write a student as a folder that others load, after reading it back and comparing outputs.

    Args:
        checkpoint: a .pth file of hgkd's runner, a folder of an earlier export to timm or sparse, or, with ``encoder``, a
            weight file of another project.
        out: folder to make. It appears complete or not at all.
        to: target, a key of ``hgkd.export.TARGETS``.
        what: 'backbone' (the encoder) or 'student' (encoder and decoder).
        force: replace an earlier export. A folder that holds anything else is never replaced.
        encoder, prefix, allow: how to read a file of others; see :func:`hgkd.export.load_backbone`.
        images: folder of images, searched at any depth, that take part in the proof besides random ones, and calibrate and
            measure int8. Class folders in it give an accuracy, too.
        max_images: so many of them at most, spread over the sorted list.
        licences: of 'weights', 'teacher' and 'data', for the cards; what is not given is said to be unknown.
        options: of the target: the keyword-only arguments of its ``write``.

    Raises:
        ValueError: unknown target, part, option or licence field, or ``out`` is not an export and would be replaced.
        FileNotFoundError: no such checkpoint.
        FileExistsError: ``out`` exists and ``force`` is not set.
        WeightsError: the checkpoint is damaged, of an unknown kind, does not fit its encoder, or the student has a layer that
            the target lacks.
        MissingLibraryError: the target cannot be written without a library that is not installed.
        DataError: ``images`` holds no image that can be read.
        ExportError: the written folder does not give the source's outputs.
    """
    target = _check_request(to, what, options, licences or {})
    out = Path(out).expanduser().absolute()
    _check_free(out, force)
    source = read_source(checkpoint, encoder, prefix=prefix, allow=allow)
    if what == "student" and not source.student:
        raise WeightsError(f"{source.path} holds an encoder without decoder; use what='backbone'")
    _check_finite(source, source.student if what == "student" else source.network.state_dict())
    real, labels = (None, None) if images is None else _read_images(images, max_images, source.network)

    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        job = Job(source, work, out, what, real, labels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            written = target.write(job, **options)
            difference = _prove_equal(job, written)
        report = _describe(job, target, written, difference, options, licences or {})
        os.chmod(work, 0o777 & ~_umask())  # mkdtemp gives the owner alone access
        _move(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return report


def _check_request(to: str, what: str, options: Mapping[str, Any], licences: Mapping[str, str]) -> Target:
    if to not in TARGETS:
        raise ValueError(unknown_name_message("export target", to, TARGETS))
    target = TARGETS[to]
    if what not in PARTS:
        raise ValueError(unknown_name_message("part of a student", what, PARTS))
    if what not in target.what:
        able = ", ".join(name for name, other in TARGETS.items() if what in other.what)
        raise ValueError(f"target {to!r} holds the {' or '.join(target.what)}, not the {what}; targets for it: {able}")
    for name in options:
        if name not in target.options:
            takes = ", ".join(target.options) or "none"
            raise ValueError(f"target {to!r} has no option {name!r}; it takes: {takes}")
    for name in licences:
        if name not in LICENCE_FIELDS:
            raise ValueError(unknown_name_message("licence field", name, LICENCE_FIELDS))
    return target


def _check_free(out: Path, force: bool) -> None:
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise FileExistsError(f"{out} exists and is not a folder; choose another --out")
    names = {str(file.relative_to(out)) for file in out.rglob("*") if not file.is_dir() or not any(file.iterdir())}
    if not names:
        return
    if not force:
        raise FileExistsError(f"{out} exists and is not empty; choose another --out, or --force to replace an export")
    try:
        listed = set(json.loads((out / CARD_FILE).read_text(encoding="utf-8"))["files"]) | _CARDS
    except (OSError, ValueError, KeyError, TypeError):
        listed = set()
    if not names <= listed:
        raise ValueError(
            f"{out} holds other things than an export ({', '.join(sorted(names - listed)[:3])}), "
            "so --force does not replace it; choose another --out"
        )


def _check_finite(source: Source, state: Mapping[str, Tensor]) -> None:
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise WeightsError(
            f"{source.path} holds NaN or infinite values in {len(broken)} of its weights, e.g. {broken[0]}; "
            "training has diverged, export an earlier checkpoint"
        )


def _read_images(folder: str | os.PathLike[str], limit: int, network: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Real images at the network's size in [0, 1], and their classes when all lie in two or more class folders."""
    root = Path(folder).expanduser()
    names = find_images(str(root)) if root.is_dir() else []
    if not names:
        raise DataError(f"{root} holds no images to compare outputs on; give a folder of .jpg, .png or others, at any depth")
    if limit < 1:
        raise ValueError(f"max_images must be 1 or more, got {limit}")
    count = min(len(names), limit)
    names = [names[i * len(names) // count] for i in range(count)]  # spread over the list, so that every class folder is met
    _, height, width = network.pretrained_cfg["input_size"]  # type: ignore[index]
    transform = eval_transform((height, width))
    try:
        images = torch.stack([transform(read_rgb(root / name)) for name in names]).float() / 255
    except OSError as error:
        raise DataError(f"an image in {root} cannot be read ({error}); remove it or give another folder") from error
    classes = sorted({name.split(os.sep)[0] for name in names})
    labelled = all(os.sep in name for name in names) and len(classes) > 1
    labels = torch.tensor([classes.index(name.split(os.sep)[0]) for name in names]) if labelled else None
    return images, labels


@torch.no_grad()
def _prove_equal(job: Job, written: Written) -> float:
    """Largest relative difference of outputs over random images of two shapes, and the real ones.

    Raises:
        ExportError: outputs differ in shape, or by more than ``TOLERANCE``, or are not finite.
    """
    height, width = job.image_size
    batches = [torch.rand(2, 3, height, width), torch.rand(1, 3, 2 * height, width)]
    if job.images is not None:
        batches += list(job.images.split(8))
    expect = written.expected or job.features
    difference = 0.0
    for images in batches:
        expected, found = expect(images), written.again(images)
        if expected.shape != found.shape or not expected.isfinite().all():
            raise ExportError(
                f"{job.what} gives {tuple(found.shape)} after reading back with {written.proven_with}, "
                f"{tuple(expected.shape)} before" + ("" if expected.isfinite().all() else "; the source's are NaN or infinite")
            )
        difference = max(difference, ((expected - found).abs().max() / expected.abs().max().clamp_min(1e-12)).item())
    if not difference <= TOLERANCE:
        raise ExportError(
            f"outputs differ by {difference:.2e} after reading back with {written.proven_with}; at most {TOLERANCE} is due"
        )
    return difference


def _describe(
    job: Job, target: Target, written: Written, difference: float, options: Mapping[str, Any], licences: Mapping[str, str]
) -> ExportReport:
    """Write the cards into the export and report it."""
    images = 0 if job.images is None else len(job.images)
    facts = {
        "target": target.name,
        "what": job.what,
        "options": {key: str(value) if isinstance(value, os.PathLike) else value for key, value in options.items()},
        "load_with": written.load_with,
        "proven_with": written.proven_with,
        "max_difference": difference,
        "real_images": images,
        "table": written.table,
    }
    notes = [*([job.source.read_as] if job.source.read_as else []), *written.notes]
    card = run_card(job.source, facts, job.folder, licences, notes)
    write_json(card, job.folder / CARD_FILE)
    (job.folder / CARD_PAGE).write_text(card_page(card), encoding="utf-8")
    if target.hub_library is not None:
        usage = written.load_with.replace(str(job.out), "PATH/OF/THIS/FOLDER")  # no paths of this machine in public
        (job.folder / _PAGE).write_text(model_card(card, target.hub_library, usage), encoding="utf-8")
    return ExportReport(
        out=job.out,
        target=target.name,
        what=job.what,
        encoder=job.source.spec.to_dict(),
        tensors=written.tensors,
        parameters=written.parameters,
        loaded_with=written.load_with,
        proven_with=written.proven_with,
        max_difference=difference,
        images=images,
        source_sha256=card["source"]["sha256"],
        files={name: entry["bytes"] for name, entry in card["files"].items()},
        notes=notes,
        table=list(written.table),
    )


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
