"""Pictures of what a backbone has learnt, of any subject that can be evaluated: features as colours, where it looks, which
images it finds alike, what a masked model makes of hidden places, and what speaks for a classifier's answer.

Every function returns columns (title -> (B, 3, h, w) in [0, 1], a row an image) for :func:`save_picture`.
Sources: principal components as colours, DINOv2 (arXiv 2304.07193); attention of the class token, DINO (arXiv 2104.14294);
activation energy of a CNN, Zagoruyko & Komodakis, "Paying More Attention to Attention" (arXiv 1612.03928); of classifiers
Grad-CAM (arXiv 1610.02391); reconstructions, MAE (arXiv 2111.06377) and SparK (arXiv 2301.03580).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import matplotlib
import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor
from torch.utils.data import Dataset

from hgkd.classifiers import ImageClassifier
from hgkd.data.images import IMAGE_EXTENSIONS, find_images, read_rgb
from hgkd.data.pixels import as_value_range
from hgkd.data.transforms import eval_transform
from hgkd.engine.checkpoints import checkpoint_file
from hgkd.engine.config import check_plain_data
from hgkd.engine.hooks import distillation_columns
from hgkd.engine.pictures import colour_basis, hide_cells, picture_grid, token_colours
from hgkd.engine.weights import load_strict, read_checkpoint
from hgkd.errors import DataError, unknown_name_message
from hgkd.evaluation.extract import FeatureExtractor, FeatureSet
from hgkd.evaluation.knn import nearest_neighbours
from hgkd.evaluation.report import Picture, Section, write_report
from hgkd.export.source import literal_config
from hgkd.masking import RandomMask, grid_of
from hgkd.registry import MODELS
from hgkd.writing import written_beside

Columns = dict[str, Tensor]
PAGE = "pictures.html"  # not report.html, which a demo or comparison may have written into the folder
_CAPTION = "Description"  # PNG's own keyword for it


# --- images in, pictures out -----------------------------------------------------------------------------------------------


def find_files(sources: Sequence[str | os.PathLike[str]], limit: int | None = None) -> list[Path]:
    """Image files among ``sources``: files as they are, folders searched at any depth, by name; at most ``limit``.

    Raises:
        FileNotFoundError: a source does not exist.
        DataError: there is no image.
    """
    found: list[Path] = []
    for source in map(lambda path: Path(path).expanduser(), sources):
        if source.is_dir():
            found += [source / name for name in find_images(str(source))]
        elif source.is_file():
            found.append(source)
        else:
            raise FileNotFoundError(f"image or folder {source} does not exist")
    if not found:
        raise DataError(
            f"no images in {', '.join(map(str, sources))}; looked for files ending in {', '.join(IMAGE_EXTENSIONS)}"
        )
    return found[:limit]


def read_images(files: Sequence[Path], image_size: int | Sequence[int], value_range: Sequence[float] | None = None) -> Tensor:
    """Centre crops of images, uint8 (B, 3, H, W); ``value_range`` as for :class:`hgkd.data.UnlabelledImages`.

    Raises:
        DataError: a file cannot be read.
    """
    crop, value_range = eval_transform(image_size), as_value_range(value_range)
    images = []
    for file in files:
        try:
            images.append(crop(read_rgb(file, value_range)))
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
            raise DataError(f"image {file} cannot be read ({type(error).__name__}: {error}); leave it out") from error
    return torch.stack(images)


def save_picture(columns: Columns, folder: str | os.PathLike[str], name: str, caption: str) -> Path:
    """Write ``folder/<name>.png``, and the folder's page anew with all pictures that such calls have put there.

    A caption stands inside its picture's file. Returns the picture's path.

    Raises:
        WriteError: the disk does not take it; a picture that was there is untouched.
    """
    folder = Path(folder)
    notes = PngImagePlugin.PngInfo()
    notes.add_itxt(_CAPTION, caption)
    path = folder / f"{name}.png"
    picture = Image.fromarray(picture_grid(columns))
    with written_beside(path) as beside:
        picture.save(beside, pnginfo=notes)
    write_page(folder)
    return path


def write_page(folder: str | os.PathLike[str], title: str = "hgkd pictures") -> Path:
    """``folder/PAGE`` with every PNG of the folder under its name, oldest first."""
    sections = []
    for file in sorted(Path(folder).glob("*.png"), key=lambda path: (path.stat().st_mtime_ns, path.name)):
        with Image.open(file) as picture:
            caption = str(picture.info.get(_CAPTION, ""))
        sections.append(Section(file.stem, [Picture(file, caption)]))
    return write_report(Path(folder) / PAGE, title, sections)


# --- features --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def pca_columns(extractor: FeatureExtractor, images: Tensor, levels: Sequence[int | None] = (None,)) -> Columns:
    """Features as colours: the three main directions of variation over all images become red, green and blue.

    Args:
        images: (B, 3, H, W) in [0, 1].
        levels: see ``FeatureExtractor.maps``; a column each, with colours of its own.
    """
    columns = {"image": images}
    for level in levels:
        maps = _finite(extractor.maps(images, level).float(), "features")
        columns[_title(level)] = token_colours(maps, colour_basis(maps))
    return columns


@torch.no_grad()
def attention_columns(extractor: FeatureExtractor, images: Tensor, levels: Sequence[int | None] = (None,)) -> Columns:
    """Where the network looks, dark = least and bright = most of that image; see ``FeatureExtractor.attention``.

    Args:
        images, levels: see :func:`pca_columns`.
    """
    columns = {"image": images}
    for level in levels:
        columns[_title(level)] = heat_colours(extractor.attention(images, level))
    return columns


def class_columns(classifier: ImageClassifier, images: Tensor, name: str | None = None) -> tuple[Columns, list[str]]:
    """What speaks for a class, dark = least and bright = most of that image; see ``ImageClassifier.class_activation``.

    Args:
        images: (B, 3, H, W) in [0, 1].
        name: of the class; None: of each image the one that the network answers.

    Returns:
        The columns 'image' and 'class', and the name of each row's class.

    Raises:
        ValueError: no such class, or a network without class activations.
    """
    names = classifier.spec.classes or tuple(map(str, range(classifier.spec.num_classes)))
    if name is not None and name not in names:
        raise ValueError(unknown_name_message("class", name, names))
    classes = None if name is None else torch.full((len(images),), names.index(name), device=images.device)
    maps, shown = classifier.class_activation(classifier.normalise(images), classes)
    return {"image": images, "class": heat_colours(maps)}, [names[index] for index in shown.tolist()]


def heat_colours(maps: Tensor) -> Tensor:
    """Maps (B, h, w) -> RGB (B, 3, h, w) in [0, 1], each from its own lowest to its own highest; constant ones are dark.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    maps = _finite(maps.float().cpu(), "maps")
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    scaled = (maps - low) / (high - low).clamp_min(1e-12)
    colours = matplotlib.colormaps["inferno"](scaled.numpy())[..., :3]
    return torch.from_numpy(np.ascontiguousarray(colours)).float().permute(0, 3, 1, 2)


