"""What an exported graph takes and gives: the entry ``signature`` of a folder's ``run_card.json``.

It holds all that a program needs to run the folder's files: which file has which precision, how an image becomes the input,
what the outputs are called and which classes they are about.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from hgkd.errors import InvalidValueError, WeightsError

FORMAT = 1
LAYOUTS = ("NCHW", "NHWC", "CHW")
RESIZES = ("crop", "fit", "keep", "other", "pad", "square", "stretch")
TASKS = ("features", "classification", "detection", "segmentation")
_DTYPES = {"float32": torch.float32, "uint8": torch.uint8, "uint16": torch.uint16}


@dataclass(frozen=True)
class ImageInput:
    """How an image is given to a graph.

    Attributes:
        name: of the input.
        layout: one of ``LAYOUTS``; CHW takes one image at a time.
        dtype: 'float32', 'uint8' or 'uint16'.
        channels: C.
        order: 'RGB' or 'BGR'; '' for other channels, which come in the order of the training's images.
        range: (black, white), the values that stand for 0 and 1; what lies beyond is cut inside the graph.
        value_range: black and white in image files of more than 8 bits, by which they become [0, 1]; empty: of their type.
        mean, std: by which the caller normalises pixels in [0, 1], RGB; empty where the graph does it.
        size: (H, W) that the network is used at.
        batch, height, width: what they must be; None: anything.
        least, most: the shortest side in pixels and the longest; None: any.
        multiple: sides are multiples of it.
        resize: how an image becomes the input: 'crop' (shorter side to ``size``, centre cropped, as
            :func:`hgkd.data.images.read_crops`), 'stretch' (to ``size``), 'fit' (resized as a whole into ``size``, which may be
            turned, and not filled), 'square' (the same, then filled to a square), 'pad' (filled to ``size``), 'keep' (its own
            size) or 'other' (by the steps that ``options['test_pipeline']`` of the signature has). Filling is at the right and
            below; sides that the graph does not take are filled up to the next that it does.
        pad: value in [0, 1] of what is filled in.
    """

    name: str = "images"
    layout: str = "NCHW"
    dtype: str = "float32"
    channels: int = 3
    order: str = "RGB"
    range: tuple[float, float] = (0.0, 1.0)
    value_range: tuple[float, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    size: tuple[int, int] = (224, 224)
    batch: int | None = None
    height: int | None = None
    width: int | None = None
    least: int = 1
    most: int | None = None
    multiple: int = 1
    resize: str = "crop"
    pad: float = 0.0

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch calls it."""
        return _DTYPES[self.dtype]

    def prepare(self, images: Tensor) -> Tensor:
        """Images in [0, 1], float (B, C, H, W), RGB -> what the graph takes; of CHW still (B, C, H, W), given one by one."""
        if self.mean:
            mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
            images = (images - mean) / std
        if self.order == "BGR":
            images = images.flip(1)
        black, white = self.range
        if (black, white) != (0.0, 1.0):
            images = images * (white - black) + black
        if self.dtype != "float32":
            images = images.round()
        if self.layout == "NHWC":
            images = images.permute(0, 2, 3, 1).contiguous()
        return images.to(self.torch_dtype)

    def unit(self, images: Tensor) -> Tensor:
        """The inverse of :meth:`prepare` but for the normalisation: float (B, C, H, W) in [0, 1], RGB; graphs hold it."""
        values = images if self.dtype == "float32" else images.to(torch.float32)
        if self.layout == "NHWC":
            values = values.permute(0, 3, 1, 2)
        black, white = self.range
        if (black, white) != (0.0, 1.0):
            values = (values - black) / (white - black)
            if self.dtype != "uint8" or (black, white) != (0.0, 255.0):
                values = values.clamp(0.0, 1.0)
        return values.flip(1) if self.order == "BGR" else values

    def axis(self, name: str) -> int:
        """Place of 'C', 'H' or 'W' in a batch."""
        return ("NCHW" if self.layout == "CHW" else self.layout).index(name)

    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError for a size that the graph does not take."""
        sides = (height, width)
        fixed = all(must in (None, side) for must, side in zip((self.height, self.width), sides, strict=True))
        long = self.most is not None and max(sides) > self.most
        if not fixed or long or min(sides) < self.least or any(side % self.multiple for side in sides):
            raise InvalidValueError(
                "graph-image-size", f"the graph takes images of {self.sizes}, not of {height} x {width}; resize them"
            )

    @property
    def sizes(self) -> str:
        """The sizes that it takes, in words."""
        if self.height is not None or self.width is not None:
            return f"{self.height or 'any'} x {self.width or 'any'} pixels (fixed at export)"
        upwards = "" if self.most is None else f" to {self.most}"
        words = ["any size"] if self.least <= 1 and not upwards else [f"sides from {self.least}{upwards} pixels"]
        return " ".join([*words, *([f"in multiples of {self.multiple}"] if self.multiple > 1 else [])])

    @property
    def about(self) -> str:
        """The input in one line."""
        kind = self.order or f"{self.channels} channels in the order of the training's"
        batch = "one at a time" if self.layout == "CHW" else "any batch" if self.batch is None else f"batch {self.batch}"
        black, white = self.range
        pixels = "in [0, 1]" if (black, white) == (0.0, 1.0) else f"of {black:g} (black) to {white:g} (white)"
        inside = " not normalised; mean and std are in run_card.json" if self.mean else ""
        return f"{self.dtype} images {pixels}, {self.layout}, {kind}{inside}; {batch}, {self.sizes}"


@dataclass(frozen=True)
class Output:
    """An output of a graph.

    Attributes:
        name: of the output.
        holds: 'features' (B, C, h, w), 'pooled' (B, C), 'logits' (B, K), 'boxes' (B, N, 4: left, top, right, bottom in pixels
            of the input), 'scores' (B, N), 'labels' (B, N), 'masks' (B, N, H, W) or 'label_map' (B, H, W).
    """

    name: str
    holds: str


@dataclass(frozen=True)
class Signature:
    """What a folder's graphs take and give.

    Attributes:
        files: precision -> file within the folder; 'fp32' is the first.
        input: of the one input, an image.
        outputs: in the order of the graph.
        task: one of ``TASKS``.
        classes: names in the order of logits or labels; empty where unknown, or of features.
        options: what else a reader of the target needs, plain values.
    """

    files: Mapping[str, str]
    input: ImageInput
    outputs: tuple[Output, ...]
    task: str = "features"
    classes: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self), "files": dict(self.files), "options": dict(self.options)}

    @classmethod
    def parse(cls, found: object, where: str) -> Signature:
        """Read what :meth:`to_dict` gives, after it was JSON.

        Raises:
            WeightsError: there is none, incomplete, or written by a newer version.
        """
        if not isinstance(found, Mapping):
            raise WeightsError(
                "export-without-signature",
                f"{where} does not say what its graph takes and gives; export the checkpoint again, to a runtime such as onnx",
            )
        if found.get("format") != FORMAT:
            raise WeightsError(
                "export-signature-newer",
                f"{where} has a signature of format {found.get('format')!r}, known is {FORMAT}; update hgkd",
            )
        try:
            if (resize := found["input"].get("resize", "crop")) not in RESIZES:
                raise WeightsError(
                    "export-resize-unknown",
                    f"{where} resizes images by {resize!r}, known are {', '.join(RESIZES)}; update hgkd",
                )
            image = {key: tuple(value) if isinstance(value, list) else value for key, value in found["input"].items()}
            return cls(
                files={str(key): str(value) for key, value in found["files"].items()},
                input=ImageInput(**cast(dict[str, Any], image)),
                outputs=tuple(Output(**output) for output in found["outputs"]),
                task=str(found["task"]),
                classes=tuple(found["classes"]),
                options=dict(found["options"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise WeightsError(
                "export-signature-incomplete", f"the signature in {where} is incomplete ({error}); export the checkpoint again"
            ) from error
