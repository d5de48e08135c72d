"""The order of the training images, and the randomness of each: functions of (seed, epoch, image), not of earlier draws.

A run that was stopped in the middle of an epoch goes on at the next image without reading those before it, and gets the same
crops and flips, whatever the number of reading processes. mmengine's ``DefaultSampler`` starts every epoch at its beginning,
and leaves the crops to the state of the process that happens to read an image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_dist_info, sync_random_seed
from numpy.typing import NDArray
from torch.utils.data import BatchSampler, DataLoader, Sampler

from hgkd.data.sources import Blocks
from hgkd.errors import InvalidValueError
from hgkd.registry import DATA_SAMPLERS

Numbers = NDArray[np.int64]


def mixed_seed(*parts: int) -> int:
    """A seed in [0, 2**63) that depends on all of some non-negative numbers and on their order."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def epoch_seed(seed: int, epoch: int, copy: int = 0) -> int:
    """The seed of everything random about reading images in an epoch, for the ``copy``-th time that an image is shown in it."""
    return mixed_seed(seed, epoch, 1 + copy)


def image_seed(base: int, index: int) -> int:
    """The seed of image ``index`` in an epoch whose :func:`epoch_seed` is ``base``: distinct for all images, and cheap."""
    return (base + index * 0x9E3779B97F4A7C15) % 2**63  # an odd factor, so no two images meet


class SeededIndex(int):
    """The number of an image, together with the :func:`epoch_seed` of its reading.

    An ``int`` to everybody who does not ask; it reaches reading processes however they were started, and when.
    """

    epoch_seed: int

    def __new__(cls, index: int, epoch_seed: int) -> SeededIndex:
        made = super().__new__(cls, index)
        made.epoch_seed = epoch_seed
        return made

    def __getnewargs__(self) -> tuple[int, int]:  # type: ignore[override]
        return int(self), self.epoch_seed


class SeededBatch:
    """The numbers of some images with their seeds, as two arrays, which cost the training process nothing an image.

    Iterated, in the process that reads, it gives :class:`SeededIndex` objects.
    """

    def __init__(self, indices: Numbers, seeds: Numbers) -> None:
        self._indices, self._seeds = indices, seeds

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[SeededIndex]:
        return map(SeededIndex, self._indices.tolist(), self._seeds.tolist())


class SeededBatches(BatchSampler):
    """torch's batches of an :class:`EpochSampler`, as :class:`SeededBatch` objects.

    A loader makes its ``BatchSampler`` itself; :func:`in_arrays` turns it into this one.
    """

    sampler: EpochSampler

    def __iter__(self) -> Iterator[SeededBatch]:  # type: ignore[override]
        indices, seeds = self.sampler.rest()
        stop = len(indices) - len(indices) % self.batch_size if self.drop_last else len(indices)
        for start in range(0, stop, self.batch_size):
            part = slice(start, start + self.batch_size)
            yield SeededBatch(indices[part], seeds[part])


def in_arrays(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The loader itself, which from now on sends its reading processes arrays where its sampler is an :class:`EpochSampler`."""
    batches = loader.batch_sampler
    if type(batches) is BatchSampler and type(batches.sampler) is EpochSampler:
        batches.__class__ = SeededBatches
    return loader


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Context in which torch's CPU generator starts from ``seed``, and after which it is as it was; None: nothing happens."""
    if seed is None:
        yield
        return
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


@DATA_SAMPLERS.register_module()
class EpochSampler(Sampler[int]):
    """Each image once an epoch, in an order of its own each epoch, divided between the processes.

    Where images lie in blocks that are read as a whole (:class:`hgkd.data.sources.Blocks`), the blocks are shuffled, and the
    images of ``window`` blocks at a time among each other.

    Process r of W takes the images r, r + W, r + 2W ... of the order, so that step n of all processes together shows the images
    that one process with W times the batch would show. When W does not divide the number of images, the order starts again from
    its beginning to fill the last ones.

    Args:
        dataset: its length counts.
        shuffle: False keeps the order of the data set.
        seed: of order and crops; None: one drawn at random, the same in all processes.
        repeats: show each image so many times in a row, with other crops each time (repeated augmentation, arXiv 1902.05509).
            As in DeiT's and timm's sampler an epoch shows as many images as without, so only 1 in ``repeats`` different ones,
            and the processes of a distributed run share the copies.

    Raises:
        ValueError: ``repeats`` is below 1.

    Attributes:
        epoch: number of the epoch, set by mmengine's ``DistSamplerSeedHook``.
        skip: so many images of this process's share are passed over, once; they are not read.
    """

    def __init__(self, dataset: Sized, shuffle: bool = True, seed: int | None = None, repeats: int = 1) -> None:
        if repeats < 1:
            raise InvalidValueError("count-not-positive", f"repeats must be 1 (each image once) or more, got {repeats}")
        self.repeats = repeats
        self.rank, self.world_size = get_dist_info()
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed = sync_random_seed() if seed is None else seed
        self.epoch = 0
        self.skip = 0

    def __len__(self) -> int:
        """Images of this process in a whole epoch, skipped or not."""
        return math.ceil(len(self.dataset) / self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counted from 0, whose order and crops the next pass gives."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(SeededBatch(*self.rest()))

    def rest(self) -> tuple[Numbers, Numbers]:
        """Numbers and seeds of the images of this process that are not passed over, (N,) each."""
        first, self.skip = self.skip, 0
        places, copies = self._places(first, len(self))
        bases = np.array([epoch_seed(self.seed, self.epoch, copy) for copy in range(self.repeats)], dtype=np.int64)
        return self._order()[places % len(self.dataset)], bases[copies]

    def copies(self, start: int, stop: int) -> list[int]:
        """Which time in its epoch each image of this process is shown, from the ``start``-th to before the ``stop``-th."""
        copies: list[int] = self._places(start, stop)[1].tolist()
        return copies

    def _places(self, start: int, stop: int) -> tuple[Numbers, Numbers]:
        """Places in the order of this process's images, and the number of each image's copy."""
        found: tuple[Numbers, Numbers] = np.divmod(self.rank + np.arange(start, stop) * self.world_size, self.repeats)
        return found

    def _order(self) -> Numbers:
        """All images in the order of the epoch."""
        count = len(self.dataset)
        if not self.shuffle:
            return np.arange(count)
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, self.epoch, 0))
        order: Numbers = torch.randperm(count, generator=generator).numpy()
        blocks: Blocks | None = getattr(self.dataset, "blocks", None)
        if blocks is None:
            return order
        turn = torch.randperm(int(blocks.of.max()) + 1, generator=generator).numpy() // blocks.window
        return order[np.argsort(turn[blocks.of[order]], kind="stable")]
