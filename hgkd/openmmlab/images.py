"""Images that cannot be decoded: left out of a training, and counted; refused in validation and test.

OpenCV decodes the intact part of a truncated file in silence; Pillow refuses it. So images are read with Pillow. For a training
image that it refuses mmengine's data set takes another; a test without one of its images would be another measure. Grey images
of more than 8 bits, which Pillow would cut at 255, are scaled as in hgkd's own data sets. mmdet and mmseg train on 8-bit BGR: a
backbone for other channels is refused, and ``value_range`` says which values of deeper images are black and white.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from numpy.typing import NDArray
from PIL import Image

from hgkd.data.images import read_rgb
from hgkd.data.pixels import _is_packed_deep, as_value_range
from hgkd.errors import DataError
from hgkd.registry import HOOKS
from hgkd.training.hooks.progress import UNREADABLE, report_unreadable
from hgkd.training.registries import TRANSFORMS


@TRANSFORMS.register_module()
class LoadReadableImage:
    """mmcv's ``LoadImageFromFile`` that notes a file which it cannot decode, and passes it over.

    Args:
        report: text file to which workers append the names; None: they are only passed over.
        required: refuse such a file instead.
        value_range: (low, high), the values of black and white in images of more than 8 bits, grey or RGB; see
            :func:`hgkd.data.pixels.decode`.
        arguments: those of ``LoadImageFromFile``, but for its decoder and what it does with a bad file.

    Raises:
        DataError: when called with a required image that cannot be decoded.
    """

    def __init__(
        self,
        report: str | None = None,
        required: bool = False,
        value_range: Sequence[float] | None = None,
        **arguments: object,
    ) -> None:
        from mmcv.transforms import LoadImageFromFile  # needs mmcv, which importing hgkd.openmmlab does not

        self.report = report
        self.required = required
        self.value_range = as_value_range(value_range)
        self._load = LoadImageFromFile(**{**arguments, "imdecode_backend": "pillow", "ignore_empty": True})

    def __call__(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """The entry with its image, or None when the file is missing or damaged."""
        loaded: dict[str, Any] | None = self._load(results)
        if (
            loaded is not None
            and self._load.color_type != "unchanged"
            and is_deep(results["img_path"], self.value_range is not None)
        ):
            loaded["img"] = self._scaled(results["img_path"])
        if loaded is None and self.required:
            raise DataError(
                "image-unreadable",
                f"image {results['img_path']} cannot be read: missing, cut off, or no image. Replace it, or take it out of the "
                "data set; it is not passed over, because that would be another measure",
            )
        if loaded is None and self.report is not None:
            # one short write in append mode: several workers do not mix up their lines
            descriptor = os.open(self.report, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(descriptor, f"{results['img_path']}\n".encode(errors="surrogateescape"))
            os.close(descriptor)
        return loaded

    def _scaled(self, file: str) -> NDArray[Any]:
        """An image of more than 8 bits, in 8 bits and the kind that is asked for."""
        image = np.asarray(read_rgb(file, self.value_range))
        image = image[..., 0] if "grayscale" in self._load.color_type else image[..., ::-1]
        return image.astype(np.float32) if self._load.to_float32 else np.ascontiguousarray(image)

    def __repr__(self) -> str:
        return f"LoadReadableImage({self._load})"


def is_deep(file: str | os.PathLike[str], colours: bool = False) -> bool:
    """Whether a file is a grey image of more than 8 bits; with ``colours`` also one of several such bands."""
    try:
        with Image.open(file) as image:
            if colours and _is_packed_deep(image):
                return True
            return image.mode in ("I", "F") or image.mode.startswith("I;16")
    except (OSError, ValueError):  # of another storage, or no image to Pillow
        return False


@HOOKS.register_module()
class UnreadableImagesHook(Hook):
    """Counts at the end of a run the training images that :class:`LoadReadableImage` passed over.

    ``work_dir/unreadable_files.txt`` names them, each once.
    """

    def after_train(self, runner: Runner) -> None:
        path = Path(runner.work_dir) / UNREADABLE
        if is_main_process() and path.is_file():
            report_unreadable(runner, path.read_text(encoding="utf-8", errors="surrogateescape").splitlines())
