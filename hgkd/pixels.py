"""Pixels: the normalisation that networks expect, and images in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from hgkd.errors import InvalidTypeError, InvalidValueError

PixelStatistics = tuple[tuple[float, ...], tuple[float, ...]]
CHANNELS = 3


def check_pixels(mean: object, std: object, where: str, channels: int = CHANNELS) -> PixelStatistics:
    """Mean and standard deviation as two tuples of floats.

    Args:
        mean, std: a number for each channel (three: RGB); 0 <= mean <= 1 and 0 < std <= 1.
        where: the option that they come from, for the message.
        channels: of the images.

    Raises:
        ValueError: another number of them, not finite, or out of range; says so when they are of pixels in 0..255.
    """
    means, stds = (_numbers(name, given, where, channels) for name, given in (("mean", mean), ("std", std)))
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
    kind = "RGB " if channels == CHANNELS else ""
    raise InvalidValueError(
        "pixels-out-of-range", f"{found} cannot be of {kind}pixels in [0, 1], of which 0 <= mean <= 1 and 0 < std <= 1"
    )


def check_normalize(normalize: object, where: str, channels: int = CHANNELS) -> PixelStatistics:
    """Check a user's ``normalize=(mean, std)``; see :func:`check_pixels`.

    Raises:
        ValueError: it is not a pair of such tuples, or they are wrong.
    """
    pair = _numbers_or_lists(normalize)
    if channels != CHANNELS and (pair is None or len(pair) != 2):
        raise InvalidValueError(
            "pixels-no-pair",
            f"{where} must be the means and the standard deviations of {channels} channels, of pixels in [0, 1], as 'hgkd "
            f"doctor pixels FOLDER --in-chans {channels}' prints them; got {normalize!r}",
        )
    if pair is None or len(pair) != 2:
        raise InvalidValueError(
            "normalize-not-mean-and-std",
            f"{where} must be a mean and a standard deviation of three numbers each, RGB in [0, 1], e.g. "
            f"((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)); got {normalize!r}",
        )
    return check_pixels(pair[0], pair[1], where, channels)


def check_in_chans(channels: object, where: str) -> int:
    """The number of channels of a network's images, a whole number from 1.

    Raises:
        ValueError: it is none.
    """
    if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
        raise InvalidValueError(
            "channels-not-positive", f"{where} is the number of channels of the images, a whole number from 1, got {channels!r}"
        )
    return channels


def channels_of(network: nn.Module) -> int:
    """Channels of the images that a network of timm takes; 3 where it does not say."""
    size = (getattr(network, "pretrained_cfg", None) or {}).get("input_size") or (CHANNELS,)
    return int(size[0])


def note_pixels(
    network: nn.Module, channels: int | None = None, pixels: tuple[Sequence[float], Sequence[float]] | None = None
) -> None:
    """Let a network of timm say what images it takes, in its ``pretrained_cfg``, which all others ask.

    Args:
        channels: of the images; None: as it says already.
        pixels: mean and std; None: as it says already.
    """
    config: dict[str, Any] = dict(getattr(network, "pretrained_cfg", None) or {})
    if channels is not None:
        config["input_size"] = (channels, *tuple(config.get("input_size") or (CHANNELS, 224, 224))[1:])
    if pixels is not None:
        config |= {"mean": tuple(pixels[0]), "std": tuple(pixels[1])}
    cast(Any, network).pretrained_cfg = config


def near(given: PixelStatistics, other: PixelStatistics, unit: float = 1 / 255) -> bool:
    """Whether a network takes the one for the other, of as many channels: by a unit of 0..255 of the mean, 3 % of the std.

    Args:
        unit: of the statistics; 1.0 where they are of pixels in 0..255.
    """
    means, stds = (list(zip(*parts, strict=True)) for parts in zip(given, other, strict=True))
    return all(abs(a - b) <= unit for a, b in means) and all(abs(a - b) <= 0.03 * b for a, b in stds)


def check_same_pixels(given: PixelStatistics, noted: PixelStatistics, source: object, where: str) -> None:
    """Refuse other statistics than those that a network was trained with, see :func:`near`.

    Args:
        noted: what the network's file says.
        source: the file.
        where: the options that ``given`` comes from, for the message.

    Raises:
        ValueError: they differ.
    """
    if near(given, noted):
        return
    raise InvalidValueError(
        "pixels-differ",
        f"{source} was trained with mean {_text(noted[0])} and std {_text(noted[1])} of the pixels, {where} says mean "
        f"{_text(given[0])} and std {_text(given[1])}: the weights would see other images, and nothing would fail. Leave "
        f"{where} out, and the file's are taken",
    )


def require_statistics(channels: int, normalize: object, where: str) -> None:
    """Refuse images of other channels than RGB without their statistics, which no network and no habit tells.

    Raises:
        ValueError: with the command that measures them.
    """
    if channels != CHANNELS and normalize is None:
        raise InvalidValueError(
            "channels-without-statistics",
            f"in_chans={channels} needs the mean and standard deviation of the images' channels: measure them with 'hgkd "
            f"doctor pixels FOLDER --in-chans {channels}' and set {where}",
        )


def statistics_of(place: str, channels: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> PixelStatistics:
    """Mean and standard deviation that a user gives; None is ImageNet's, for RGB alone.

    Args:
        place: of the two in the config, e.g. 'model.student'.
        channels: of the images.

    Raises:
        ValueError: see :func:`require_statistics` and :func:`check_pixels`.
    """
    require_statistics(channels, None if mean is None or std is None else (mean, std), f"{place}.mean and {place}.std")
    mean, std = IMAGENET_MEAN if mean is None else mean, IMAGENET_STD if std is None else std
    return check_pixels(mean, std, f"{place}.mean and std", channels)


def check_images(images: Tensor, channels: int, what: str = "the model was built for", remedy: str = "") -> None:
    """Raise ValueError when images (B, C, H, W) have other channels than a network takes."""
    if images.ndim != 4 or images.shape[1] != channels:
        raise InvalidValueError(
            "channels-differ",
            f"the images have {images.shape[1] if images.ndim == 4 else tuple(images.shape)} channels, {what} {channels}; "
            f"{remedy or 'set in_chans of data and model alike'}",
        )


def check_channels(channels: object, where: str) -> None:
    """Raise ValueError when a network that can only be for RGB images is for others."""
    if channels != CHANNELS:
        raise InvalidValueError(
            "channels-not-rgb",
            f"{where} is {channels!r}, but it must be {CHANNELS}: it sees RGB images, or three channels of others, which "
            "model.teacher_channels names; leave in_chans out",
        )


def pixels_text(mean: object, std: object) -> str:
    """Statistics, given as numbers or tensors, for the log."""
    means, stds = (_text(torch.as_tensor(values).flatten().tolist()) for values in (mean, std))
    return f"pixels normalised by mean {means}, std {stds}"


def _numbers(name: str, given: object, where: str, channels: int) -> tuple[float, ...]:
    values = _numbers_or_lists(given)
    try:
        numbers = [] if values is None else [float(value) for value in values]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != channels or not all(map(math.isfinite, numbers)):
        wanted = "three finite numbers, one each for red, green and blue"
        if channels != CHANNELS:
            wanted = f"{channels} finite numbers, one for each channel"
        raise InvalidValueError("pixels-no-numbers", f"{where}: {name} must be {wanted}, got {given!r}")
    return tuple(numbers)


def _numbers_or_lists(given: object) -> list[Any] | None:
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
    name = config.get("architecture") or type(model).__name__
    return check_pixels(mean, std, f"the pixels of {name}", channels_of(model))


def to_unit_range(inputs: Tensor) -> Tensor:
    """Images as float in [0, 1]: uint8 (B, C, H, W) is divided by 255, float is taken as it is.

    Raises:
        TypeError: another type, whose range cannot be known.
    """
    if inputs.dtype == torch.uint8:
        return inputs.float().div_(255.0)
    if inputs.is_floating_point():
        return inputs
    raise InvalidTypeError("images-dtype", f"images must be uint8 in [0, 255] or float in [0, 1], got {inputs.dtype}")


def pixels_noted(noted: Mapping[str, Any]) -> dict[str, Any]:
    """The pixel statistics that a file notes, under today's keys: earlier files call ``std`` ``deviation``."""
    return {"std" if key == "deviation" else key: value for key, value in noted.items()}


