"""``export``: write a student in the form that a target's users load, read it back, compare, and only then let it appear."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor

from hgkd.data.images import find_images, read_crops
from hgkd.data.pixels import as_value_range
from hgkd.data.transforms import as_size
from hgkd.differences import largest_difference
from hgkd.errors import DataError, InvalidValueError, WeightsError, check_counts, first_line, unknown_name_message
from hgkd.export.card import LICENCE_FIELDS, model_card, run_card, write_cards
from hgkd.export.classifier import read_classifier
from hgkd.export.folder import PAGE, check_free, new_folder
from hgkd.export.job import ExportError, ExportReport, Job, Target, Written, use_at
from hgkd.export.measure import check_latency, measured
from hgkd.export.model import LIBRARIES, export_model, model_options
from hgkd.export.preprocessing import input_for, run_image_size, run_value_range
from hgkd.export.targets import TARGETS
from hgkd.networks.backbones import Source, read_source
from hgkd.pixels import channels_of, to_unit_range
from hgkd.weights.loading import check_finite
from hgkd.weights.run_file import EncoderSpec
from hgkd.weights.signature import Output, Signature

#: What of a student can be exported; a target says which of these it takes.
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
    preprocessing: str | None = None,
    image_size: int | Sequence[int] | None = None,
    latency: int | None = None,
    licences: Mapping[str, str] | None = None,
    **options: object,
) -> ExportReport:
    """Write a student as a folder that others load, after reading it back and comparing outputs.

    Args:
        checkpoint: a .pth file of hgkd's runner (of a whole model also its work folder), a folder of an earlier export to timm
            or sparse, or, with ``encoder``, a weight file of another project.
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
        value_range: (low, high), the values of black and white in images of more than 8 bits; None: those of the run.
        preprocessing: one of ``hgkd.export.PREPROCESSINGS``: the graph takes the values of image files in this layout and
            order, uint8, and range, mean and std are inside; None: float32 (B, C, H, W) in [0, 1].
        image_size: side in pixels, or (H, W), that a backbone is used at: of the images of the proof, of int8's calibration and
            of graphs of one size; it is noted for the library that loads the folder. None: the run's, or timm's for the network
            where the file does not say one.
        latency: side in pixels of the image by which the files are timed, and their peak memory is measured.
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
    if latency is not None:
        check_latency(target, [name for name, other in TARGETS.items() if other.runner], latency)
    if preprocessing is not None and not target.preprocessing:
        able = ", ".join(name for name, other in TARGETS.items() if other.preprocessing)
        raise InvalidValueError(
            "preprocessing-not-in-target", f"target {to!r} cannot hold the preprocessing; leave it out, or use {able}"
        )
    if part in ("classifier", "model") and (encoder is not None or prefix is not None or allow):
        raise InvalidValueError(
            "backbone-options-for-model",
            f"encoder, prefix and allow are for backbones of other projects; leave them out with part={part!r}",
        )
    if part == "model" and preprocessing is not None:
        raise InvalidValueError(
            "preprocessing-of-model", "the graph of a whole model holds its preprocessing always; leave preprocessing out"
        )
    if part == "model" and (labels or value_range is not None or (images is not None and to in LIBRARIES)):
        raise InvalidValueError(
            "model-takes-no-images",
            "a whole model's weights are proven bit for bit, and its graph on plain pictures; leave labels, value_range and, "
            "with a library as target, images out",
        )
    if image_size is not None and part in ("classifier", "model"):
        raise InvalidValueError(
            "image-size-of-backbone",
            f"image_size={image_size} is for backbones; a {part} leaves at the size that it was trained at, leave it out",
        )
    out = Path(out).expanduser().absolute()
    check_free(out, force, to)
    if part == "model":
        return export_model(checkpoint, out, target, licences or {}, images, max_images, latency, **options)
    if part == "classifier":
        source = read_classifier(checkpoint)
    else:
        source = read_source(checkpoint, encoder, prefix=prefix, allow=allow)
        size = run_image_size(source.meta) if image_size is None else as_size(image_size)
        if size is not None:
            use_at(source.network, size)
    decoded = part in ("student", "decoder")
    if decoded and not source.student:
        raise WeightsError("decoder-not-in-file", f"{source.path} holds an encoder without decoder; use part='backbone'")
    check_finite(source.path, source.student if decoded else source.network.state_dict())
    if value_range is not None and images is None and preprocessing is None:
        raise InvalidValueError(
            "value-range-without-images",
            f"value_range={tuple(value_range)} is for real images, or for preprocessing: give a folder of images with images=",
        )
    if labels and images is None:
        raise InvalidValueError(
            "labels-without-images", "labels=True measures an accuracy on images: give a folder of class folders with images="
        )
    value_range = run_value_range(source.meta) if value_range is None else as_value_range(value_range)
    taken = input_for(source.network, preprocessing, value_range)
    real, classes = (None, None) if images is None else _read_images(images, max_images, source, labels, value_range)

    with new_folder(out) as work:
        job = Job(source, work, out, part, None if real is None else taken.prepare(real), classes, taken)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            stages = 2 + (latency is not None)
            print_log(f"1 of {stages}: writing the {part} for {to}", "current")  # some last a minute
            written = target.write(job, **options)
            print_log(f"2 of {stages}: reading it back with {written.proven_with} and comparing outputs", "current")
            difference = _prove_equal(job, written)
            if target.runner is not None:
                difference = max(difference, _prove_any_size(job, written))
            if latency is not None:
                print_log(f"3 of 3: timing an image of {latency} x {latency} px", "current")
                table = measured(target, work, written.table, written.input or taken, latency)
                written = replace(written, table=table)
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
    known = model_options(to) if part == "model" else target.options
    for name in options:
        if name not in known:
            takes = ", ".join(known) or "none"
            raise InvalidValueError(
                "target-option-unknown", f"target {to!r} has no option {name!r} for the {part}; it takes: {takes}"
            )
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
    check_counts(max_images=limit)
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
    taken = written.input or job.input
    free = taken.height is None
    batches = [job.random_images(2, height, width), job.random_images(1, 2 * height if free else height, width)]
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


