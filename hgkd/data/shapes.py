"""Generated scenes: textured shapes on a textured background, for tests, demonstrations and small experiments.

The class of a scene is the shape of its largest object. Objects of all classes have the same distribution of area,
colour and texture, and distractors of other classes lie around, so that neither a colour histogram nor the painted area
tells the class. A scene depends on its seed and size only (``PCG64``, integers and uniform draws).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hgkd.data.transforms import as_size
from hgkd.errors import InvalidValueError
from hgkd.writing import written_whole

Floats = NDArray[np.float64]
Distance = Callable[[Floats, Floats], Floats]

_MAIN_AREA = (0.10, 0.20)  # shares of the squared shorter image side
_LONE_AREA, _LONE_TURN = (0.15, 0.30), 0.08  # without clutter; turns of a full circle
_DARK = 0.4  # without clutter the ground has colours up to this share of white, the object those down to 1 - this
_DISTRACTOR_AREA = (0.012, 0.035)
_MIN_VISIBLE = 0.6  # a distractor of which less shows is left out
_MIN_PIXELS = 8
_MIN_CONTRAST = 70.0  # between the mean colours of object and background, in 8-bit RGB
_JPEG_QUALITY = 95


# Shapes of area 1 as signed distances (negative inside), and the radius of the circle around each


def _disc(u: Floats, v: Floats) -> Floats:
    return np.hypot(u, v) - 1 / math.sqrt(math.pi)


def _regular_polygon(sides: int) -> tuple[Distance, float]:
    apothem = 1 / math.sqrt(sides * math.tan(math.pi / sides))

    def distance(u: Floats, v: Floats) -> Floats:
        angles = [2 * math.pi * k / sides for k in range(sides)]
        return np.max([u * math.cos(a) + v * math.sin(a) for a in angles], axis=0) - apothem

    return distance, apothem / math.cos(math.pi / sides)


_STAR_INNER = 0.45
_STAR_RADIUS = 1 / math.sqrt(5 * _STAR_INNER * math.sin(math.pi / 5))


def _star(u: Floats, v: Floats) -> Floats:
    sector = math.pi / 5
    angle = np.abs((np.arctan2(v, u) + sector) % (2 * sector) - sector)
    # the edge runs from a tip (radius, 0) to the inner corner at angle `sector`
    edge_u = _STAR_RADIUS * (_STAR_INNER * math.cos(sector) - 1)
    edge_v = _STAR_RADIUS * _STAR_INNER * math.sin(sector)
    rho = np.hypot(u, v)
    return ((rho * np.cos(angle) - _STAR_RADIUS) * edge_v - rho * np.sin(angle) * edge_u) / math.hypot(edge_u, edge_v)


_RING_INNER = 0.55
_RING_RADIUS = 1 / math.sqrt(math.pi * (1 - _RING_INNER**2))


def _ring(u: Floats, v: Floats) -> Floats:
    middle, half_width = _RING_RADIUS * (1 + _RING_INNER) / 2, _RING_RADIUS * (1 - _RING_INNER) / 2
    return np.abs(np.hypot(u, v) - middle) - half_width


_CROSS_ARM = 0.36  # width of an arm, in units of the whole cross
_CROSS_HALF = 0.5 / math.sqrt(2 * _CROSS_ARM - _CROSS_ARM**2)


def _cross(u: Floats, v: Floats) -> Floats:
    u, v = np.abs(u), np.abs(v)
    arm = _CROSS_ARM * _CROSS_HALF
    return np.minimum(np.maximum(u - _CROSS_HALF, v - arm), np.maximum(u - arm, v - _CROSS_HALF))


_CRESCENT_RADIUS = 0.8085925958732397  # makes the area 1 for the two fractions below
_CRESCENT_BITE, _CRESCENT_SHIFT = 0.8, 0.5


def _crescent(u: Floats, v: Floats) -> Floats:
    bite = np.hypot(u - _CRESCENT_SHIFT * _CRESCENT_RADIUS, v) - _CRESCENT_BITE * _CRESCENT_RADIUS
    return np.maximum(np.hypot(u, v) - _CRESCENT_RADIUS, -bite)


_SHAPES: dict[str, tuple[Distance, float]] = {
    "crescent": (_crescent, _CRESCENT_RADIUS),
    "cross": (_cross, math.hypot(_CROSS_HALF, _CROSS_ARM * _CROSS_HALF)),
    "disc": (_disc, 1 / math.sqrt(math.pi)),
    "hexagon": _regular_polygon(6),
    "ring": (_ring, _RING_RADIUS),
    "square": _regular_polygon(4),
    "star": (_star, _STAR_RADIUS),
    "triangle": _regular_polygon(3),
}

#: Names of the shapes, sorted, so that labels agree with those of a class-folder data set.
CLASSES: tuple[str, ...] = tuple(_SHAPES)


@dataclass(frozen=True)
class Scene:
    """A generated image with its ground truth.

    Attributes:
        image: uint8 (H, W, 3), RGB.
        label: class of the largest object, an index into ``CLASSES``.
        labels: int64 (N,), class of each object, the largest first.
        boxes: int64 (N, 4), (x1, y1, x2, y2) around the visible pixels of each object; x2 and y2 are exclusive.
        instances: uint8 (H, W), 0 = background, n + 1 = object n.
        label_map: uint8 (H, W), 0 = background, class + 1 elsewhere.
    """

    image: NDArray[np.uint8]
    label: int
    labels: NDArray[np.int64]
    boxes: NDArray[np.int64]
    instances: NDArray[np.uint8]
    label_map: NDArray[np.uint8]


@dataclass(frozen=True)
class _Object:
    """A shape set in place: its window in the image and, over that window, how much it covers each pixel in [0, 1]."""

    label: int
    window: tuple[slice, slice]
    coverage: Floats

    @property
    def inside(self) -> NDArray[np.bool_]:
        return self.coverage > 0.5


def render_scene(
    seed: int | Sequence[int], image_size: int | Sequence[int] = 96, label: int | None = None, clutter: bool = True
) -> Scene:
    """Draw one scene.

    Args:
        seed: a number from 0, or several (e.g. data set, split, position).
        image_size: side in pixels, or (H, W); at least 16.
        label: class of the largest object; None draws it.
        clutter: False draws one larger object, nearly upright, bright on a dark ground, both smoothly shaded: what
            minutes suffice to learn from.

    Raises:
        ValueError: image too small, or label beyond the classes.
    """
    h, w = as_size(image_size)
    if min(h, w) < 16:
        raise InvalidValueError(
            "scene-too-small", f"a scene needs 16 x 16 pixels or more for shapes to be told apart, got {h} x {w}"
        )
    if label is not None and not 0 <= label < len(CLASSES):
        raise InvalidValueError(
            "shape-label-out-of-range", f"label must be in 0..{len(CLASSES) - 1} ({', '.join(CLASSES)}), got {label}"
        )
    rng = np.random.Generator(np.random.PCG64(seed))
    drawn = int(rng.integers(len(CLASSES)))
    label = drawn if label is None else label

    # 1. where things are: the largest object in front, distractors behind it
    instances = np.zeros((h, w), dtype=np.uint8)
    objects = [_place(rng, (h, w), label, *((_MAIN_AREA, 1.0) if clutter else (_LONE_AREA, _LONE_TURN)))]
    instances[objects[0].window][objects[0].inside] = 1
    for _ in range(int(rng.integers(2, 5)) if clutter else 0):
        other = (label + 1 + int(rng.integers(len(CLASSES) - 1))) % len(CLASSES)
        item = _place(rng, (h, w), other, _DISTRACTOR_AREA, 1.0)
        showing = item.inside & (instances[item.window] == 0)
        if showing.sum() >= max(_MIN_PIXELS, _MIN_VISIBLE * item.inside.sum()):
            objects.append(item)
            instances[item.window][showing] = len(objects)

    # 2. what they look like, painted from the back
    colours = _colours(rng, None) if clutter else _DARK * _colours(rng, None)
    kinds = _TEXTURES if clutter else ("shade",)
    canvas = _texture(rng, (h, w), colours, unit=min(h, w) / 96, kinds=kinds)
    for item in reversed(objects):
        part = canvas[item.window]
        skin_colours = _colours(rng, colours) if clutter else 255 - _DARK * _colours(rng, None)
        skin = _texture(rng, part.shape[:2], skin_colours, unit=min(h, w) / 96, kinds=kinds)
        part += item.coverage[..., None] * (skin - part)
    if clutter:
        canvas += rng.integers(-10, 11, size=(h, w, 1))

    labels = np.array([item.label for item in objects], dtype=np.int64)
    return Scene(
        image=np.clip(np.rint(canvas), 0, 255).astype(np.uint8),
        label=label,
        labels=labels,
        boxes=np.array([_box(instances == n + 1) for n in range(len(objects))], dtype=np.int64),
        instances=instances,
        label_map=np.concatenate([[0], labels + 1]).astype(np.uint8)[instances],
    )


def _place(rng: np.random.Generator, size: tuple[int, int], label: int, areas: tuple[float, float], turns: float) -> _Object:
    """A shape of random area, rotation (up to ``turns`` full ones) and position, whole inside the image."""
    h, w = size
    distance, radius = _SHAPES[CLASSES[label]]
    area, turn, row, column = rng.random(4)
    turn *= turns
    scale = min(h, w) * math.sqrt(areas[0] + area * (areas[1] - areas[0]))
    reach = min(scale * radius + 0.5, min(h, w) / 2)
    y, x = reach + row * (h - 2 * reach), reach + column * (w - 2 * reach)
    window = (
        slice(max(0, math.floor(y - reach)), min(h, math.ceil(y + reach))),
        slice(max(0, math.floor(x - reach)), min(w, math.ceil(x + reach))),
    )
    dy = (np.arange(window[0].start, window[0].stop) + 0.5 - y)[:, None] / scale
    dx = (np.arange(window[1].start, window[1].stop) + 0.5 - x)[None, :] / scale
    cos, sin = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
    coverage = np.clip(0.5 - scale * distance(cos * dx + sin * dy, cos * dy - sin * dx), 0.0, 1.0)
    return _Object(label, window, coverage)


def _colours(rng: np.random.Generator, background: Floats | None) -> Floats:
    """Two random colours (2, 3) in [0, 255], their mean away from that of the background's colours."""
    for _ in range(16):
        colours = rng.integers(0, 256, size=(2, 3)).astype(np.float64)
        if background is None or np.linalg.norm(colours.mean(0) - background.mean(0)) >= _MIN_CONTRAST:
            break
    return colours


