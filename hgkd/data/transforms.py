"""Image transforms from plain options: a PIL RGB image in, a uint8 tensor (3, H, W) out.

A float tensor (C, H, W) in [0, 1], as images of other channels than RGB are read, is taken as well and gives one; resizing is
torch's bicubic then, with the same smoothing.

Every random draw comes from torch's default generator, so seeding torch in a loader's worker governs all of it.
Resizing is PIL's bicubic, which smooths when it shrinks.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import posterize
from torch import Tensor, nn
from torchvision.transforms import v2

from hgkd.data.pixels import FULL_SIZE, Shrink
from hgkd.errors import InvalidTypeError, InvalidValueError, unknown_name_message

ImageTransform = Callable[[Any], Tensor]
"""From a PIL RGB image to uint8 (3, H, W), from a float tensor (C, H, W) in [0, 1] to one of the result's size."""

_BICUBIC = v2.InterpolationMode.BICUBIC
_MAX_ASPECT = 16  # a 1 x 30000 strip would otherwise be blown up to gigabytes before its centre is cut out


def as_size(image_size: int | Sequence[int]) -> tuple[int, int]:
    """``image_size`` as (H, W): a single number stands for a square.

    Raises:
        TypeError: not an integer, nor two of them.
        ValueError: a side below 1 pixel.
    """
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    if (
        not isinstance(sides, Sequence)
        or isinstance(sides, str)
        or len(sides) != 2
        or any(isinstance(side, bool) or not isinstance(side, int) for side in sides)
    ):
        raise InvalidTypeError(
            "image-size-not-a-size", f"image_size must be a number of pixels or (height, width), got {image_size!r}"
        )
    if min(sides) < 1:
        raise InvalidValueError("image-size-not-positive", f"image_size must be 1 pixel or more, got {image_size!r}")
    return sides[0], sides[1]


class PILToTensor(v2.PILToTensor):
    """A PIL image as a uint8 tensor (3, H, W); a tensor as it is, but cut at 0 and 1, which bicubic resizing overshoots.

    Called like torchvision's own, because stores of a teacher's features depend on the names of the steps.
    """

    def forward(self, image: Any) -> Tensor:
        tensor: Tensor = image.clamp(0.0, 1.0) if isinstance(image, Tensor) else super().forward(image)
        return tensor


def _full_size(image: Any) -> tuple[int, int]:
    """(H, W) of an image as it is in its file, also where it was decoded smaller."""
    if not _is_smaller(image):
        height, width = v2.functional.get_size(image)
        return height, width
    full: tuple[int, int] = image.info[FULL_SIZE]
    return full[1], full[0]


def _is_smaller(image: Any) -> bool:
    """Whether an image was decoded at a part of its sides."""
    return isinstance(image, Image.Image) and FULL_SIZE in image.info


def _resized_part(image: Image.Image, size: Sequence[int], box: tuple[float, float, float, float]) -> Image.Image:
    """A part of an image that was decoded smaller, resized to (h, w).

    Args:
        box: left, top, right and bottom in pixels of the whole image. One decoded pixel stands for exactly 2, 4 or 8 of them,
            also at the far edges, where it stands for places beyond.
    """
    step = 2 ** math.ceil(math.log2(image.info[FULL_SIZE][0] / image.width))
    part = tuple(edge / step for edge in box)
    return image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=part)  # type: ignore[arg-type]  # of four


class RandomResizedCrop(v2.RandomResizedCrop):
    """torchvision's, which draws the same crop of an image that was decoded smaller.

    Called like torchvision's own, because stores of a teacher's features depend on the names of the steps.
    """

    def forward(self, *inputs: Any) -> Any:
        image = inputs[0]
        if not _is_smaller(image):
            return super().forward(*inputs)
        box = self.make_params([torch.empty(1, *_full_size(image), device="meta")])
        left, top = box["left"], box["top"]
        return _resized_part(image, self.size, (left, top, left + box["width"], top + box["height"]))


