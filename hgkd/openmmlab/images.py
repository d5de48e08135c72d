"""Training images that cannot be decoded: left out, and counted.

OpenCV decodes the intact part of a truncated file in silence; Pillow refuses it. So training images are read with Pillow, and
one that it refuses makes mmengine's data set take another.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from hgkd.engine.hooks import UNREADABLE, report_unreadable
from hgkd.engine.registries import TRANSFORMS
from hgkd.registry import HOOKS


@TRANSFORMS.register_module()
class LoadReadableImage:
    """mmcv's ``LoadImageFromFile`` that notes a file which it cannot decode, and passes it over.

    Args:
        report: text file to which workers append the names; None: they are only passed over.
        arguments: those of ``LoadImageFromFile``.
    """

    def __init__(self, report: str | None = None, **arguments: Any) -> None:
        from mmcv.transforms import LoadImageFromFile  # needs mmcv, which importing hgkd.openmmlab does not

        self.report = report
        self._load = LoadImageFromFile(imdecode_backend="pillow", ignore_empty=True, **arguments)

    def __call__(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """The entry with its image, or None when the file is missing or damaged."""
        loaded: dict[str, Any] | None = self._load(results)
        if loaded is None and self.report is not None:
            # one short write in append mode: several workers do not mix up their lines
            descriptor = os.open(self.report, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(descriptor, f"{results['img_path']}\n".encode(errors="surrogateescape"))
            os.close(descriptor)
        return loaded

    def __repr__(self) -> str:
        return f"LoadReadableImage({self._load})"


@HOOKS.register_module()
class UnreadableImagesHook(Hook):
    """Counts at the end of a run the training images that :class:`LoadReadableImage` passed over.

    ``work_dir/unreadable_files.txt`` names them, each once.
    """

    def after_train(self, runner: Runner) -> None:
        path = Path(runner.work_dir) / UNREADABLE
        if is_main_process() and path.is_file():
            report_unreadable(runner, path.read_text(encoding="utf-8", errors="surrogateescape").splitlines())
