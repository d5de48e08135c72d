"""Hook that lets a run keep its teacher's features on disk (:mod:`hgkd.teachers.cache`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from hgkd.digests import files_digest
from hgkd.engine.hooks import plain_model
from hgkd.registry import HOOKS

_RANDOM = ("Random", "Jitter")


@HOOKS.register_module()
class TeacherCacheHook(Hook):
    """Teacher features are computed once a picture and read from disk afterwards, also by later runs.

    The pictures must be the same in every epoch: set ``transform=dict(kind='eval')`` for the training data, and
    ``model.flip`` for mirroring, which the cache knows of. The files take pictures * 2 * tokens * width * 2 bytes a block.

    Args:
        folder: where the files lie; runs with the same teacher, data and size share them.
    """

    priority = "LOW"

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder).expanduser()

    def before_train(self, runner: Runner) -> None:
        """Open the store, or refuse data whose crops differ from epoch to epoch."""
        dataset: Any = runner.train_loop.dataloader.dataset
        transform = repr(dataset.transform)
        if any(word in transform for word in _RANDOM):
            raise ValueError(
                "TeacherCacheHook needs pictures that are the same in every epoch, but the training transform is random "
                f"({transform.split()[0]} ...); set train_dataloader.dataset.transform=dict(kind='eval') and model.flip=0.5, "
                "or remove the hook"
            )
        root = Path(dataset.data_root)
        paths = [Path(dataset.path(i)) for i in range(len(dataset))]
        names = [str(p.relative_to(root)) if p.is_relative_to(root) else str(p) for p in paths]
        sizes = [dataset.size(i) for i in range(len(dataset))]
        identity = {"files": files_digest(zip(names, sizes, strict=True)), "transform": transform}
        identity |= {"reading": dataset.reading} if hasattr(dataset, "reading") else {}
        model: Any = plain_model(runner)
        model.store_features(self.folder, len(dataset), identity)
        runner.logger.info(f"teacher features are kept in {self.folder}")
