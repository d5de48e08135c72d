"""Make every picture of the README and of docs/ from real runs of this project.

    python tools/docs_pictures.py --out docs/pictures [--only features ...] [--runs FOLDER] [--quick]
    python tools/docs_pictures.py --out docs/pictures --tutorial FOLDER

Nothing is downloaded: the images are generated shapes. Two runs are made, unless their folders are given: `hgkd demo` (a
teacher, a student and the control), and a RetinaNet on boxes of shapes that starts from the demo's student, as a graph for
onnxruntime. --demo takes a folder that `hgkd demo --out FOLDER` has filled, --detector one of `hgkd export --part model --to
onnx`. The engine's pictures are drawn from the engine's own layouts, indices and outputs; the curves from a table of the page
of results. The tutorials' pictures are what their commands leave: --tutorial takes the folder in which a tutorial was typed,
and makes small copies of those that it finds there.
"""

from __future__ import annotations

import argparse
import copy
import io
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

import hgkd
from hgkd.api.demo import IMAGE_SIZE, Plan, demo
from hgkd.config.reading import check_plain_data
from hgkd.data.shapes import CLASSES, render_scene, write_coco
from hgkd.differences import largest_difference
from hgkd.openmmlab import register_ops
from hgkd.pictures.columns import hide_cells, picture_grid
from hgkd.pictures.distillation import distillation_columns
from hgkd.pictures.predictions import class_colour, draw_boxes
from hgkd.registry import MODELS
from hgkd.sparse import CellLayout, PackedTensor, sparsify
from hgkd.weights.identify import identify
from hgkd.weights.loading import load_strict
from hgkd.weights.run_file import literal_config
from hgkd.weights.run_folder import find_last_checkpoint
from hgkd.writing import written_beside

ROOT = Path(__file__).resolve().parents[1]
DETECTOR = ROOT / "downstream/detection/retinanet_r18_12e_shapes.py"
LIMIT = 120_000  # bytes of a picture: a page of the site loads at once, and the repository stays small
SEED = 7  # of the scenes that are shown, which no run has seen
VISIBLE, HIDDEN, MARKED = "#2a7f4f", "#c9c9c9", "#d1495b"


@dataclass(frozen=True)
class Sizes:
    """How long the two runs are.

    Attributes:
        demo: of the demo.
        boxes: training images of the detector.
        epochs: of the detector.
    """

    demo: Plan
    boxes: int
    epochs: int


FULL = Sizes(Plan(), boxes=400, epochs=3)
# a detector of fewer steps finds nothing, and such a one is not exported
QUICK = Sizes(Plan(train=640, test=160, teacher_epochs=4, student_epochs=2, probe=80), boxes=400, epochs=3)


@dataclass
class Runs:
    """The two runs that pictures are made from; each is made when it is first asked for.

    Attributes:
        scratch: folder for runs that are made here; those that it holds are not made again.
        sizes: of these runs.
        given_demo, given_detector: folders of runs that are there already.
    """

    scratch: Path
    sizes: Sizes
    given_demo: Path | None = None
    given_detector: Path | None = None

    @cached_property
    def demo(self) -> Path:
        """A folder of ``hgkd demo``."""
        if self.given_demo is not None:
            return self.given_demo
        out = self.scratch / "demo"
        if not (out / "report.html").exists():  # what it writes last
            demo(out, seed=0, plan=self.sizes.demo)
        return out

    @cached_property
    def detector(self) -> Path:
        """An exported detector, as a graph."""
        if self.given_detector is not None:
            return self.given_detector
        data, work_dir, out = (self.scratch / name for name in ("boxes", "detector", "detector_onnx"))
        if out.exists():
            return out
        write_coco(data, train=self.sizes.boxes, test=16, image_size=96, seed=0, clutter=False)
        options = {
            "data_root": f"{data}/",
            "backbone": str(self.demo / "student"),
            "epochs": self.sizes.epochs,
            "seed": 0,
            "optim_wrapper.optimizer.lr": 1e-3,  # at the recipe's 2e-4 so few steps find boxes, and no classes
            "val_evaluator.ann_file": f"{data}/annotations/val.json",
            "test_evaluator.ann_file": f"{data}/annotations/val.json",
        }
        hgkd.train(DETECTOR, work_dir, options=options)
        hgkd.export(work_dir, out, to="onnx", part="model", images=data / "images/val", max_images=4)
        return out