def _finite(values: Tensor, what: str) -> Tensor:
    """The values themselves; of NaN or infinity there is no picture, and it would look like one."""
    if not values.isfinite().all():
        raise ValueError(f"some {what} are NaN or infinite; the network has diverged or its weights are damaged")
    return values


def _title(level: int | None) -> str:
    return "last" if level is None else f"level {level}"


def neighbour_columns(
    queries: FeatureSet,
    query_files: Sequence[Path],
    bank: FeatureSet,
    bank_files: Sequence[Path],
    image_size: int | Sequence[int],
    k: int = 5,
    standardise: bool = True,
    value_range: Sequence[float] | None = None,
) -> tuple[Columns, list[list[tuple[Path, float]]]]:
    """The images of a bank that are nearest to each query, by cosine, as in the k-NN.

    Args:
        queries, bank: features; ``indices`` are places in the files.
        image_size: of the crops that are shown.
        k: neighbours; a query that is in the bank itself is left out.
        standardise: see ``hgkd.evaluation.knn_scores``.
        value_range: see :func:`read_images`.

    Returns:
        The columns 'query', '1' (nearest), '2', ..., and for every query its neighbours with their cosines.

    Raises:
        ValueError: the bank has not so many other images.
    """
    own = [os.path.realpath(query_files[i]) for i in queries.indices.tolist()]
    known = [bank_files[i] for i in bank.indices.tolist()]
    real = [os.path.realpath(file) for file in known]
    if len(set(real)) < k + 1:
        raise ValueError(f"{k} neighbours beside the query itself need a bank of {k + 1} images or more, got {len(set(real))}")
    cosines, places = nearest_neighbours(bank.features, queries.features, min(len(known), k + 1), standardise=standardise)
    found: list[list[tuple[Path, float]]] = []
    for query, row, values in zip(own, places.tolist(), cosines.tolist(), strict=True):
        others = [(known[i], value) for i, value in zip(row, values, strict=True) if real[i] != query]
        found.append(others[:k])
    columns = {"query": read_images([query_files[i] for i in queries.indices.tolist()], image_size, value_range) / 255}
    for rank in range(k):
        columns[str(rank + 1)] = read_images([row[rank][0] for row in found], image_size, value_range) / 255
    return columns, found


