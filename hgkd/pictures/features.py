"""Pictures of features: principal components as colours, attention, class activations, nearest images.

Every function returns columns (title -> (B, 3, h, w) in [0, 1], a row an image) for :func:`hgkd.pictures.files.save_picture`.
Sources: principal components as colours, DINOv2 (arXiv 2304.07193); attention of the class token, DINO (arXiv 2104.14294);
activation energy of a CNN, Zagoruyko & Komodakis, "Paying More Attention to Attention" (arXiv 1612.03928); of classifiers
Grad-CAM (arXiv 1610.02391).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

from hgkd.data.images import read_crops
from hgkd.errors import InvalidValueError, unknown_name_message
from hgkd.evaluation.extract import FeatureExtractor, FeatureSet
from hgkd.evaluation.knn import nearest_neighbours
from hgkd.networks.classifier import ImageClassifier
from hgkd.pictures.columns import Columns, colour_basis, token_colours


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
    """Attention as pictures, dark = least and bright = most of that image; see ``FeatureExtractor.attention``.

    Args:
        images, levels: see :func:`pca_columns`.
    """
    columns = {"image": images}
    for level in levels:
        columns[_title(level)] = heat_colours(extractor.attention(images, level))
    return columns


def class_columns(classifier: ImageClassifier, images: Tensor, name: str | None = None) -> tuple[Columns, list[str]]:
    """Class activation as pictures, dark = least and bright = most of that image; see ``ImageClassifier.class_activation``.

    Args:
        images: (B, 3, H, W) in [0, 1].
        name: of the class; None: of each image the one that the network predicts.

    Returns:
        The columns 'image' and 'class', and the name of each row's class.

    Raises:
        ValueError: no such class, or a network without class activations.
    """
    names = classifier.spec.classes or tuple(map(str, range(classifier.spec.num_classes)))
    if name is not None and name not in names:
        raise InvalidValueError("class-unknown", unknown_name_message("class", name, names))
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
        raise InvalidValueError(
            "features-not-finite", f"some {what} are NaN or infinite; the network has diverged or its weights are damaged"
        )
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
    in_chans: int | None = None,
) -> tuple[Columns, list[list[tuple[Path, float]]]]:
    """The images of a bank that are nearest to each query, by cosine, as in the k-NN.

    Args:
        queries, bank: features; ``indices`` are places in the files.
        image_size: of the crops that are shown.
        k: neighbours; a query that is in the bank itself is left out.
        standardise: see ``hgkd.evaluation.knn_scores``.
        value_range, in_chans: see :func:`hgkd.data.images.read_crops`.

    Returns:
        The columns 'query', '1' (nearest), '2', ..., and for every query its neighbours with their cosines.

    Raises:
        ValueError: the bank has fewer other images.
    """
    own = [os.path.realpath(query_files[i]) for i in queries.indices.tolist()]
    known = [bank_files[i] for i in bank.indices.tolist()]
    real = [os.path.realpath(file) for file in known]
    if len(set(real)) < k + 1:
        raise InvalidValueError(
            "neighbours-out-of-range",
            f"{k} neighbours beside the query itself need a bank of {k + 1} images or more, got {len(set(real))}",
        )
    cosines, places = nearest_neighbours(bank.features, queries.features, min(len(known), k + 1), standardise=standardise)
    found: list[list[tuple[Path, float]]] = []
    for query, row, values in zip(own, places.tolist(), cosines.tolist(), strict=True):
        others = [(known[i], value) for i, value in zip(row, values, strict=True) if real[i] != query]
        found.append(others[:k])

    def shown(files: Sequence[Path]) -> Tensor:
        crops = read_crops(files, image_size, value_range, in_chans)
        return crops if crops.is_floating_point() else crops / 255

    columns = {"query": shown([query_files[i] for i in queries.indices.tolist()])}
    for rank in range(k):
        columns[str(rank + 1)] = shown([row[rank][0] for row in found])
    return columns, found
