"""What a graph takes when its preprocessing is inside (``--with-preprocessing``): image files' values, as libraries give them.

PIL and NumPy hold an image as (H, W, C) in RGB, OpenCV as (H, W, C) in BGR; ``nhwc-rgb`` and ``nhwc-bgr`` take a batch of these
as it is. Values are uint8. Where the run read images of more than 8 bits with ``value_range`` they are the files' own: uint16
where that range is of whole numbers, else float32; what lies beyond is cut in the graph, as the run cut it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from hgkd.data.pixels import as_value_range
from hgkd.errors import InvalidValueError, unknown_name_message
from hgkd.export.job import input_of
from hgkd.weights.run_file import literal_config
from hgkd.weights.signature import ImageInput

#: Layouts of the uint8 images that a graph can take, where it scales and normalises them itself: order of axes, of channels.
PREPROCESSINGS = ("nhwc-rgb", "nhwc-bgr", "nchw-rgb", "nchw-bgr")
_UINT16 = 65535.0


def run_value_range(meta: Mapping[str, Any]) -> tuple[float, float] | None:
    """Black and white of the images that a run was trained on; None: those of their type."""
    loader = literal_config(meta.get("cfg")).get("train_dataloader")
    dataset = loader.get("dataset") if isinstance(loader, Mapping) else None
    return as_value_range(dataset.get("value_range")) if isinstance(dataset, Mapping) else None


def inside(network: nn.Module, asked: str, value_range: Sequence[float] | None) -> ImageInput:
    """What a graph with its preprocessing inside takes.

    Args:
        asked: one of ``PREPROCESSINGS``; of other channels than RGB 'nhwc' or 'nchw'.
        value_range: black and white of images of more than 8 bits; None: 8 bits.

    Raises:
        ValueError: unknown, or an order of colours for other channels than RGB.
    """
    plain = input_of(network)
    layout, _, order = asked.lower().partition("-")
    known = PREPROCESSINGS if plain.order else ("nhwc", "nchw")
    if plain.order and not order:
        order = plain.order.lower()
    found = "-".join(filter(None, (layout, order)))
    if found not in known:
        if order and layout in ("nhwc", "nchw") and not plain.order:
            raise InvalidValueError(
                "preprocessing-order-of-channels",
                f"preprocessing={asked!r} is for RGB images, the network takes {plain.channels} channels in the order of the "
                f"training's; give {layout}",
            )
        raise InvalidValueError("preprocessing-unknown", unknown_name_message("preprocessing", asked, known))
    black, white = (0.0, 255.0) if value_range is None else (float(value_range[0]), float(value_range[1]))
    whole = black.is_integer() and white.is_integer() and black >= 0.0 and white <= _UINT16
    dtype = "uint8" if value_range is None else "uint16" if whole else "float32"
    return replace(plain, layout=layout.upper(), order=order.upper(), dtype=dtype, range=(black, white))


def input_for(network: nn.Module, asked: str | None, value_range: Sequence[float] | None) -> ImageInput:
    """What graphs take: with ``asked`` as :func:`inside`, else images in [0, 1]; raises as it does."""
    taken = input_of(network) if asked is None else inside(network, asked, value_range)
    return replace(taken, value_range=() if value_range is None else (float(value_range[0]), float(value_range[1])))