def pixels_noted_by(noted: object) -> PixelStatistics | None:
    """Mean and std out of what a file notes of its pixels; None: it does not say."""
    known = pixels_noted(noted) if isinstance(noted, Mapping) else {}
    return (tuple(known["mean"]), tuple(known["std"])) if {"mean", "std"} <= known.keys() else None


class PixelNormalisation(nn.Module):
    """Base of modules that normalise the pixels they are given; a subclass calls :meth:`set_pixels` when it is built.

    Attributes:
        mean, std: of the pixels in [0, 1], (1, C, 1, 1); C is 3 for RGB.
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

    def restore_pixels(self, mean: Sequence[float], std: Sequence[float]) -> str | None:
        """Normalise as the checkpoint that has been loaded did: its weights expect these pixels, whatever the config says.

        Returns:
            What has changed, for the log; None: nothing.
        """
        own = (self.mean.flatten().tolist(), self.std.flatten().tolist())
        if own == tuple(torch.tensor(list(values)).tolist() for values in (mean, std)):
            return None
        self.set_pixels(mean, std)
        return f"{pixels_text(mean, std)}, as in the checkpoint; the config's are not in force: {pixels_text(*own)}"

    @property
    def in_chans(self) -> int:
        """Channels of the images."""
        return self.mean.shape[1]

    def normalise(self, images: Tensor) -> Tensor:
        """Pixels in [0, 1], or uint8 -> what the network expects, (B, C, H, W).

        Raises:
            ValueError: images of other channels; without this one channel would be taken for all.
            TypeError: images of another type than :func:`to_unit_range` takes.
        """
        images = to_unit_range(images)
        check_images(images, self.in_chans)
        return (images - self.mean).div_(self.std)

    def denormalise(self, inputs: Tensor) -> Tensor:
        """The inverse of :meth:`normalise`."""
        return inputs * self.std + self.mean

    def pixel_values(self) -> dict[str, list[float]]:
        """``mean`` and ``std`` as numbers, as files note them."""
        return {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}