@torch.no_grad()
def _prove_any_size(job: Job, written: Written) -> float:
    """The same at odd sides, for graphs that are said to take any size; 0 where the network itself takes no such image.

    Raises:
        ExportError: the graph does not compute there what the network does.
    """
    taken, expect = written.input or job.input, written.expected or job.features
    if taken.height is not None or taken.width is not None or taken.multiple > 1:
        return 0.0
    height, width = job.image_size[0] + 17, job.image_size[1] + 9
    images = job.random_images(1, height, width)
    try:
        expected = expect(images)
    except Exception:
        # networks that add maps of several scales, or cut them into windows, want whole ones; torch says so in many ways
        return 0.0
    try:
        difference, said = largest_difference(written.reloaded(images), expected), ""
    except Exception as error:
        # every runtime has its own
        difference, said = math.inf, f" ({type(error).__name__}: {first_line(error)})"
    if not difference <= (TOLERANCE if written.tolerance is None else written.tolerance):
        raise ExportError(
            "graph-wrong-at-a-size",
            f"{written.proven_with} computes what the {job.part} does at {job.image_size[0]} x {job.image_size[1]}, but not at "
            f"{height} x {width}{said}: outputs differ by {difference:.2e}; use another target, e.g. onnx",
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
        "requires": written.requires,
        "input_channels": channels_of(job.network),
        "real_images": images,
        "table": written.table,
    }
    read_as = job.source.read_as.replace(str(job.source.path), job.source.path.name)
    channels = channels_of(job.network)
    taken = (
        [] if channels == 3 else [f"takes images of {channels} channels, (B, {channels}, H, W), in the order of the training's"]
    )
    if job.input.value_range and target.runner is not None and job.input.range == (0.0, 1.0):
        black, white = job.input.value_range
        taken.append(
            f"0 and 1 stand for the values {black:g} and {white:g} of images of more than 8 bits, what lies beyond is cut"
        )
    notes = [*([read_as] if read_as else []), *taken, *written.notes]
    signature = None if target.runner is None else _signature(job, written, options)
    card = run_card(job.source, facts, job.folder, licences, notes)
    if signature is not None:
        card["signature"] = signature.to_dict()
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
        signature=signature,
    )


def _signature(job: Job, written: Written, options: Mapping[str, Any]) -> Signature:
    """What the graphs that a target wrote take and give."""
    whole = job.part == "classifier"
    kind = str(options.get("output") or ("logits" if whole else "pooled"))
    return Signature(
        files={str(row.get("precision", "fp32")): str(row["file"]) for row in written.table if "file" in row},
        input=written.input or job.input,
        outputs=written.outputs or (Output(kind, kind),),
        task="classification" if kind == "logits" else "features",
        classes=job.source.classes if whole else (),
    )
