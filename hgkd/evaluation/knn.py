"""Weighted k-nearest-neighbour classification of frozen features, and the health of those features: no training.

k-NN: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (arXiv 1805.01978), with the
settings of Caron et al., DINO (arXiv 2104.14294): features of length 1, votes exp(cosine / T), k = 20, T = 0.07.
Effective rank: Roy & Vetterli, "The effective rank", EUSIPCO 2007. Spread of the features: Chen & He, SimSiam
(arXiv 2011.10566, section 4.1), times sqrt(C).

Differences from DINO: channels are standardised with the bank's mean and std first (default;
``standardise=False`` gives DINO's own), because pooled CNN features after a ReLU all point into one corner, where
cosines hardly differ; and the votes of a query are divided by their sum, which keeps every temperature in range and leaves the
order of the classes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from torch import Tensor

from hgkd.errors import InvalidTypeError, InvalidValueError
from hgkd.features import _check_finite, channel_statistics, effective_rank, feature_spread
from hgkd.registry import METRICS
from hgkd.structures import FeatureSample

_CHUNK_ELEMENTS = 2**25  # similarities held at once: 128 MiB in fp32
_BANK, _QUERY = "bank", "query"
_Row = tuple[Tensor, int, str, int]  # features (C,), label, split, place in the split


def knn_scores(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
    *,
    standardise: bool = True,
) -> Tensor:
    """Share of the votes that each class gets from a query's ``k`` nearest features of the bank.

    Args:
        bank: features (N, C) whose class is known.
        bank_labels: their classes (N,), 0 .. num_classes - 1.
        queries: features (Q, C) to classify.
        k: number of neighbours, at most N.
        temperature: a neighbour at cosine s votes with exp(s / temperature); the smaller, the more the nearest counts.
        num_classes: None takes the largest label of the bank + 1.
        standardise: bring both to the bank's channel mean 0 and std 1 first.

    Returns:
        Scores (Q, num_classes) in [0, 1]; every row sums to 1.

    Raises:
        ValueError: shapes or labels that do not fit, features that are not finite, k outside 1 .. N.
    """
    classes = _num_classes(bank_labels, num_classes)
    chunks = [votes[k] for votes in _vote(bank, bank_labels, queries, (k,), temperature, classes, standardise)]
    return torch.cat(chunks)


def knn_predictions(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    ks: Iterable[int] = (20,),
    temperature: float = 0.07,
    num_classes: int | None = None,
    *,
    standardise: bool = True,
) -> dict[int, Tensor]:
    """Predicted classes (Q,) for every k of ``ks``, with one search; see :func:`knn_scores`.

    Of classes with equal scores the lower one is taken.
    """
    ks = tuple(ks)
    classes = _num_classes(bank_labels, num_classes)
    found: dict[int, list[Tensor]] = {k: [] for k in ks}
    for votes in _vote(bank, bank_labels, queries, ks, temperature, classes, standardise):
        for k in ks:
            found[k].append(votes[k].argmax(dim=1))
    return {k: torch.cat(parts) for k, parts in found.items()}


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    ks: Iterable[int] = (20,),
    temperature: float = 0.07,
    num_classes: int | None = None,
    *,
    standardise: bool = True,
) -> dict[int, float]:
    """Top-1 accuracy in percent for every k of ``ks``; see :func:`knn_scores`."""
    predicted = knn_predictions(bank, bank_labels, queries, ks, temperature, num_classes, standardise=standardise)
    truth = query_labels.to(queries.device)
    return {k: 100.0 * int((labels == truth).sum()) / len(truth) for k, labels in predicted.items()}


def _num_classes(bank_labels: Tensor, num_classes: int | None) -> int:
    if bank_labels.numel() == 0:
        raise InvalidValueError("knn-bank-empty", "the bank of the k-NN is empty: it needs at least one labelled image")
    low, high = int(bank_labels.min()), int(bank_labels.max())
    classes = high + 1 if num_classes is None else num_classes
    if low < 0 or high >= classes:
        raise InvalidValueError(
            "knn-label-out-of-range",
            f"labels of the bank must lie in 0 .. {classes - 1}, found {low} .. {high}; "
            "a label of -1 means that the class of an image is not known, leave those images out",
        )
    return classes


def _vote(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    ks: Sequence[int],
    temperature: float,
    classes: int,
    standardise: bool,
) -> Iterator[dict[int, Tensor]]:
    """Scores (chunk, classes) for every k, one chunk of queries after another."""
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1] or len(bank) != len(bank_labels):
        raise InvalidValueError(
            "knn-shapes",
            f"expected bank (N, C), labels (N,) and queries (Q, C), got {tuple(bank.shape)}, "
            f"{tuple(bank_labels.shape)} and {tuple(queries.shape)}",
        )
    if len(queries) == 0:
        raise InvalidValueError("knn-no-query", "no query to classify: the k-NN needs at least one test image")
    if not 0 < temperature < math.inf:
        raise InvalidValueError(
            "temperature-not-positive", f"temperature must be above 0 and finite, got {temperature}; DINO uses 0.07"
        )
    if not ks or min(ks) < 1 or max(ks) > len(bank):
        raise InvalidValueError(
            "neighbours-out-of-range",
            f"k must lie in 1 .. {len(bank)}, the number of images in the bank, got {list(ks)}; "
            "take fewer neighbours or a larger bank",
        )
    labels = bank_labels.to(bank.device).long()

    for similarity, nearest in _nearest(bank, queries, max(ks), standardise):
        neighbour_labels = labels[nearest]
        votes = {}
        for k in ks:
            weights = (similarity[:, :k] / temperature).softmax(dim=1)
            votes[k] = weights.new_zeros(len(nearest), classes).scatter_add_(1, neighbour_labels[:, :k], weights)
        yield votes


def nearest_neighbours(bank: Tensor, queries: Tensor, k: int, *, standardise: bool = True) -> tuple[Tensor, Tensor]:
    """Cosines (Q, k) and places in the bank (Q, k) of the nearest features, nearest first; see :func:`knn_scores`.

    Raises:
        ValueError: features that are not finite, k outside 1 .. N.
    """
    if not 1 <= k <= len(bank):
        raise InvalidValueError(
            "neighbours-out-of-range", f"k must lie in 1 .. {len(bank)}, the number of images in the bank, got {k}"
        )
    cosines, places = zip(*_nearest(bank, queries, k, standardise), strict=True)
    return torch.cat(cosines), torch.cat(places)


def _nearest(bank: Tensor, queries: Tensor, k: int, standardise: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Cosines and places (chunk, k), one chunk of queries after another."""
    bank, queries = bank.float(), queries.float()
    _check_finite("bank", bank)
    _check_finite("query", queries)
    if standardise:
        mean, std = channel_statistics(bank)
        bank, queries = (bank - mean) / std, (queries - mean) / std
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    for chunk in queries.split(max(1, _CHUNK_ELEMENTS // len(bank))):
        similarity, nearest = (chunk @ bank.T).topk(k, dim=1)  # most similar first
        yield similarity, nearest


def _stack(samples: Sequence[_Row]) -> tuple[Tensor, Tensor]:
    return torch.stack([features for features, *_ in samples]), torch.tensor([label for _, label, *_ in samples])


def _each_once(rows: Sequence[_Row]) -> list[_Row]:
    """An image that took the place of an unreadable one comes twice, and counts once, as in :func:`hgkd.evaluation.extract`."""
    return list({(split, index): (features, label, split, index) for features, label, split, index in rows}.values())


class _FeatureMetric(BaseMetric):
    """Collects the features of :class:`FeatureSample`\\ s as (features, label, split, place in the split)."""

    def process(self, data_batch: object, data_samples: Sequence[Any]) -> None:
        for sample in data_samples:
            if not isinstance(sample, FeatureSample):
                raise InvalidTypeError(
                    "samples-of-other-kind",
                    f"{type(self).__name__} needs FeatureSamples from the model, got {type(sample).__name__}; "
                    "MaskedDistiller gives them in mode='predict'",
                )
            self.results.append((sample.features.detach().float().cpu(), int(sample.label), sample.split, int(sample.index)))


@METRICS.register_module()
class KNNMetric(_FeatureMetric):
    """k-NN accuracy of the samples of split 'query' among those of split 'bank', as ``knn/top1`` in percent.

    Args:
        k: neighbours. With several numbers ``knn/top1`` is that of the first, and every one is ``knn/top1_k<k>``.
            A bank with fewer images serves all of its own, with a warning: a check must not stop a training run.
        temperature: see :func:`knn_scores`.
        standardise: see :func:`knn_scores`.
        kwargs: of ``BaseMetric`` (collect_device, prefix, collect_dir).
    """

    default_prefix = "knn"

    def __init__(
        self, k: int | Sequence[int] = 20, temperature: float = 0.07, standardise: bool = True, **kwargs: object
    ) -> None:
        super().__init__(**kwargs)
        self.ks = (k,) if isinstance(k, int) else tuple(k)
        if not self.ks or min(self.ks) < 1:
            raise InvalidValueError("count-not-positive", f"k must be 1 or more, got {k!r}; DINO uses 20")
        if not 0 < temperature < math.inf:
            raise InvalidValueError(
                "temperature-not-positive", f"temperature must be above 0 and finite, got {temperature}; DINO uses 0.07"
            )
        self.temperature = temperature
        self.standardise = standardise
        self._warned = False

    def compute_metrics(self, results: list[_Row]) -> dict[str, float]:
        results = _each_once(results)
        parts = {name: [row for row in results if row[2] == name] for name in (_BANK, _QUERY)}
        if not all(parts.values()):
            splits = sorted({row[2] for row in results})
            raise InvalidValueError(
                "knn-splits-missing",
                f"KNNMetric needs samples of the splits 'bank' and 'query', got {splits}; "
                "validate on a concatenation of a data set with split='bank' and one with split='query'",
            )
        bank, bank_labels = _stack(parts[_BANK])
        queries, query_labels = _stack(parts[_QUERY])
        usable = {k: min(k, len(bank)) for k in self.ks}
        if max(self.ks) > len(bank) and not self._warned:
            self._warned = True
            print_log(
                f"k-NN asks for {max(self.ks)} neighbours, the bank holds {len(bank)} images; all of them are used",
                logger="current",
                level=logging.WARNING,
            )
        accuracy = knn_accuracy(
            bank,
            bank_labels,
            queries,
            query_labels,
            ks=sorted(set(usable.values())),
            temperature=self.temperature,
            standardise=self.standardise,
        )
        found = {"top1": accuracy[usable[self.ks[0]]]}
        if len(self.ks) > 1:
            found.update({f"top1_k{k}": accuracy[usable[k]] for k in self.ks})
        return found


@METRICS.register_module()
class FeatureHealthMetric(_FeatureMetric):
    """Whether the features still differ from one another, over all samples of both splits.

    ``health/feature_std``: :func:`feature_spread`, 0 = collapsed to one point. ``health/effective_rank``:
    :func:`effective_rank` of the centred features, the number of directions in use (at most images - 1 and channels).
    """

    default_prefix = "health"

    def compute_metrics(self, results: list[_Row]) -> dict[str, float]:
        if not results:
            raise InvalidValueError("validation-data-empty", "FeatureHealthMetric got no samples; the validation data is empty")
        features, _ = _stack(_each_once(results))
        _check_finite("image", features)  # before they are centred, after which one NaN is in all of them
        centred = features.double() - features.double().mean(dim=0)
        # what rounding leaves of identical features is no direction
        if centred.abs().max() <= 1e-6 * features.abs().max():
            centred = torch.zeros_like(centred)
        return {"feature_std": feature_spread(features), "effective_rank": effective_rank(centred)}
