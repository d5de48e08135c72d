"""Pixels: the normalisation that networks expect, and images in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from hgkd.errors import InvalidTypeError, InvalidValueError

Triple = tuple[float, float, float]
PixelStatistics = tuple[Triple, Triple]
CHANNELS = 3


def check_pixels(mean: Any, std: Any, where: str) -> PixelStatistics:
    """Mean and standard deviation as two triples of floats.

    Args:
        mean, std: three numbers each, RGB; 0 <= mean <= 1 and 0 < std <= 1.
        where: the option that they come from, for the message.

    Raises:
        ValueError: not three numbers each, not finite, or out of range; says so when they are of pixels in 0..255.
    """
    means, stds = (_triple(name, given, where) for name, given in (("mean", mean), ("std", std)))
    inside = all(0.0 <= value <= 1.0 for value in means) and all(0.0 < value <= 1.0 for value in stds)
    if inside:
        return means, stds
    found = f"{where}: mean {_text(means)} and std {_text(stds)}"
    if min(means) >= 0.0 and min(stds) > 0.0 and max(*means, *stds) <= 255.0:
        by_255 = [_text(value / 255 for value in values) for values in (means, stds)]
        raise InvalidValueError(
            "pixels-of-255",
            f"{found} are of pixels in 0..255, expected those of pixels in [0, 1]; divide by 255: mean {by_255[0]}, "
            f"std {by_255[1]}",
        )
    raise InvalidValueError(
        "pixels-out-of-range", f"{found} cannot be of RGB pixels in [0, 1], of which 0 <= mean <= 1 and 0 < std <= 1"
    )


def check_normalize(normalize: Any, where: str) -> PixelStatistics:
    """What a user gives as ``normalize=(mean, std)``; see :func:`check_pixels`.

    Raises:
        ValueError: it is not a pair of triples, or they are wrong.
    """
    pair = _numbers_or_lists(normalize)
    if pair is None or len(pair) != 2:
        raise InvalidValueError(
            "normalize-not-mean-and-std",
            f"{where} must be a mean and a standard deviation of three numbers each, RGB in [0, 1], e.g. "
            f"((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)); got {normalize!r}",
        )
    return check_pixels(pair[0], pair[1], where)


def check_channels(channels: Any, where: str) -> None:
    """Raise ValueError when a network is for other images than RGB ones, which is what every data set here gives."""
    if channels != CHANNELS:
        raise InvalidValueError(
            "channels-not-rgb",
            f"{where} is {channels!r}, but images are RGB, {CHANNELS} channels (a grey image is read as three equal ones); "
            f"use a network for {CHANNELS} channels and leave in_chans out",
        )


def pixels_text(mean: Any, std: Any) -> str:
    """Statistics, given as numbers or tensors, for the log."""
    means, stds = (_text(torch.as_tensor(values).flatten().tolist()) for values in (mean, std))
    return f"pixels normalised by mean {means}, std {stds}"


def _triple(name: str, given: Any, where: str) -> Triple:
    values = _numbers_or_lists(given)
    try:
        numbers = [] if values is None else [float(value) for value in values]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != CHANNELS or not all(map(math.isfinite, numbers)):
        raise InvalidValueError(
            "pixels-not-three-numbers",
            f"{where}: {name} must be three finite numbers, one each for red, green and blue, got {given!r}",
        )
    return numbers[0], numbers[1], numbers[2]


def _numbers_or_lists(given: Any) -> list[Any] | None:
    return list(given) if isinstance(given, Iterable) and not isinstance(given, (str, bytes, dict)) else None


def _text(values: Iterable[float]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"


IMAGENET_MEAN, IMAGENET_STD = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD


def pixel_statistics(model: nn.Module) -> PixelStatistics:
    """Mean and std of the pixels in [0, 1] that timm, or the file that the network is from, says it expects.

    Raises:
        ValueError: see :func:`hgkd.pixels.check_pixels`; an export's config or ``pretrained_cfg`` may say anything.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    mean = config.get("mean") or timm.data.IMAGENET_DEFAULT_MEAN
    std = config.get("std") or timm.data.IMAGENET_DEFAULT_STD
    return check_pixels(mean, std, f"the pixels of {config.get('architecture') or type(model).__name__}")


def to_unit_range(inputs: Tensor) -> Tensor:
    """Images as float in [0, 1]: uint8 (B, 3, H, W) is divided by 255, float is taken as it is.

    Raises:
        TypeError: another type, whose range cannot be known.
    """
    if inputs.dtype == torch.uint8:
        return inputs.float().div_(255.0)
    if inputs.is_floating_point():
        return inputs
    raise InvalidTypeError("images-dtype", f"images must be uint8 in [0, 255] or float in [0, 1], got {inputs.dtype}")


class PixelNormalisation(nn.Module):
    """Base of modules that normalise the pixels they are given; a subclass calls :meth:`set_pixels` when it is built.

    Attributes:
        mean, std: of the pixels in [0, 1], (1, 3, 1, 1).
        pixels_in_state: whether the two are entries of ``state_dict``; they are buffers in any case.
    """

    mean: Tensor
    std: Tensor
    pixels_in_state = False

    def set_pixels(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Normalise with these statistics of the pixels in [0, 1], RGB, from now on; on the device of those before."""
        for name, values in (("mean", mean), ("std", std)):
            before = self._buffers.get(name)
            device = None if before is None else before.device
            self.register_buffer(name, torch.tensor(list(values), device=device).view(1, -1, 1, 1), self.pixels_in_state)

    def normalise(self, images: Tensor) -> Tensor:
        """Pixels in [0, 1] -> what the network expects, (B, 3, H, W)."""
        return (images - self.mean) / self.std

    def denormalise(self, inputs: Tensor) -> Tensor:
        """The inverse of :meth:`normalise`."""
        return inputs * self.std + self.mean

    def pixel_values(self) -> dict[str, list[float]]:
        """``mean`` and ``std`` as numbers, as files note them."""
        return {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}