_TEXTURES = ("stripes", "checks", "blocks", "shade")


def _texture(rng: np.random.Generator, size: tuple[int, ...], colours: Floats, unit: float, kinds: Sequence[str]) -> Floats:
    """One of ``kinds`` of pattern between two colours, (h, w, 3); ``unit`` scales it."""
    h, w = size
    kind = kinds[int(rng.integers(len(kinds)))]
    turn, width, phase_a, phase_b = rng.random(4)
    period = unit * (4.0 + 8.0 * width)
    cos, sin = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
    y, x = np.arange(h)[:, None], np.arange(w)[None, :]
    along, across = cos * x + sin * y, cos * y - sin * x
    if kind == "stripes":
        blend = ((along / period + phase_a) % 1.0 < 0.5).astype(np.float64)
    elif kind == "checks":
        blend = (np.floor(2 * along / period + phase_a) + np.floor(2 * across / period + phase_b)) % 2
    elif kind == "blocks":
        block = max(1, int(period / 4))
        grid = rng.random((-(-h // block), -(-w // block)))
        blend = grid.repeat(block, axis=0).repeat(block, axis=1)[:h, :w]
    else:
        span = along.max() - along.min()
        blend = (along - along.min()) / span if span > 0 else np.zeros((h, w))
    return colours[0] + blend[..., None] * (colours[1] - colours[0])


def _box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


# Writers. Scene n of a split shows class n % K; train and test never share a scene.


def write_imagefolder(
    root: str | os.PathLike[str],
    train: int,
    test: int,
    image_size: int | Sequence[int] = 96,
    seed: int = 0,
    clutter: bool = True,
) -> int:
    """Write ``root/{train,test}/<class>/<number>.jpg``.

    Args:
        root: folder, made when absent; files of the same names are replaced.
        train: number of training images, all classes together, dealt out in turn.
        test: number of test images.
        image_size: side in pixels, or (H, W).
        seed: another seed gives another data set.
        clutter: see :func:`render_scene`.

    Returns:
        Number of images written.
    """
    for split, number, scene in _scenes({"train": train, "test": test}, image_size, seed, clutter):
        _save_jpeg(scene, Path(root, split, CLASSES[scene.label], f"{number:06d}.jpg"))
    return train + test


def write_coco(
    root: str | os.PathLike[str],
    train: int,
    test: int,
    image_size: int | Sequence[int] = 96,
    seed: int = 0,
    clutter: bool = True,
) -> int:
    """Write ``root/images/{train,val}/<number>.jpg`` and ``root/annotations/{train,val}.json`` (COCO instances).

    Masks are uncompressed run lengths, exact to the pixel; category ids are class + 1. Arguments and result as for
    :func:`write_imagefolder`.
    """
    categories = [{"id": k + 1, "name": name, "supercategory": "shape"} for k, name in enumerate(CLASSES)]
    contents: dict[str, dict[str, list[Any]]] = {name: {"images": [], "annotations": []} for name in ("train", "val")}
    for split, number, scene in _scenes({"train": train, "val": test}, image_size, seed, clutter):
        images, annotations = contents[split]["images"], contents[split]["annotations"]
        name = f"{number:06d}.jpg"
        _save_jpeg(scene, Path(root, "images", split, name))
        h, w = scene.instances.shape
        images.append({"id": number + 1, "file_name": name, "height": h, "width": w})
        for n, (x1, y1, x2, y2) in enumerate(scene.boxes.tolist()):
            mask = scene.instances == n + 1
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number + 1,
                    "category_id": int(scene.labels[n]) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": [h, w], "counts": _run_lengths(mask)},
                }
            )
    for split, content in contents.items():
        info = {"description": "hgkd generated shapes", "seed": seed}
        text = json.dumps({"info": info, "licenses": [], **content, "categories": categories})
        with written_whole(Path(root, "annotations", f"{split}.json")) as file:
            file.write(text.encode())
    return train + test


def write_ade20k(
    root: str | os.PathLike[str],
    train: int,
    test: int,
    image_size: int | Sequence[int] = 96,
    seed: int = 0,
    clutter: bool = True,
) -> int:
    """Write ``root/{images,annotations}/{training,validation}/<number>``: JPEG images, PNG annotations.

    Annotations are uint8, 0 = other (ADE20K's ignored label), class + 1 elsewhere. Arguments and result as for
    :func:`write_imagefolder`.
    """
    for split, number, scene in _scenes({"training": train, "validation": test}, image_size, seed, clutter):
        _save_jpeg(scene, Path(root, "images", split, f"{number:06d}.jpg"))
        with written_whole(Path(root, "annotations", split, f"{number:06d}.png")) as file:
            Image.fromarray(scene.label_map).save(file, format="PNG")
    return train + test


def _scenes(
    counts: dict[str, int], image_size: int | Sequence[int], seed: int, clutter: bool
) -> Iterator[tuple[str, int, Scene]]:
    """(split, number, scene) for all splits; the first split is the training one whatever it is called."""
    if min(counts.values()) < 0 or not any(counts.values()):
        raise InvalidValueError("shape-counts", f"numbers of images must be 0 or more, and not all 0; got {counts}")
    for place, (split, count) in enumerate(counts.items()):
        for number in range(count):
            yield split, number, render_scene((seed, place, number), image_size, number % len(CLASSES), clutter)


def _save_jpeg(scene: Scene, path: Path) -> None:
    with written_whole(path) as file:
        Image.fromarray(scene.image).save(file, format="JPEG", quality=_JPEG_QUALITY, subsampling=0)


def _run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """COCO's uncompressed run lengths: column by column, beginning with the number of zeros."""
    flat = mask.ravel(order="F").astype(np.int8)
    edges = np.flatnonzero(np.diff(flat, prepend=0)).tolist()
    return [end - start for start, end in zip([0, *edges], [*edges, flat.size], strict=True)]
