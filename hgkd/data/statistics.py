"""Mean and standard deviation of every channel over all pixels of a data set, image by image.

Sums of squares would lose digits over many pixels; parts are merged by their means and sums of squared differences instead,
in 64 bits (Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hgkd.errors import DataError

Floats = NDArray[np.float64]


class PixelSums:
    """What is known of the pixels that were added.

    Attributes:
        images, pixels: how many were added; pixels are those of one channel.
        mean, squares: of every channel, (C,): the mean, and the sum of squared differences from it.
        low, high: lowest and highest value of every channel, (C,).
    """

    def __init__(self, channels: int) -> None:
        self.images = self.pixels = 0
        self.mean: Floats = np.zeros(channels)
        self.squares: Floats = np.zeros(channels)
        self.low: Floats = np.full(channels, np.inf)
        self.high: Floats = np.full(channels, -np.inf)

    @property
    def std(self) -> Floats:
        """Standard std of every channel, (C,)."""
        stds: Floats = np.sqrt(self.squares / max(self.pixels, 1))
        return stds

    def add(self, values: NDArray[Any]) -> None:
        """Count an image's pixels (C, H, W)."""
        rows = values.reshape(len(values), -1).astype(np.float64)
        count, mean = rows.shape[1], rows.mean(axis=1)
        total, apart = self.pixels + count, mean - self.mean
        self.squares += ((rows - mean[:, None]) ** 2).sum(axis=1) + apart**2 * self.pixels * count / total
        self.mean = self.mean + apart * count / total
        self.low, self.high = np.minimum(self.low, rows.min(axis=1)), np.maximum(self.high, rows.max(axis=1))
        self.images, self.pixels = self.images + 1, total


def measure_pixels(dataset: Any) -> tuple[PixelSums, list[str]]:
    """The pixels in [0, 1] of all images of a data set of :mod:`hgkd.data.images`, uncropped, and the files that cannot be
    read.

    Raises:
        DataError: not one can be read.
    """
    sums = PixelSums(dataset.in_chans or 3)
    unreadable = []
    for index in range(len(dataset)):
        try:
            image = dataset.image(index)
        except Exception:  # decoders raise nearly anything on damaged bytes
            unreadable.append(dataset.path(index))
            continue
        sums.add(np.asarray(image).transpose(2, 0, 1) / 255 if dataset.in_chans is None else image.numpy())
    if not sums.images:
        raise DataError(
            "no-readable-images", f"none of the {len(dataset)} images in {dataset.data_root} can be read, e.g. {unreadable[0]}"
        )
    return sums, unreadable