def scenes(count: int, size: int, first_label: int = 0) -> list[np.ndarray]:
    """Plain generated scenes that no run has seen, uint8 (size, size, 3), classes in turn."""
    return [render_scene((SEED, n), size, (first_label + n) % len(CLASSES), clutter=False).image for n in range(count)]


def as_batch(images: Sequence[np.ndarray]) -> Tensor:
    """uint8 (B, 3, H, W)."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def features(runs: Runs) -> Image.Image:
    """What the demo's student sees of images, and its features beside those of its teacher."""
    file = identify(find_last_checkpoint(runs.demo / "runs/hgkd"))
    config = literal_config(file.meta["cfg"])["model"]
    config["teacher"]["checkpoint"] = str(runs.demo / "teacher.safetensors")  # the folder may have been moved
    check_plain_data(config, str(file.path))
    model = MODELS.build({"_scope_": "hgkd", **config})
    load_strict(model, file.content["state_dict"], source=str(file.path))
    found = distillation_columns(model, as_batch(scenes(3, IMAGE_SIZE)), seed=SEED)
    shown = {
        "image": found["image"],
        "what the student sees": found["seen"],
        "teacher, from the whole image": found["hgkd: teacher"],
        "student, from the visible cells": found["hgkd: student"],
    }
    larger = {title: F.interpolate(maps, size=192, mode="nearest") for title, maps in shown.items()}
    return Image.fromarray(picture_grid(larger))


def detections(runs: Runs) -> Image.Image:
    """The best box of each image that the detector has not seen, found by onnxruntime."""
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        images = [Image.fromarray(image) for image in scenes(8, 96)]
        for n, image in enumerate(images):
            image.save(Path(folder) / f"{n}.png")
        hgkd.predict(runs.detector, folder, told=lines.append, score_threshold=0.05)
    zoom, tiles = 2, []
    for image, line in zip(images, lines, strict=True):
        best = sorted(line["objects"], key=lambda item: -item["score"])[:1]  # an image holds one object
        found = [{**item, "box": [zoom * side for side in item["box"]]} for item in best]
        tiles.append(np.asarray(draw_boxes(image.resize((96 * zoom, 96 * zoom), Image.Resampling.BICUBIC), found)))
    columns = {" " * n: as_batch([tiles[n], tiles[n + 4]]).float() / 255 for n in range(4)}
    return Image.fromarray(picture_grid(columns)[14:])  # without the strip of titles


# The engine. One image of 4 x 4 cells of 32 pixels, seven of them visible.

CELL = 32
SEEN = torch.tensor([[[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [1, 0, 0, 1]]], dtype=torch.bool)


def shown_image() -> Tensor:
    """(1, 3, 128, 128) in [0, 1]."""
    return as_batch([render_scene((SEED, 3), 128, 6, clutter=True).image]).float() / 255


def engine_cells(runs: Runs) -> Image.Image:
    """An image, its mask cells, and the positions of feature maps that each stride keeps."""
    figure = Figure(figsize=(9.0, 2.6), layout="constrained")
    axes = figure.subplots(1, 5)
    image = shown_image()
    for axis, title, pixels in (
        (axes[0], "image, 4 x 4 cells", image),
        (axes[1], "visible cells", hide_cells(image, SEEN, 0.8)),
    ):
        axis.imshow(pixels[0].permute(1, 2, 0).numpy())
        _cell_lines(axis, CELL)
        axis.set_title(title, fontsize=9)
    layout = CellLayout(SEEN, CELL)
    for axis, stride in zip(axes[2:], (4, 8, 32), strict=True):
        mask, side = layout.mask(stride)[0, 0], layout.side(stride)
        axis.imshow(np.where(mask[..., None], _colour(VISIBLE), _colour(HIDDEN)))
        for place in range(1, len(mask)):
            axis.axhline(place - 0.5, color="white", lw=0.3)
            axis.axvline(place - 0.5, color="white", lw=0.3)
        _cell_lines(axis, side)
        axis.set_title(f"stride {stride}: {side} x {side} positions\na cell, {int(mask.sum())} of {mask.numel()}", fontsize=9)
    return _drawn(figure)


def engine_tiles(runs: Runs) -> Image.Image:
    """The visible cells of an image, and the batch of tiles that they become."""
    image, layout = shown_image(), CellLayout(SEEN, CELL)
    tiles = PackedTensor.pack(image, layout).plain
    figure = Figure(figsize=(9.0, 2.3), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.0, 3.4))
    axis = left.subplots()
    axis.imshow(hide_cells(image, SEEN, 0.8)[0].permute(1, 2, 0).numpy())
    _cell_lines(axis, CELL)
    places = layout.positions(1).view(-1).tolist()
    for number, place in enumerate(places):
        y, x = divmod(place, SEEN.shape[2])
        _number(axis, number, CELL * x + CELL / 2, CELL * y + CELL / 2)
    axis.set_title("(1, 3, 128, 128), masked", fontsize=9)
    for number, axis in enumerate(right.subplots(1, len(tiles))):
        axis.imshow(tiles[number].permute(1, 2, 0).numpy())
        _number(axis, number, CELL / 2, CELL / 2)
        axis.set_axis_off()
    right.suptitle(f"packed: {tuple(tiles.shape)}, one tile a visible cell", fontsize=9)
    return _drawn(figure)


