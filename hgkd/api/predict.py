"""Predict with an exported folder: pictures, a video or a camera in; results as JSON lines and drawn pictures out.

The folder alone is read: the file, and the record of what it takes and gives. Nothing of the training run is needed.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from hgkd.data import LabelledImages
from hgkd.data.folders import printable
from hgkd.data.frames import Frame, frames
from hgkd.errors import DataError, ExistingFileError, InvalidValueError, check_counts
from hgkd.evaluation.knn import knn_scores, nearest_neighbours
from hgkd.export.opened import OpenedExport, open_export
from hgkd.export.placing import Placed, outside_label, place
from hgkd.pictures.columns import as_rgb
from hgkd.pictures.predictions import draw_boxes, draw_label_map, draw_lines
from hgkd.writing import written_beside, written_whole

RESULTS, PICTURES, LABEL_MAPS, FEATURES = "predictions.jsonl", "pictures", "label_maps", "features.npy"
FEATURE_MAPS = "features.safetensors"
_WARM_UP = 3
_SCORE = 0.3  # of a box, when none is given


@dataclass(frozen=True)
class PredictReport:
    """Result of :func:`predict`.

    Attributes:
        frames: how many were predicted.
        failed: files that could not be read, with the reason.
        run_ms: median time in the runtime, milliseconds; the first three frames are left out where there are more.
        frame_ms: the same from opening a file to its results, drawing and writing left out.
        about: target, runtime, precision, task, in words.
    """

    frames: int
    failed: dict[str, str]
    run_ms: float
    frame_ms: float
    about: str

    @property
    def frames_per_s(self) -> float:
        """By the median time of a frame."""
        return 1000.0 / self.frame_ms


@dataclass(frozen=True)
class _Found:
    """What one frame gave: its line, and how it is drawn."""

    line: dict[str, Any]
    draw: Callable[[Image.Image], Image.Image]
    label_map: NDArray[Any] | None = None
    features: Tensor | None = None


_Reader = Callable[[dict[str, Tensor], Placed], _Found]


def predict(
    folder: str | os.PathLike[str],
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    runtime: str | None = None,
    threads: int = 1,
    precision: str = "fp32",
    top: int = 5,
    score_threshold: float | None = None,
    gallery: str | os.PathLike[str] | None = None,
    neighbours: int = 5,
    limit: int | None = None,
    pictures: bool = True,
    value_range: Sequence[float] | None = None,
    told: Callable[[dict[str, Any]], None] = lambda line: None,
) -> PredictReport:
    """Run an exported folder on pictures.

    Args:
        folder: of ``hgkd export``; see :func:`hgkd.export.opened.open_export`, as for runtime, threads and precision.
        source: see :func:`hgkd.data.frames.frames`.
        out: folder to make: ``predictions.jsonl`` with a line a frame, ``pictures/``; of a segmentor ``label_maps/`` (PNG, a
            pixel is the number of its class), of features ``features.npy`` (N, C) or, as maps, ``features.safetensors``.
            None: nothing is written.
        top: so many labels of a frame.
        score_threshold: labels and boxes of a lower score are left out; None: 0.3 for boxes, 0 for labels.
        gallery: folder of one folder a class; a backbone's features are compared with those of its images.
        neighbours: so many nearest images of it vote, and are told.
        limit: stop after so many frames.
        pictures: draw them.
        value_range: (low, high), the values of black and white in images of more than 8 bits; None: as recorded.
        told: is given every line as it is found.

    Raises:
        FileNotFoundError, WeightsError, MissingLibraryError: of the folder.
        FileNotFoundError, DataError, MissingPackageError: of the source or the gallery.
        FileExistsError: ``out`` holds predictions already.
        ValueError: options that do not fit the task or each other, or an export whose pictures go through steps that are not
            repeated here.
    """
    check_counts(top=top, neighbours=neighbours, **({} if limit is None else {"limit": limit}))
    exported = open_export(folder, runtime=runtime, threads=threads, precision=precision)
    expected = exported.signature.input
    if expected.resize == "other":
        steps = exported.signature.options.get("test_pipeline") or ()
        raise InvalidValueError(
            "export-pictures-prepared-otherwise",
            f"{exported.path} takes pictures as the steps of its run's test pipeline leave them "
            f"({', '.join(str(step.get('type')) for step in steps)}), of which hgkd predict does not know how to repeat all: "
            "results would be those of pictures of another size. 'hgkd test CONFIG FOLDER' runs them; or train with a "
            "test_dataloader that has one Resize with a scale, and at most one Pad, and export again",
        )
    in_chans = None if expected.channels == 3 else expected.channels
    value_range = value_range or expected.value_range or None
    stream = frames(source, value_range=value_range, in_chans=in_chans)
    place_out = None if out is None else _new(Path(out).expanduser())
    read = _reader(exported, top, score_threshold, gallery, neighbours, place_out, value_range)
    failed: dict[str, str] = {}
    ran: list[tuple[float, float]] = []
    with ExitStack() as stack:
        lines = None if place_out is None else stack.enter_context(open(place_out / RESULTS, "w", encoding="utf-8"))
        features: dict[str, Tensor] = {}
        try:
            for frame, started in _timed(islice(stream, limit)):
                if frame.pixels is None:
                    failed[frame.source] = frame.failed
                    _say({"image": frame.source, "error": frame.failed}, lines, told)
                    continue
                placed = place(frame.pixels, exported.signature)
                before = time.perf_counter()
                outputs = exported(placed.images)
                run = time.perf_counter() - before
                found = read(outputs, placed)
                ran.append((run, time.perf_counter() - started))
                written: dict[str, Any] = {} if place_out is None else _write(frame, found, place_out, pictures)
                if found.features is not None and place_out is not None:
                    written = {"row": len(features), **written}
                    features[frame.name] = found.features
                line = {"image": frame.source, "size": list(placed.size[::-1]), "ms": 1e3 * run, **found.line, **written}
                _say(line, lines, told)
        except KeyboardInterrupt:  # how a camera ends
            if not ran:
                raise
        finally:  # what was found before a frame that fails is not lost
            if features and place_out is not None:
                _save_features(features, place_out)
    if not ran:
        cause = next(iter(failed.items()), ("", ""))
        raise DataError("no-image-readable", f"no image of {source} can be read, e.g. {cause[0]} ({cause[1]})")
    warm = ran[_WARM_UP:] or ran
    run_ms, frame_ms = (1e3 * statistics.median(times) for times in zip(*warm, strict=True))
    return PredictReport(len(ran), failed, run_ms, frame_ms, _about(exported))


def _timed(stream: Iterator[Frame]) -> Iterator[tuple[Frame, float]]:
    """Every frame with the time at which its reading began."""
    started = time.perf_counter()
    for frame in stream:
        yield frame, started
        started = time.perf_counter()


def _reader(
    exported: OpenedExport,
    top: int,
    threshold: float | None,
    gallery: str | os.PathLike[str] | None,
    neighbours: int,
    out: Path | None,
    value_range: Sequence[float] | None,
) -> _Reader:
    """What makes results of outputs, by what the record says that they hold."""
    holds = {output.holds for output in exported.signature.outputs}
    classes = exported.signature.classes
    about_features = bool(holds & {"features", "pooled"})
    if gallery is not None and not about_features:
        raise InvalidValueError(
            "gallery-without-features",
            f"{exported.path} gives {', '.join(sorted(holds))}, and a gallery is for a backbone's features; leave it out",
        )
    if about_features and gallery is None:
        if out is None:
            raise InvalidValueError(
                "features-without-place",
                f"{exported.path} gives features: name a folder for them with out, or class folders to compare with by gallery",
            )
        return _read_features
    if gallery is not None:
        return _gallery_reader(exported, gallery, neighbours, top, threshold or 0.0, value_range)
    if "boxes" in holds:
        return lambda outputs, placed: _read_boxes(outputs, placed, classes, _SCORE if threshold is None else threshold)
    if "label_map" in holds:
        return lambda outputs, placed: _read_label_map(outputs, placed, classes)
    return lambda outputs, _: _read_logits(outputs["logits"], classes, top, threshold or 0.0)


def _read_logits(logits: Tensor, classes: Sequence[str], top: int, threshold: float) -> _Found:
    return _labelled(logits.float().flatten().softmax(0), classes, top, threshold)


def _labelled(scores: Tensor, classes: Sequence[str], top: int, threshold: float, **more: Any) -> _Found:
    values, places = scores.topk(min(top, len(scores)))
    best = [
        {"label": _name(classes, int(index)), "class": int(index), "score": float(value)}
        for value, index in zip(values, places, strict=True)
        if float(value) >= threshold
    ]
    lines = [f"{entry['label']} {entry['score']:.2f}" for entry in best] or ["?"]
    first: Mapping[str, Any] = best[0] if best else {"label": None, "score": None}
    line = {"label": first["label"], "score": first["score"], "top": best, **more}
    return _Found(line, lambda picture: draw_lines(picture, lines))


def _read_boxes(outputs: Mapping[str, Tensor], placed: Placed, classes: Sequence[str], threshold: float) -> _Found:
    boxes, scores = placed.boxes(outputs["boxes"].reshape(-1, 4)), outputs["scores"].float().flatten()
    labels = outputs["labels"].long().flatten() if "labels" in outputs else torch.zeros(len(scores), dtype=torch.long)
    objects: list[dict[str, Any]] = []
    for index in scores.argsort(descending=True, stable=True).tolist():
        score, label = float(scores[index]), int(labels[index])
        if score >= threshold and label >= 0:  # exporters of a fixed number of boxes fill up with none
            box = [round(value, 2) for value in boxes[index].tolist()]
            objects.append({"label": _name(classes, label), "class": label, "score": score, "box": box})
    return _Found({"objects": objects}, lambda picture: draw_boxes(picture, objects))


def _read_label_map(outputs: Mapping[str, Tensor], placed: Placed, classes: Sequence[str]) -> _Found:
    outside = outside_label(len(classes))
    labels = placed.label_map(outputs["label_map"].reshape(outputs["label_map"].shape[-2:]), outside)
    seen = labels[labels != outside]
    found, counts = seen.unique(return_counts=True)
    shares = sorted(zip(counts.tolist(), found.tolist(), strict=True), reverse=True)
    names = {index: _name(classes, index) for _, index in shares}
    line = {"classes": {names[index]: count / max(1, seen.numel()) for count, index in shares}}
    array: NDArray[Any] = labels.numpy().astype(np.uint8 if max(int(labels.max()), outside) <= 255 else np.uint16)
    return _Found(line, lambda picture: draw_label_map(picture, array, names, outside), label_map=array)


def _read_features(outputs: Mapping[str, Tensor], placed: Placed) -> _Found:
    values = outputs["pooled"] if "pooled" in outputs else outputs["features"]
    return _Found({}, lambda picture: picture, features=values[0].float())


def _gallery_reader(
    exported: OpenedExport,
    gallery: str | os.PathLike[str],
    neighbours: int,
    top: int,
    threshold: float,
    value_range: Sequence[float] | None,
) -> _Reader:
    """Classes by the nearest images of a folder of class folders."""
    channels = exported.signature.input.channels
    known = LabelledImages(str(gallery), value_range=value_range, in_chans=None if channels == 3 else channels)
    rows, labels, names = [], [], []
    for index, name in enumerate(known.names()):
        try:
            pixels = known.image(index)
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
            raise DataError(
                "image-unreadable", f"image {printable(name)} of {gallery} cannot be read ({error}); leave it out"
            ) from error
        rows.append(_vector(exported(place(pixels, exported.signature).images)))
        labels.append(int(known.labels[index]))
        names.append(printable(name))
    bank, truth = torch.stack(rows), torch.tensor(labels)
    count = min(neighbours, len(bank))

    def read(outputs: dict[str, Tensor], placed: Placed) -> _Found:
        vector = _vector(outputs)
        scores = knn_scores(bank, truth, vector[None], count, num_classes=len(known.classes))[0]
        cosines, places = (found[0].tolist() for found in nearest_neighbours(bank, vector[None], count))
        near = [
            {"image": names[row], "label": known.classes[labels[row]], "cosine": cosine}
            for row, cosine in zip(places, cosines, strict=True)
        ]
        voted = min(top, int((scores > 0).sum()))
        return _labelled(scores, known.classes, max(1, voted), threshold, neighbours=near)

    return read


def _vector(outputs: Mapping[str, Tensor]) -> Tensor:
    """Features of one image as a row (C,)."""
    if "pooled" in outputs:
        return outputs["pooled"][0].float()
    return outputs["features"][0].float().mean((-2, -1))


def _name(classes: Sequence[str], index: int) -> str:
    return classes[index] if 0 <= index < len(classes) else f"class {index}"


def _new(out: Path) -> Path:
    if (out / RESULTS).exists():
        raise ExistingFileError("predictions-exist", f"{out} holds predictions already; choose another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    return out


def _write(frame: Frame, found: _Found, out: Path, pictures: bool) -> dict[str, str]:
    """Draw a frame's picture and save its label map; returns their names, for its line."""
    written = {}
    if found.label_map is not None:
        written["label_map"] = f"{LABEL_MAPS}/{frame.name}.png"
        with written_whole(out / written["label_map"]) as stream:
            Image.fromarray(found.label_map).save(stream, format="PNG")
    if pictures and found.features is None:
        written["picture"] = f"{PICTURES}/{frame.name}.jpg"
        with written_whole(out / written["picture"]) as stream:
            found.draw(_picture(frame)).save(stream, format="JPEG", quality=90)
    return written