class CentreCropToSize(nn.Module):
    """Resize until the image just covers ``size`` times ``resize_ratio``, then cut out the centre.

    For a square size this is the usual "shorter side to size * resize_ratio, centre crop". Strips longer than 16 : 1
    lose their ends first.

    Args:
        size: (H, W) of the result.
        resize_ratio: 1.0 keeps as much of the image as possible; 1 / 0.875 is ImageNet's 256-to-224 habit.
    """

    def __init__(self, size: tuple[int, int], resize_ratio: float) -> None:
        super().__init__()
        self.size = size
        self.resize_ratio = resize_ratio

    def places(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Of an image: first row and column of what is resized, its (H, W) after that, and before."""
        h, w = self.size
        limit_w = max(1, min(width, height * _MAX_ASPECT * w // h))
        limit_h = max(1, min(height, width * _MAX_ASPECT * h // w))
        scale = self.resize_ratio * max(h / limit_h, w / limit_w)
        # rounded down as torchvision and timm do, but 29.999999 is 30
        resized = max(h, int(limit_h * scale + 1e-6)), max(w, int(limit_w * scale + 1e-6))
        return (round((height - limit_h) / 2.0), round((width - limit_w) / 2.0)), resized, (limit_h, limit_w)

    def forward(self, image: Any) -> Any:
        size = _full_size(image)
        (top, left), resized, kept = self.places(*size)
        if _is_smaller(image):
            image = _resized_part(image, list(resized), (left, top, left + kept[1], top + kept[0]))
        else:
            if kept != tuple(size):
                image = v2.functional.center_crop(image, list(kept))
            image = v2.functional.resize(image, list(resized), interpolation=_BICUBIC, antialias=True)
        return v2.functional.center_crop(image, list(self.size))


def train_transform(
    image_size: int | Sequence[int],
    scale: Sequence[float] = (0.67, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    color_jitter: float = 0.0,
) -> ImageTransform:
    """Random resized crop, flip and colour jitter.

    Args:
        image_size: result side in pixels, or (H, W).
        scale: smallest and largest share of the image's area in a crop, 0 < low <= high <= 1.
        ratio: smallest and largest width / height of a crop, 0 < low <= high.
        hflip: probability of a left-right flip.
        color_jitter: strength of the brightness, contrast and saturation jitter (hue stays); 0 turns it off.

    Returns:
        A callable from a PIL RGB image to a uint8 tensor (3, H, W).

    Raises:
        TypeError, ValueError: an option out of range, with its name and what is allowed.
    """
    size = as_size(image_size)
    scale, ratio = _pair("scale", scale), _pair("ratio", ratio)
    if scale[1] > 1:
        raise InvalidValueError("crop-scale-out-of-range", f"scale is a share of the image's area, at most 1, got {scale}")
    if not 0 <= hflip <= 1:
        raise InvalidValueError("flip-out-of-range", f"hflip is a probability in [0, 1], got {hflip}")
    if color_jitter < 0:
        raise InvalidValueError("color-jitter-negative", f"color_jitter must be 0 (off) or positive, got {color_jitter}")
    steps: list[nn.Module] = [RandomResizedCrop(size, scale=scale, ratio=ratio, interpolation=_BICUBIC, antialias=True)]
    if hflip > 0:
        steps.append(v2.RandomHorizontalFlip(hflip))
    if color_jitter > 0:
        steps.append(v2.ColorJitter(brightness=color_jitter, contrast=color_jitter, saturation=color_jitter))
    return v2.Compose([*steps, PILToTensor()])


def eval_transform(image_size: int | Sequence[int], resize_ratio: float = 1.0) -> ImageTransform:
    """Resize the shorter side to ``image_size * resize_ratio`` and crop the centre; nothing random.

    Args:
        image_size: result side in pixels, or (H, W).
        resize_ratio: at least 1.

    Returns:
        A callable from a PIL RGB image to a uint8 tensor (3, H, W).

    Raises:
        TypeError, ValueError: an option out of range.
    """
    if resize_ratio < 1:
        raise InvalidValueError(
            "resize-ratio-too-small", f"resize_ratio must be 1 or more (below, the crop would show padding), got {resize_ratio}"
        )
    return v2.Compose([CentreCropToSize(as_size(image_size), resize_ratio), PILToTensor()])


def varying_steps(transform: ImageTransform) -> list[str]:
    """Names of the steps that are not known to do the same with an image in every epoch; an evaluation's transform has none."""
    steps = transform.transforms if isinstance(transform, v2.Compose) else [transform]
    return [type(step).__name__ for step in steps if type(step) not in (CentreCropToSize, PILToTensor)]


@contextmanager
def foreign_randomness() -> Iterator[None]:
    """Context in which Python's and NumPy's generators start from a draw of torch's, and after which they are as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    seed = int(torch.randint(2**32, ()))
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class _TimmAugmentation:
    """timm's training transform, whose draws from Python's and NumPy's generators follow torch's here."""

    def __init__(self, steps: Callable[[Image.Image], Tensor]) -> None:
        self.steps = steps

    def __call__(self, image: Image.Image) -> Tensor:
        with foreign_randomness():
            return self.steps(image)


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """timm's operation, for 0 bits too, which its strongest levels ask for: older Pillow gave a black image, 13 refuses."""
    return posterize(image, bits, **options) if bits > 0 else Image.new(image.mode, image.size)


def augment_transform(
    image_size: int | Sequence[int],
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    auto_augment: str | None = "rand-m9-mstd0.5-inc1",
    color_jitter: float = 0.0,
) -> ImageTransform:
    """timm's recipe for supervised training: random crop (bicubic), flip, then RandAugment or another policy.

    Random erasing and mixing are steps of the model, which sees the normalised batch.

    Args:
        image_size, scale, ratio, hflip: see :func:`train_transform`.
        auto_augment: timm's description of a policy ('rand-m9-mstd0.5-inc1', 'augmix-m5-w4', 'original'), 'trivial' for
            torchvision's TrivialAugmentWide, None for no policy.
        color_jitter: see :func:`train_transform`; without a policy only, as in timm.

    Raises:
        TypeError, ValueError: an option out of range or a policy that timm does not know.
    """
    size = as_size(image_size)
    scale, ratio = _pair("scale", scale), _pair("ratio", ratio)
    trivial = auto_augment == "trivial"
    if auto_augment is not None and color_jitter > 0:
        raise InvalidValueError(
            "color-jitter-without-effect",
            f"color_jitter={color_jitter} has no effect with auto_augment={auto_augment!r}; set one of them",
        )
    try:
        crop, policy, final = create_transform(
            size,
            is_training=True,
            scale=scale,
            ratio=ratio,
            hflip=hflip,
            auto_augment=None if trivial else auto_augment,
            color_jitter=color_jitter or None,  # type: ignore[arg-type]  # timm's own default of what is optional
            interpolation="bicubic",
            normalize=False,
            separate=True,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise InvalidValueError(
            "augmentation-policy-unknown",
            f"timm has no augmentation policy {auto_augment!r} ({error}); e.g. 'rand-m9-mstd0.5-inc1'",
        ) from error
    if trivial:
        policy = v2.TrivialAugmentWide(interpolation=_BICUBIC)
    for step in getattr(policy, "transforms", ()):
        for operation in (*getattr(step, "ops", ()), *chain.from_iterable(getattr(step, "policy", ()))):
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize
    return _TimmAugmentation(v2.Compose([crop, policy, final]))


_KINDS: dict[str, Callable[..., ImageTransform]] = {
    "train": train_transform,
    "augment": augment_transform,
    "eval": eval_transform,
}


def build_transform(
    image_size: int | Sequence[int], options: Mapping[str, Any] | None = None, in_chans: int | None = None
) -> ImageTransform:
    """The transform that a config's ``transform`` dict describes.

    Args:
        image_size: result side in pixels, or (H, W).
        options: the arguments of :func:`train_transform`, with ``kind='augment'`` of :func:`augment_transform`, with
            ``kind='eval'`` of :func:`eval_transform`; None: :func:`train_transform` as it is.
        in_chans: channels of the float tensors that are going to be transformed; None: PIL RGB images are.

    Raises:
        ValueError: an unknown kind or option, with the nearest name, or one that is for RGB images alone.
    """
    arguments = dict(options or {})
    kind = arguments.pop("kind", "train")
    if kind not in _KINDS:
        raise InvalidValueError("transform-kind-unknown", unknown_name_message("transform kind", str(kind), _KINDS))
    if in_chans is not None and kind == "augment":
        raise InvalidValueError(
            "augmentation-for-rgb",
            f"transform kind 'augment' is timm's, whose operations are for 8-bit RGB; with in_chans={in_chans} use "
            "kind='train' (crop and flip)",
        )
    if in_chans not in (None, 3) and arguments.get("color_jitter"):
        raise InvalidValueError(
            "augmentation-for-rgb",
            f"color_jitter={arguments['color_jitter']} changes colours, which images of in_chans={in_chans} channels do "
            "not have; set color_jitter=0",
        )
    known = [name for name in inspect.signature(_KINDS[kind]).parameters if name != "image_size"]
    for name in arguments:
        if name not in known:
            raise InvalidValueError(
                "transform-option-unknown", unknown_name_message(f"option of the {kind} transform", str(name), known)
            )
    return _KINDS[kind](image_size, **arguments)


_GAP = 2.0  # pixels left for one of the result: below, what a coarser grid has lost begins to show


def shrink_of(image_size: int | Sequence[int], options: Mapping[str, Any] | None = None, resize_ratio: float = 1.0) -> Shrink:
    """How many times smaller images may be decoded, so that the smallest crop still has twice the result's pixels a side.

    Args:
        options: as for :func:`build_transform`.
        resize_ratio: of an evaluation's crop.

    Raises:
        ValueError: the transform's crops are not drawn here.
    """
    h, w = as_size(image_size)
    given = dict(options or {})
    kind = given.pop("kind", "train")
    if kind == "augment":
        raise InvalidValueError(
            "scaled-decoding-of-other-crops",
            "scaled_decoding is for transform kinds 'train' and 'eval'; the crops of kind='augment' are timm's own, and may be "
            "so small that nothing is gained; leave it out",
        )
    if kind == "eval":
        ratio = float(given.get("resize_ratio", resize_ratio))
        return lambda width, height: min(width / w, height / h) / ratio / _GAP
    defaults = inspect.signature(train_transform).parameters
    smallest = float(given.get("scale", defaults["scale"].default)[0])
    narrow, wide = (float(side) for side in given.get("ratio", defaults["ratio"].default))

    def shrink(width: int, height: int) -> float:
        area = smallest * width * height
        return min(math.sqrt(area * narrow) / w, math.sqrt(area / wide) / h) / _GAP

    return shrink


def _pair(name: str, value: Sequence[float]) -> tuple[float, float]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise InvalidTypeError("range-not-a-pair", f"{name} must be two numbers (low, high), got {value!r}")
    if not 0 < value[0] <= value[1]:
        raise InvalidValueError("range-empty", f"{name} must be (low, high) with 0 < low <= high, got {value!r}")
    return float(value[0]), float(value[1])
