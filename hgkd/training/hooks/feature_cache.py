"""Hook that lets a run keep its teacher's features on disk (:mod:`hgkd.teachers.cache`)."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from mmengine.dist import barrier, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from hgkd.data import UnlabelledImages
from hgkd.data.transforms import varying_steps
from hgkd.digests import ends_digest, files_digest
from hgkd.errors import InvalidValueError, StoppedError
from hgkd.registry import HOOKS
from hgkd.teachers.cache import gigabytes
from hgkd.training.wrapping import plain_model

_LOOKED_AT = 64  # images whose bytes are read
_LOOKED_AT_IN_GROUPS = 16  # where each costs a whole row group of a Parquet file


@HOOKS.register_module()
class TeacherCacheHook(Hook):
    """Teacher features are computed once a picture and read from disk afterwards, also by later runs.

    The pictures must be the same in every epoch: set ``transform=dict(kind='eval')`` for the training data, and
    ``model.flip`` for mirroring, which the cache knows of. The files take 4 * tokens * width bytes an image and block, 0.3 MB
    for a ViT-S/14 at 224 px. Their size is logged, compared with the free disk space, and taken from the disk at once.

    The same data are the same names and sizes, and the same first and last 64 KiB of up to 64 images, spread over all (of
    Parquet files 16), from wherever they lie: dates and the place of a folder do not count. Another change that leaves all of
    this as it was is not seen; delete the folder after it.

    Args:
        folder: where the files lie; runs with the same teacher, data and size share them. None: nothing is stored.
    """

    priority = "LOW"

    def __init__(self, folder: str | None) -> None:
        self.folder = None if folder is None else Path(folder).expanduser()

    def before_train(self, runner: Runner) -> None:
        """Open the store, or refuse data whose crops differ from epoch to epoch, and a disk without room.

        The first process makes the files; the others open them.
        """
        if self.folder is None:
            return
        transform = _fixed_transform(runner)
        if not is_main_process():
            barrier()
        _open(runner, self.folder, transform)
        if is_main_process():
            barrier()

    def planned(self, runner: Runner) -> str:
        """For a dry run: what the store will take, without making it."""
        if self.folder is None:
            return "not stored"
        _fixed_transform(runner)
        model = plain_model(runner)
        images = len(runner.train_loop.dataloader.dataset)
        free = shutil.disk_usage(next(p for p in (self.folder.absolute(), *self.folder.absolute().parents) if p.exists())).free
        planned = model.stored_bytes(images)
        enough = "" if free > planned else "  NOT ENOUGH (less is needed where the features are there already)"
        return f"{gigabytes(planned)} for {images} images in {self.folder}; {gigabytes(free)} free{enough}"


def _fixed_transform(runner: Runner) -> str:
    """The training images' transform as text; raises ValueError when its crops may differ from epoch to epoch."""
    transform = runner.train_loop.dataloader.dataset.transform
    if varying := varying_steps(transform):
        raise InvalidValueError(
            "pictures-differ-between-epochs",
            "TeacherCacheHook needs pictures that are the same in every epoch, but the training transform may change them "
            f"({', '.join(varying)}); set train_dataloader.dataset.transform=dict(kind='eval') and model.flip=0.5, "
            "or store nothing (teacher_features=None)",
        )
    return repr(transform)


def _open(runner: Runner, folder: Path, transform: str) -> None:
    dataset: UnlabelledImages = runner.train_loop.dataloader.dataset
    root = Path(dataset.data_root)
    paths = [Path(dataset.path(i)) for i in range(len(dataset))]
    names = [str(p.relative_to(root)) if p.is_relative_to(root) else str(p) for p in paths]
    sizes = [dataset.size(i) for i in range(len(dataset))]
    identity: dict[str, object] = {"files": files_digest(zip(names, sizes, strict=True)), "transform": transform}
    identity["content"] = _content(dataset)
    identity |= {"reading": dataset.reading} if hasattr(dataset, "reading") else {}
    model = plain_model(runner)
    model.store_features(folder, len(dataset), identity)


def _content(dataset: UnlabelledImages) -> str:
    """A digest of the bytes of some images: names and sizes are those of other pictures, too, where nothing is compressed."""
    count = min(_LOOKED_AT if dataset.blocks is None else _LOOKED_AT_IN_GROUPS, len(dataset))
    digest = hashlib.sha256()
    for place in range(count):
        try:
            with dataset.open(place * len(dataset) // count) as file:
                digest.update(ends_digest(file).encode())
        except StoppedError:  # a network that is down says nothing about an image
            raise
        except Exception:  # damaged, as in training, where another image takes its place
            digest.update(b"unreadable")
    return digest.hexdigest()