def _picture(frame: Frame) -> Image.Image:
    if isinstance(frame.pixels, Tensor):
        shown = as_rgb(frame.pixels[None])[0].mul(255).round().to(torch.uint8)
        return Image.fromarray(shown.permute(1, 2, 0).numpy())
    assert frame.pixels is not None
    return frame.pixels


def _save_features(features: Mapping[str, Tensor], out: Path) -> None:
    """Rows of one length as an array, maps by the names of their frames."""
    if all(value.ndim == 1 for value in features.values()):
        with written_whole(out / FEATURES) as stream:
            np.save(stream, torch.stack(list(features.values())).numpy())
        return
    with written_beside(out / FEATURE_MAPS) as beside:
        save_file({name: value.contiguous() for name, value in features.items()}, beside)


def _say(line: dict[str, Any], lines: TextIO | None, told: Callable[[dict[str, Any]], None]) -> None:
    if lines is not None:
        lines.write(json.dumps(line, ensure_ascii=False) + "\n")
        lines.flush()  # so that who watches a camera sees it
    told(line)


def _about(exported: OpenedExport) -> str:
    signature = exported.signature
    through = "" if exported.runtime == exported.target else f" by {exported.runtime}"
    return f"{exported.target}{through}, {exported.precision}, {signature.task}, {signature.input.about}"
