"""Batches that a normalisation over the batch cannot take: told before the first step, and never in torch's words alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from mmengine.model import BaseModel
from mmengine.runner import BaseLoop, IterBasedTrainLoop
from torch import Tensor

from hgkd.errors import InvalidValueError
from hgkd.networks.untouched import unchanged


def check_last_batch(model: BaseModel, loop: BaseLoop, batch: object) -> None:
    """Refuse a training by epochs whose last batch is too small for the model, by a forward pass of one of its size.

    Model, batch and random numbers stay what they were.

    Args:
        model: not in a wrapper.
        batch: any batch of the loop's data, as the loader gives it; its first images take the place of the last ones.

    Raises:
        ValueError: e.g. a batch normalisation of pooled features that sees a single image.
    """
    loader = loop.dataloader
    size = getattr(loader.batch_sampler, "batch_size", loader.batch_size)
    dropped = loader.drop_last or getattr(loader.batch_sampler, "drop_last", False)
    if isinstance(loop, IterBasedTrainLoop) or dropped or not isinstance(batch, Mapping):
        return
    last = len(getattr(loader.batch_sampler, "sampler", loader.sampler)) % size
    if not last or not all(isinstance(value, (Tensor, Sequence)) for value in batch.values()):
        return
    # data preprocessors change boxes and label maps in place
    part = copy.deepcopy({key: value[:last] for key, value in batch.items()})
    try:
        with torch.no_grad(), unchanged(model):
            model(**model.data_preprocessor(part, True), mode="loss")
    except ValueError as error:
        raise InvalidValueError(
            "last-batch-too-small",
            f"the last batch of every epoch has {last} of {size} images, and the model cannot be trained on it: {error}. "
            "Set train_dataloader.drop_last=True, or another batch_size",
        ) from error


@contextmanager
def told_single_values() -> Iterator[None]:
    """Context of a training step, in which torch's complaint about a single value a channel gets its remedy.

    Raises:
        ValueError: a batch normalisation got one value a channel.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise InvalidValueError(
            "batch-norm-single-values",
            f"a batch normalisation sees one value a channel, of which there are no statistics ({error}). Set batch_size=2 or "
            "more (it counts for each process), and train_dataloader.drop_last=True where an epoch may end with a single image",
        ) from error