def engine_gather(runs: Runs) -> Image.Image:
    """The positions that a 3 x 3 convolution reads for one tile, by the engine's own index."""
    side, number = 4, 2  # tile 2 has visible and hidden neighbours
    layout = CellLayout(SEEN, CELL)
    index = layout.neighbours(side, side, 1, (-1, 0, 1), (-1, 0, 1), outside=1)  # (T * side * side, 9)
    nowhere = layout.num_cells * side * side
    rows = index[number * side * side : (number + 1) * side * side].flatten().unique()
    rows = rows[rows < nowhere]
    height, width = (cells * side for cells in layout.grid)
    pixels = np.where(layout.mask(CELL // side)[0, 0][..., None], _colour(VISIBLE, 0.35), _colour(HIDDEN))
    for place in layout.positions(side)[rows].tolist():
        pixels[divmod(place, width)] = _colour(VISIBLE)
    figure = Figure(figsize=(7.6, 3.4), layout="constrained")
    axis, text = figure.subplots(1, 2, width_ratios=(1.0, 1.15))
    axis.imshow(pixels)
    for place in range(1, height):
        axis.axhline(place - 0.5, color="white", lw=0.4)
        axis.axvline(place - 0.5, color="white", lw=0.4)
    _cell_lines(axis, side)
    y, x = divmod(int(layout.positions(1)[number]), SEEN.shape[2])
    corner = (side * x - 0.5, side * y - 0.5)
    axis.add_patch(Rectangle(corner, side, side, fill=False, ec="black", lw=2))
    reach = (corner[0] - 1, corner[1] - 1)
    axis.add_patch(Rectangle(reach, side + 2, side + 2, fill=False, ec=MARKED, lw=1.5, ls="--"))
    axis.set_title(f"cells of {side} x {side} positions", fontsize=9)
    text.set_axis_off()
    text.set(xlim=(0, 1), ylim=(0, 1))
    for n, (colour, line) in enumerate(
        (
            (_colour(VISIBLE), f"read: {len(rows)} positions of visible cells"),
            (_colour(VISIBLE, 0.35), "visible, not read for this tile"),
            (_colour(HIDDEN), f"hidden: inside the dashed line they\ncount as 0 ({(side + 2) ** 2 - len(rows)} positions)"),
        )
    ):
        text.add_patch(Rectangle((0.0, 0.80 - 0.22 * n), 0.08, 0.1, fc=colour, ec="black", lw=0.5))
        text.text(0.12, 0.85 - 0.22 * n, line, va="center", fontsize=9)
    text.text(0.0, 0.12, "black: one tile\ndashed: what a 3 x 3 convolution\nneeds for it", va="center", fontsize=9)
    return _drawn(figure)


@torch.no_grad()
def engine_exact(runs: Runs) -> Image.Image:
    """The same layers three ways: a mask on the pixels alone, dense with masks at every layer, sparse."""
    torch.manual_seed(0)
    network = timm.create_model("resnet18", num_classes=0, global_pool="", features_only=True, out_indices=(2,)).double().eval()
    image = shown_image().double()
    seen = layout_mask(image)
    once = network(image * seen)[0]
    maps = {"masked": None, "gather": None}
    for backend in maps:
        found = sparsify(copy.deepcopy(network), CELL, backend)(image, visible=SEEN)[0]
        maps[backend] = found.to_dense()
    away = largest_difference(maps["gather"], maps["masked"], 1e-30)
    if away > 1e-12:
        raise RuntimeError(f"the two backends differ by {away:.1e} of the largest value")
    columns = {
        "image masked once": once,
        "masked in every layer": maps["masked"],
        "sparse: visible cells only": maps["gather"],
    }
    figure = Figure(figsize=(8.4, 2.9), layout="constrained")
    axes = figure.subplots(1, 4)
    top = float(maps["masked"].abs().mean(1).max())
    for axis, (title, values) in zip(axes, columns.items(), strict=False):
        axis.imshow(values.abs().mean(1)[0].numpy(), cmap="viridis", vmin=0, vmax=top)
        _cell_lines(axis, CELL // 8, "white")
        axis.set_title(title, fontsize=9)
    axes[3].imshow(np.zeros_like(once[0, 0].numpy()), cmap="viridis", vmin=0, vmax=top)
    axes[3].imshow((maps["gather"] - maps["masked"]).abs().mean(1)[0].numpy(), cmap="viridis", vmin=0, vmax=top)
    _cell_lines(axes[3], CELL // 8, "white")
    axes[3].set_title(f"difference of these two:\nat most {away:.0e} of the largest", fontsize=9)
    return _drawn(figure)


def layout_mask(image: Tensor) -> Tensor:
    """1 at visible pixels of the shown image, 0 at hidden ones: (1, 1, H, W)."""
    return CellLayout(SEEN, CELL).mask_as(1, image.dtype)


def curves(runs: Runs) -> Image.Image:
    """k-NN over the epochs of the first comparison, as the page of results gives it."""
    rows = results_table("after epoch")
    figure = Figure(figsize=(8.0, 2.8), layout="constrained")
    axis = figure.subplots()
    for name, values in rows.items():
        axis.plot(range(1, len(values) + 1), values, marker="o", ms=4, label=name)
    axis.set(xlabel="epoch (4 epochs = 372 steps of 32 images)", ylabel="k-NN top-1 %", xticks=[1, 2, 3, 4])
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _drawn(figure)


def screen(runs: Runs) -> Image.Image:
    """k-NN over the processor time of the screen of maskings, as the page of results gives it."""
    return _over_time("700 s, after each epoch", 700.0)


def long_runs(runs: Runs) -> Image.Image:
    """The same of the longest runs."""
    return _over_time("4,500 s, after each epoch", 4500.0)


def _over_time(head: str, budget: float) -> Image.Image:
    """Curves of a table of the page of results, whose rows spend a budget of processor seconds in equal epochs."""
    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    axis = figure.subplots()
    for name, values in results_table(head).items():
        seconds = [budget * (i + 1) / len(values) for i in range(len(values))]
        size = 3 if len(values) < 30 else 2
        axis.plot(seconds, values, ls="--" if name.startswith("dense") else "-", marker="o", ms=size, lw=1, label=name)
    axis.set(xlabel="processor seconds of the training", ylabel="k-NN top-1 % (400 images)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _drawn(figure)


def results_table(head: str) -> dict[str, list[float]]:
    """The first table of the page of results whose head begins so: row -> all numbers in it."""
    (page,) = [path for path in (ROOT / "docs/background/results.md", ROOT / "docs/results.md") if path.exists()]
    table = rf"^\| {re.escape(head)} \|[^\n]*\n\|[-|]+\n((?:\|[^\n]*\n)+)"
    found = re.search(table, page.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{page} has no table {head!r}")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()]
    return {name: [float(value) for cell in values for value in cell.split(",") if value] for name, *values in cells}


def _colour(name: str, alpha: float = 1.0) -> np.ndarray:
    """RGB (3,) in [0, 1] of '#rrggbb' on white."""
    rgb = np.array([int(name[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return alpha * rgb + (1 - alpha)


def _cell_lines(axis: Axes, side: int, colour: str = "black") -> None:
    """Lines between the 4 x 4 cells, and no ticks."""
    for place in range(side, 4 * side, side):
        axis.axhline(place - 0.5, color=colour, lw=0.8)
        axis.axvline(place - 0.5, color=colour, lw=0.8)
    axis.set(xticks=[], yticks=[])


def _number(axis: Axes, number: int, x: float, y: float) -> None:
    axis.text(
        x, y, str(number), ha="center", va="center", fontsize=10, color="white", bbox={"fc": "black", "pad": 1.5, "lw": 0}
    )


def _drawn(figure: Figure) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return Image.open(buffer).convert("RGB")


@dataclass(frozen=True)
class Left:
    """Pictures that a tutorial's commands leave in the reader's folder, as one picture of its page.

    Attributes:
        files: where they lie, as a pattern.
        take: how many of them, side by side; -1: the last one.
        height: of the picture of a page, in pixels.
    """

    files: str
    take: int = 1
    height: int = 556

    def picture(self, folder: Path) -> Image.Image | None:
        """None where the folder has no such files."""
        found = sorted(folder.glob(self.files))
        found = found[-1:] if self.take < 0 else found[: self.take]
        shown = [_at_height(_in_colours(Image.open(file)), self.height) for file in found]
        if not shown:
            return None
        gap = 4
        sheet = Image.new("RGB", (sum(part.width + gap for part in shown) - gap, self.height), "white")
        left = 0
        for part in shown:
            sheet.paste(part, (left, 0))
            left += part.width + gap
        return sheet


def _at_height(picture: Image.Image, height: int) -> Image.Image:
    enlarged = picture.height < height  # features are squares of pixels, which stay sharp
    size = round(picture.width * height / picture.height), height
    return picture.resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)


def _in_colours(picture: Image.Image) -> Image.Image:
    """A label map in the colours of its classes; any other picture as it is."""
    if picture.mode != "L":
        return picture.convert("RGB")
    labels = np.asarray(picture)
    return Image.fromarray(np.array([class_colour(index) for index in range(256)], dtype=np.uint8)[labels])


TUTORIALS = {
    "tutorial_student": Left("demo_out/runs/hgkd/pictures/epoch_*.png", take=-1),
    "tutorial_neighbours": Left("pictures/neighbours.png"),
    "tutorial_compared": Left("compared/picture.png", height=374),
    "tutorial_relations": Left("compared/relations_seed0/pictures/epoch_*.png", take=-1),
    "tutorial_detector_student": Left("work_dirs/student/pictures/epoch_4.png", height=534),
    "tutorial_detector_boxes": Left("predicted/pictures/BloodImage_*.jpg", take=3, height=360),
    "tutorial_segmentor_label_map": Left("predicted/label_maps/*.png", height=360),
}
PICTURES: dict[str, Callable[[Runs], Image.Image]] = {
    made.__name__: made
    for made in (engine_cells, engine_tiles, engine_gather, engine_exact, curves, screen, long_runs, features, detections)
}


def save(picture: Image.Image, path: Path) -> int:
    """Write a WebP file, without loss where that fits the limit; returns its bytes."""
    for options in ({"lossless": True}, {"quality": 90}, {"quality": 75}):
        buffer = io.BytesIO()
        picture.save(buffer, format="WEBP", method=6, **options)
        if buffer.tell() <= LIMIT:
            with written_beside(path) as beside:
                beside.write_bytes(buffer.getvalue())
            return buffer.tell()
    raise RuntimeError(f"{path.name} of {picture.size} pixels takes {buffer.tell()} bytes, more than {LIMIT}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--only", nargs="+", choices=sorted(PICTURES), metavar="NAME", help=", ".join(PICTURES))
    parser.add_argument("--demo", type=Path, help="folder that hgkd demo has filled")
    parser.add_argument("--detector", type=Path, help="folder of hgkd export --part model --to onnx")
    parser.add_argument("--tutorial", type=Path, help="folder in which a tutorial was typed: its pictures alone are made")
    parser.add_argument("--runs", type=Path, help="folder that keeps the runs; those that it holds are not made again")
    parser.add_argument("--quick", action="store_true", help="short runs: that everything works, not how it looks")
    args = parser.parse_args(argv)
    register_ops()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.tutorial:
        made = {name: picture for name, left in TUTORIALS.items() if (picture := left.picture(args.tutorial))}
        for name, picture in made.items():
            path = args.out / f"{name}.webp"
            print(f"{path}: {save(picture, path) / 1000:.0f} kB", flush=True)
        if not made:
            parser.error(f"{args.tutorial} has no picture of a tutorial, e.g. {TUTORIALS['tutorial_student'].files}")
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        runs = Runs(args.runs or Path(scratch), QUICK if args.quick else FULL, args.demo, args.detector)
        for name in args.only or PICTURES:
            path = args.out / f"{name}.webp"
            print(f"{path}: {save(PICTURES[name](runs), path) / 1000:.0f} kB", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