class ImageFiles(Dataset[dict[str, Any]]):
    """Given files as a data set for ``hgkd.evaluation.extract``; an unreadable one raises DataError."""

    def __init__(
        self, files: Sequence[Path], image_size: int | Sequence[int], value_range: Sequence[float] | None = None
    ) -> None:
        self.files = list(files)
        self.image_size = image_size
        self.value_range = value_range

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"inputs": read_images([self.files[index]], self.image_size, self.value_range)[0], "label": -1, "index": index}


# --- reconstruction --------------------------------------------------------------------------------------------------------


class Reconstructor(Protocol):
    """A masked model that predicts pixels.

    Attributes:
        image_size: (H, W) that it was trained with.
        mask_ratio: share of hidden cells in its training; of files that do not say, MAE's 0.75.
    """

    image_size: tuple[int, int]
    mask_ratio: float

    def columns(self, inputs: Tensor, mask_ratio: float, seed: int) -> Columns:
        """Image, what is seen of it, and the reconstruction, of uint8 images (B, 3, H, W)."""


def load_reconstructor(checkpoint: str | os.PathLike[str]) -> Reconstructor:
    """The pixel-predicting model in a file.

    A checkpoint of a distillation with ``PixelReconstruction`` (SparK's objective, with a CNN or a ViT student), of
    ``MAEPretraining``, or a MAE file with decoder.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no model that predicts pixels.
        WeightsError: damaged, or no such file at all.
    """
    path = checkpoint_file(checkpoint)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    content = read_checkpoint(path)
    meta = content.get("meta") if isinstance(content, Mapping) else None
    config = literal_config(meta.get("cfg")) if isinstance(meta, Mapping) else {}
    model = config.get("model") or {}
    if model.get("type") == "MaskedDistiller":
        return _DistilledPixels(path, model, content["state_dict"])
    return _MAEPixels(path, model)


@dataclass
class _DistilledPixels:
    """A student with a pixel objective, without teacher and other objectives."""

    path: Path
    model: Mapping[str, Any]
    state: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        objectives = self.model.get("objectives") or {}
        pixels = [name for name, objective in objectives.items() if objective.get("type") == "PixelReconstruction"]
        if not pixels:
            kinds = ", ".join(str(objective.get("type")) for objective in objectives.values())
            raise ValueError(
                f"{self.path} was trained with {kinds or 'no objective'} and predicts no pixels; a reconstruction needs a "
                "checkpoint with PixelReconstruction (configs/spark), or a MAE"
            )
        self.name = pixels[0]
        size = self.model["image_size"]
        self.image_size = (size, size) if isinstance(size, int) else tuple(size)
        self.mask_ratio = float((self.model.get("mask") or {}).get("mask_ratio", 0.6))

    def columns(self, inputs: Tensor, mask_ratio: float, seed: int) -> Columns:
        started_from = ("encoder_checkpoint", "checkpoint", "pretrained")  # the weights are in the checkpoint
        config = {
            "type": "MaskedDistiller",
            "student": {key: value for key, value in self.model["student"].items() if key not in started_from},
            "objectives": {self.name: self.model["objectives"][self.name]},
            "mask": {"type": "RandomMask", "mask_ratio": mask_ratio},
            "image_size": tuple(inputs.shape[-2:]),
        }
        check_plain_data(config, str(self.path))
        model = MODELS.build({"_scope_": "hgkd", **config})
        parts = ("student.", f"objectives.{self.name}.")
        load_strict(model, {k: v for k, v in self.state.items() if k.startswith(parts)}, source=str(self.path))
        columns = distillation_columns(model, inputs, seed)
        columns["reconstruction"] = columns.pop(self.name)
        return columns


