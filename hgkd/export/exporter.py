"""``export``: write a student in the form that a target's users load, read it back, compare, and only then let it appear."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hgkd.data.images import find_images, read_crops
from hgkd.differences import largest_difference
from hgkd.errors import DataError, InvalidValueError, WeightsError, unknown_name_message
from hgkd.export.card import LICENCE_FIELDS, model_card, run_card, write_cards
from hgkd.export.classifier import read_classifier
from hgkd.export.folder import PAGE, check_free, new_folder
from hgkd.export.job import ExportError, ExportReport, Job, Target, Written
from hgkd.export.model import export_model
from hgkd.export.targets import TARGETS
from hgkd.networks.backbones import Source, read_source
from hgkd.pixels import channels_of, to_unit_range
from hgkd.weights.loading import check_finite
from hgkd.weights.run_file import EncoderSpec

PARTS = ("backbone", "student", "decoder", "classifier", "model")
TOLERANCE = 1e-5


def export(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str = "timm",
    *,
    part: str = "backbone",
    force: bool = False,
    encoder: str | EncoderSpec | None = None,
    prefix: str | None = None,
    allow: Sequence[str] = (),
    images: str | os.PathLike[str] | None = None,
    max_images: int = 64,
    labels: bool = False,
    value_range: Sequence[float] | None = None,
    licences: Mapping[str, str] | None = None,
    **options: object,
) -> ExportReport:
    """Write a student as a folder that others load, after reading it back and comparing outputs.

    Args:
        checkpoint: a .pth file of hgkd's runner, a folder of an earlier export to timm or sparse, or, with ``encoder``, a
            weight file of another project.
        out: folder to make. It appears complete or not at all.
        to: target, a key of ``hgkd.export.TARGETS``.
        part: 'backbone' (the encoder), 'student' (encoder and decoder), 'decoder', 'classifier' (a fine-tuned CNN with its
            head), or 'model': any whole model that mmengine trained, see :func:`hgkd.export.model.export_model`.
        force: replace an earlier export. A folder that holds anything else is never replaced.
        encoder, prefix, allow: how to read a file of another project; see :func:`hgkd.export.load_backbone`.
        images: folder of images, searched at any depth, that take part in the proof besides random ones, and calibrate and
            measure int8.
        max_images: maximum number of them, spread over the sorted list.
        labels: ``images`` holds one folder a class: lower precisions are measured by an accuracy, too.
        value_range: (low, high), the values of black and white in ``images`` of more than 8 bits.
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
    target = _check_request(to, part, options, licences or {})
    if part in ("classifier", "model") and (encoder is not None or prefix is not None or allow):
        raise InvalidValueError(
            "backbone-options-for-model",
            f"encoder, prefix and allow are for backbones of other projects; leave them out with part={part!r}",
        )
    if part == "model" and (images is not None or labels):
        raise InvalidValueError(
            "model-takes-no-images", "a whole model is proven by its weights, not on images; leave images and labels out"
        )
    out = Path(out).expanduser().absolute()
    check_free(out, force)
    if part == "model":
        return export_model(checkpoint, out, to, licences or {})
    if part == "classifier":
        source = read_classifier(checkpoint)
    else:
        source = read_source(checkpoint, encoder, prefix=prefix, allow=allow)
    decoded = part in ("student", "decoder")
    if decoded and not source.student:
        raise WeightsError("decoder-not-in-file", f"{source.path} holds an encoder without decoder; use part='backbone'")
    check_finite(source.path, source.student if decoded else source.network.state_dict())
    if value_range is not None and images is None:
        raise InvalidValueError(
            "value-range-without-images",
            f"value_range={tuple(value_range)} is for real images: give a folder of them with images=",
        )
    if labels and images is None:
        raise InvalidValueError(
            "labels-without-images", "labels=True measures an accuracy on images: give a folder of class folders with images="
        )
    real, classes = (None, None) if images is None else _read_images(images, max_images, source, labels, value_range)

    with new_folder(out) as work:
        job = Job(source, work, out, part, real, classes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            written = target.write(job, **options)
            difference = _prove_equal(job, written)
        return _describe(job, target, written, difference, options, licences or {})


def _check_request(to: str, part: str, options: Mapping[str, Any], licences: Mapping[str, str]) -> Target:
    if to not in TARGETS:
        own = "one of your own comes with the module that registers it (--config FILE, of your custom_imports)"
        raise InvalidValueError("target-unknown", f"{unknown_name_message('export target', to, TARGETS)}; {own}")
    target = TARGETS[to]
    if part not in PARTS:
        raise InvalidValueError("part-unknown", unknown_name_message("part of a student", part, PARTS))
    if part not in target.part:
        able = ", ".join(name for name, other in TARGETS.items() if part in other.part)
        raise InvalidValueError(
            "target-without-part", f"target {to!r} holds the {' or '.join(target.part)}, not the {part}; targets for it: {able}"
        )
    for name in options:
        if name not in target.options:
            takes = ", ".join(target.options) or "none"
            raise InvalidValueError("target-option-unknown", f"target {to!r} has no option {name!r}; it takes: {takes}")
    for name in licences:
        if name not in LICENCE_FIELDS:
            raise InvalidValueError("licence-field-unknown", unknown_name_message("licence field", name, LICENCE_FIELDS))
    return target


def _read_images(
    folder: str | os.PathLike[str], limit: int, source: Source, labelled: bool, value_range: Sequence[float] | None = None
) -> tuple[Tensor, Tensor | None]:
    """Real images at the network's size in [0, 1], and when asked for their classes.

    A class is the place of its folder among the classes that the source knows, or else among the sorted folders.
    """
    root = Path(folder).expanduser()
    channels, height, width = source.network.pretrained_cfg["input_size"]  # type: ignore[index]
    in_chans = None if channels == 3 else int(channels)
    names = find_images(str(root), arrays=in_chans is not None) if root.is_dir() else []
    if not names:
        raise DataError(
            "no-images-to-compare",
            f"{root} holds no images to compare outputs on; give a folder of .jpg, .png or others, at any depth",
        )
    if limit < 1:
        raise InvalidValueError("count-not-positive", f"max_images must be 1 or more, got {limit}")
    classes = sorted({name.split(os.sep)[0] for name in names})
    if labelled and (len(classes) < 2 or not all(os.sep in name for name in names)):
        raise DataError(
            "labels-without-class-folders",
            f"{root} does not hold one folder a class, so there are no labels; sort the images, or leave labels out",
        )
    unknown = sorted(set(classes) - set(source.classes))
    if labelled and source.classes and unknown:
        raise DataError(
            "class-not-known",
            f"{root} holds the class {unknown[0]!r}, the classifier knows {', '.join(source.classes)}; rename the folder",
        )
    classes = list(source.classes) or classes
    count = min(len(names), limit)
    names = [names[i * len(names) // count] for i in range(count)]  # spread over the list, so that every class folder is met
    images = to_unit_range(read_crops([root / name for name in names], (height, width), value_range, in_chans))
    return images, torch.tensor([classes.index(name.split(os.sep)[0]) for name in names]) if labelled else None


@torch.no_grad()
def _prove_equal(job: Job, written: Written) -> float:
    """Largest relative difference of outputs over random images, of two shapes where it takes them, and the real ones.

    Raises:
        ExportError: outputs differ in shape, or by more than the tolerance, or are not finite.
    """
    height, width = job.image_size
    channels = channels_of(job.network)
    other = height if written.fixed_size else 2 * height
    batches = [torch.rand(2, channels, height, width), torch.rand(1, channels, other, width)]
    if job.images is not None:
        batches += list(job.images.split(8))
    expect = written.expected or job.features
    difference = 0.0
    for images in batches:
        expected, found = expect(images), written.reloaded(images)
        if expected.shape != found.shape:
            raise ExportError(
                "export-shape-differs",
                f"{job.part} gives {tuple(found.shape)} after reading back with {written.proven_with}, "
                f"{tuple(expected.shape)} before",
            )
        if not expected.isfinite().all():
            raise ExportError(
                "source-outputs-not-finite",
                f"the {job.part} of {job.source.path} gives NaN or infinite values before any export; "
                "export an earlier checkpoint",
            )
        if not found.isfinite().all():
            raise ExportError(
                "export-outputs-not-finite",
                f"{job.part} gives NaN or infinite values after reading back with {written.proven_with}",
            )
        difference = max(difference, largest_difference(found, expected))
    tolerance = TOLERANCE if written.tolerance is None else written.tolerance
    if not difference <= tolerance:
        raise ExportError(
            "export-outputs-differ",
            f"outputs differ by {difference:.2e} after reading back with {written.proven_with}; at most {tolerance} is due",
        )
    return difference


def _describe(
    job: Job, target: Target, written: Written, difference: float, options: Mapping[str, Any], licences: Mapping[str, str]
) -> ExportReport:
    """Write the cards into the export and report it."""
    usage = written.load_with.replace(str(job.out), "PATH/OF/THIS/FOLDER")  # no paths of this machine in public
    images = 0 if job.images is None else len(job.images)
    facts = {
        "target": target.name,
        "part": job.part,
        "options": {key: str(value) if isinstance(value, os.PathLike) else value for key, value in options.items()},
        "load_with": usage,
        "proven_with": written.proven_with,
        "max_difference": difference,
        "input_channels": channels_of(job.network),
        "real_images": images,
        "table": written.table,
    }
    read_as = job.source.read_as.replace(str(job.source.path), job.source.path.name)
    channels = channels_of(job.network)
    taken = (
        [] if channels == 3 else [f"takes images of {channels} channels, (B, {channels}, H, W), in the order of the training's"]
    )
    notes = [*([read_as] if read_as else []), *taken, *written.notes]
    card = run_card(job.source, facts, job.folder, licences, notes)
    write_cards(card, job.folder)
    if target.hub_library is not None:
        (job.folder / PAGE).write_text(model_card(card, target.hub_library, usage), encoding="utf-8")
    return ExportReport(
        out=job.out,
        target=target.name,
        part=job.part,
        network=job.source.describe(),
        tensors=written.tensors,
        parameters=written.parameters,
        loaded_with=written.load_with,
        proven_with=written.proven_with,
        max_difference=difference,
        images=images,
        channels=channels,
        source_sha256=card["source"]["sha256"],
        files={name: entry["bytes"] for name, entry in card["files"].items()},
        notes=notes,
        table=list(written.table),
    )