class _MAEPixels:
    """A masked autoencoder with its decoder."""

    def __init__(self, path: Path, model: Mapping[str, Any]) -> None:
        from hgkd.teachers.mae import MAETeacher, read_mae

        arch, _, pixels = read_mae(path)
        self.teacher = MAETeacher(path, allow_random=True)
        self.teacher.require_decoder()
        self.norm_pix = pixels.get("norm_pix") is not False  # files that do not say: MAE's default
        self.image_size = arch.image_size
        self.cell = int(model.get("mask_cell") or arch.patch_size)
        self.mask_ratio = float(model.get("mask_ratio", 0.75))

    @torch.no_grad()
    def columns(self, inputs: Tensor, mask_ratio: float, seed: int) -> Columns:
        from hgkd.teachers.mae import patchify, unpatchify

        patch = self.teacher.info.patch_size
        cells = grid_of((inputs.shape[-2], inputs.shape[-1]), self.cell)
        grid = self.teacher.prepare(cells, self.cell)
        images = inputs.float() / 255
        generator = torch.Generator().manual_seed(seed)
        visible = RandomMask(mask_ratio, rounding="floor")(len(images), cells, device="cpu", generator=generator)
        patches = self.teacher.patch_mask(visible)
        kept = patches.nonzero()[:, 1].view(len(images), -1)
        normalised = (images - self.teacher.mean) / self.teacher.deviation
        network = self.teacher.network
        predicted = network.predict_pixels(network.encode(normalised, kept), kept)
        if self.norm_pix:  # back with the true mean and deviation of each patch, which the network never sees
            own = patchify(normalised, patch)
            predicted = predicted * (own.var(-1, keepdim=True) + 1e-6).sqrt() + own.mean(-1, keepdim=True)
        predicted = torch.where(patches[:, :, None], patchify(normalised, patch), predicted)
        pixels = unpatchify(predicted, patch, grid) * self.teacher.deviation + self.teacher.mean
        return {"image": images, "seen": hide_cells(images, visible), "reconstruction": pixels.clamp(0.0, 1.0)}


def reconstruction_columns(
    model: Reconstructor, inputs: Tensor, mask_ratio: float | None = None, seed: int = 0
) -> tuple[Columns, float]:
    """What a masked model makes of hidden places, and the share of hidden cells that was used.

    Hidden places are brought back to pixels with their own true mean and deviation where the model was trained on standardised
    ones (as MAE's and SparK's pictures are): colours and contrast are then given, only the structure is the model's.

    Args:
        inputs: uint8 (B, 3, H, W).
        mask_ratio: share of hidden cells in (0, 1); None: that of its training.
        seed: of the mask.

    Raises:
        ValueError: a ratio that hides nothing or everything, a size that the model cannot take, or a prediction of NaN.
    """
    ratio = model.mask_ratio if mask_ratio is None else mask_ratio
    if not 0.0 < ratio < 1.0:
        raise ValueError(f"mask_ratio is the share of hidden cells, in (0, 1), got {ratio}")
    columns = model.columns(inputs, ratio, seed)
    _finite(columns["reconstruction"], "predicted pixels")
    return columns, ratio
