"""Folders, lists and tar shards of images as data sets that outlive damaged files.

A file that cannot be read is skipped: the next readable one takes its place, it is logged once and counted, over all
worker processes of a loader. Files are opened when their turn comes, never at the start. In a run of several GPUs each
process counts what its own loader met.

As in torchvision's ``ImageFolder`` the orientation tag (EXIF) is not applied.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import random
import stat
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from mmengine.logging import print_log
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from hgkd.data.sampler import image_seed, seeded
from hgkd.data.shards import ShardIndex, index_shards
from hgkd.data.transforms import ImageTransform, build_transform, eval_transform
from hgkd.errors import DataError
from hgkd.registry import DATASETS

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")

# What Pillow may decode, whatever the file is called: no formats that start other programs (EPS) or nest files
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")
_Item = TypeVar("_Item")
_EXTENSION_LIST = "jpg, jpeg, png, bmp, webp, tif, tiff"


def read_rgb(path: str | os.PathLike[str]) -> Image.Image:
    """Decode an image file as 8-bit RGB.

    Transparent places become white; 16-bit grey is divided by 257; float grey counts as [0, 1] when nothing exceeds 1,
    else as [0, 255]; of several frames the first is taken.

    Raises:
        OSError: missing, not a regular file, not an image, truncated.
        Exception: whatever else Pillow's decoders raise on damaged content.
    """
    # a named pipe would block for ever
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(f"not a regular file: {os.fspath(path)}")
    with open(path, "rb") as file:
        return decode_rgb(file)


def decode_rgb(file: BinaryIO) -> Image.Image:
    """As :func:`read_rgb`, of an open file."""
    with Image.open(file, formats=_FORMATS) as image:
        image.load()
        if image.mode == "I" or image.mode.startswith("I;16"):
            grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
            return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
        if image.mode == "F":
            values = np.nan_to_num(np.asarray(image, dtype=np.float64))
            values = values * 255 if values.max() <= 1 else values
            return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8)).convert("RGB")
        if image.has_transparency_data:
            layer = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
        return image.convert("RGB")


def find_images(folder: str) -> list[str]:
    """Paths of all image files below ``folder``, relative to it, sorted; links are followed, cycles are not.

    Whether a name belongs to an image is told by its extension, upper or lower case.
    """
    found: list[str] = []
    seen: set[str] = set()
    for here, subfolders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()  # which of two links to one folder is walked must not depend on the disk
        found.extend(
            os.path.relpath(os.path.join(here, name), folder) for name in names if name.lower().endswith(IMAGE_EXTENSIONS)
        )
    return sorted(found)


class _PathTable:
    """Strings in two arrays: reference counting would copy a list of a million objects into every forked worker."""

    def __init__(self, paths: Iterable[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self._bytes[self._ends[index] : self._ends[index + 1]].tobytes())


class _BadMarks:
    """One byte a file, 1 = unreadable, in shared memory: forked and spawned workers write to the same bytes."""

    def __init__(self, size: int) -> None:
        self.flags = torch.zeros(size, dtype=torch.uint8).share_memory_()

    def __deepcopy__(self, memo: dict[int, Any]) -> _BadMarks:
        return self  # mmengine copies data sets it is given; the marks describe files on disk, and stay one set

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.flags.share_memory_()  # lost when pickled to a file, kept when sent to a worker

    def count(self) -> int:
        return int(torch.count_nonzero(self.flags))

    def indices(self) -> list[int]:
        return [int(i) for i in torch.nonzero(self.flags).flatten()]


class _ImageFiles(Dataset[dict[str, Any]]):
    """Reading and replacing of damaged files, shared by the data sets below.

    Args:
        root: absolute folder; relative ``paths`` are below it.
        paths: relative or absolute.
        transform: PIL RGB image -> uint8 tensor (3, H, W).
        max_bad_share: share of the files, in [0, 1], that may turn out unreadable.
        shards: where the images lie when they are no files of their own; ``paths`` are then names for messages.
    """

    def __init__(
        self,
        root: str,
        paths: Sequence[str],
        transform: ImageTransform,
        max_bad_share: float,
        shards: ShardIndex | None = None,
    ) -> None:
        if not 0 <= max_bad_share <= 1:
            raise ValueError(f"max_bad_share is a share of the images in [0, 1], got {max_bad_share}")
        self.data_root = root
        self.transform = transform
        self.max_bad_share = max_bad_share
        self._paths = _PathTable(paths)
        self._shards = shards
        self._bad = _BadMarks(len(paths))

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> str:
        """Absolute path of an image; of one in a shard, the shard's with the member's name after it."""
        return os.path.join(self.data_root, self._paths[index])

    def size(self, index: int) -> int:
        """Bytes of an image file or member; -1 when the file is not there."""
        if self._shards is not None:
            return self._shards.size(index)
        return os.path.getsize(self.path(index)) if os.path.exists(self.path(index)) else -1

    def image(self, index: int) -> Image.Image:
        """An image, decoded as 8-bit RGB and no more; errors as :func:`read_rgb`."""
        if self._shards is None:
            return read_rgb(self.path(index))
        return decode_rgb(io.BytesIO(self._shards.read(index)))

    def bad_files(self) -> list[str]:
        """Absolute paths of the files found unreadable so far, by any worker process, in the order of the data set."""
        return [self.path(i) for i in self._bad.indices()]

    def _load(self, index: int, epoch_seed: int | None = None) -> tuple[int, Tensor]:
        """Read image ``index``, or the next readable one, counting round from the last to the first.

        Args:
            epoch_seed: from it and the image follows what the transform draws; None: it draws from torch's generator as that
                stands.

        Returns:
            The index of the image that was read, and its transformed tensor.

        Raises:
            IndexError: beyond the data set.
            DataError: too many files are unreadable.
        """
        total = len(self)
        if not -total <= index < total:
            raise IndexError(f"index {index} of a data set of {total} images")
        for step in range(total):
            place = (index + step) % total
            if not self._bad.flags[place]:
                try:
                    image = self.image(place)
                except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
                    self._mark(place, error)
                else:
                    with seeded(None if epoch_seed is None else image_seed(epoch_seed, place)):
                        return place, self.transform(image)
            self._check_share()
        raise DataError(self._report("none is left"))

    def _mark(self, index: int, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}"
        if not self._bad.flags[index]:
            self._bad.flags[index] = 1
            print_log(
                f"skipping unreadable image {self.path(index)} ({reason}); the next readable one takes its place",
                logger="current",
                level=logging.WARNING,
            )

    def _check_share(self) -> None:
        bad = self._bad.count()
        if bad > self.max_bad_share * len(self):
            raise DataError(self._report(f"max_bad_share={self.max_bad_share} allows {self.max_bad_share:.2%}"))

    def _report(self, verdict: str) -> str:
        bad = self._bad.indices()
        files = ", ".join(self.path(i) for i in bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        return (
            f"{len(bad)} of {len(self)} images ({len(bad) / len(self):.2%}) in {self.data_root} cannot be read, "
            f"{verdict}: {files}. Repair or remove these files (the log gives the reasons), or raise max_bad_share"
        )


@DATASETS.register_module()
class UnlabelledImages(_ImageFiles):
    """Images for training, from a folder searched recursively, from a list, or from tar shards.

    An item is ``{'inputs': uint8 tensor (3, H, W) RGB, 'index': int}``; ``index`` is the asked one, or for an
    unreadable file that of the image which took its place. Use with ``collate_fn=dict(type='default_collate')``.

    Whenever an unreadable file is met, the run stops if more than ``max_bad_share`` of *all* files have been found
    unreadable: with the default of 10 % a single one ends a run on 9 images, and is tolerated among 10.

    Args:
        data_root: folder of the images, any depth and any file names (jpg, jpeg, png, bmp, webp, tif, tiff). When it holds
            none of them, but .tar files at any depth, the images in these (:mod:`hgkd.data.shards`).
        list_file: text file (UTF-8) used instead of searching: one path a line, relative to ``data_root`` or absolute, but
            below ``data_root``: a list from elsewhere reaches no other file.
        image_size: result side in pixels, or (H, W).
        transform: options of :func:`hgkd.data.train_transform`, or with ``kind='eval'`` of ``eval_transform``.
        max_bad_share: share of unreadable files above which the run stops; 0 tolerates none.
        limit: keep only so many images: the first of a shuffle that is always the same.

    Raises:
        FileNotFoundError: the folder or the list does not exist.
        DataError: no images; a damaged shard; a listed path leaves ``data_root``; later, too many unreadable files.
        TypeError, ValueError: an option out of range or unknown.
    """

    def __init__(
        self,
        data_root: str | os.PathLike[str],
        list_file: str | os.PathLike[str] | None = None,
        image_size: int | Sequence[int] = 224,
        transform: Mapping[str, Any] | None = None,
        max_bad_share: float = 0.1,
        limit: int | None = None,
    ) -> None:
        _check_limit("limit", limit)
        built = build_transform(image_size, transform)
        root = _existing_folder(data_root)
        index: ShardIndex | None = None
        if list_file is not None:
            paths = _first_shuffled(_read_list(os.path.expanduser(os.fspath(list_file)), root), limit)
        else:
            paths = _first_shuffled(find_images(root), limit)
            if not paths:
                shards, names, places = index_shards(root, IMAGE_EXTENSIONS)
                kept = _first_shuffled(list(zip(names, places, strict=True)), limit)
                paths = [name for name, _ in kept]
                index = ShardIndex(root, shards, (place for _, place in kept))
                if not paths:
                    inside = f" and for members of its {len(shards)} .tar shards named like key.jpg" if shards else ""
                    raise DataError(
                        f"no images below {root}; looked for files ending in {_EXTENSION_LIST}{inside}. "
                        "Set data_root to the folder that holds them"
                    )
                print_log(f"{len(names)} images in {len(shards)} shards below {root}", logger="current")
        super().__init__(root, paths, built, max_bad_share, index)
        self.metainfo: dict[str, Any] = {}

    def __getitem__(self, index: int) -> dict[str, Any]:
        place, inputs = self._load(int(index), getattr(index, "epoch_seed", None))
        return {"inputs": inputs, "index": place}


@DATASETS.register_module()
class LabelledImages(_ImageFiles):
    """Images with labels: one folder a class, ``data_root/<class>/**``, or a list. By default centre crops, nothing random.

    An item is ``{'inputs': uint8 tensor (3, H, W) RGB, 'label': int, 'index': int, 'split': str}``; for an unreadable
    file, label and index are those of the image which took its place (a repeated index is a replaced image).

    Args:
        data_root: folder of the class folders; those whose names start with a dot are passed over.
        list_file: text file (UTF-8) used instead of class folders: one image a line, its path and its class, separated by
            spaces in a .txt (the class is the last word), by a comma in a .csv, by a tab in a .tsv. A first line
            ``path,label`` is passed over. Paths are relative to ``data_root`` or absolute, but below it.
        image_size: result side in pixels, or (H, W).
        resize_ratio: shorter side before the crop, in units of ``image_size``; at least 1.
        limit_per_class: keep only so many images of a class: the first of a shuffle that is always the same.
        transform: see :class:`UnlabelledImages`, for training; None: the centre crop.
        label_fraction: keep this share of the images of every class, at least one, as drawn with ``label_seed``; logged.
        label_seed: of that draw.
        split: tag that every item carries, so that a metric can tell memory and test images apart.
        max_bad_share: see :class:`UnlabelledImages`.

    Attributes:
        classes: class names, sorted; a label is an index into them.
        labels: int64 array (N,), the label of each image.

    Raises:
        FileNotFoundError: the folder or the list does not exist.
        DataError: no class folders, or one without images; a list of an unknown format, or without images, or with a path
            that leaves ``data_root``; later, too many unreadable files.
        TypeError, ValueError: an option out of range.
    """

    def __init__(
        self,
        data_root: str | os.PathLike[str],
        image_size: int | Sequence[int] = 224,
        resize_ratio: float = 1.0,
        limit_per_class: int | None = None,
        split: str = "test",
        max_bad_share: float = 0.1,
        list_file: str | os.PathLike[str] | None = None,
        transform: Mapping[str, Any] | None = None,
        label_fraction: float = 1.0,
        label_seed: int = 0,
    ) -> None:
        _check_limit("limit_per_class", limit_per_class)
        if not 0 < label_fraction <= 1:
            raise ValueError(f"label_fraction is the share of the labelled images to use, in (0, 1], got {label_fraction}")
        if transform is not None and resize_ratio != 1.0:
            raise ValueError(
                f"resize_ratio={resize_ratio} is for the centre crop; with transform={dict(transform)} leave it out"
            )
        built = eval_transform(image_size, resize_ratio) if transform is None else build_transform(image_size, transform)
        root = _existing_folder(data_root)
        found = _class_folders(root) if list_file is None else _read_labels(os.path.expanduser(os.fspath(list_file)), root)
        self.classes = sorted(found)
        self.split = split
        self.metainfo: dict[str, Any] = {"classes": tuple(self.classes)}
        paths: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(self.classes):
            kept = _first_shuffled(found[name], limit_per_class)
            if label_fraction < 1:
                kept = sorted(random.Random(f"{label_seed} {name}").sample(kept, max(1, round(label_fraction * len(kept)))))
            paths += kept
            labels += [label] * len(kept)
        self.labels = np.array(labels, dtype=np.int64)
        super().__init__(root, paths, built, max_bad_share)
        if label_fraction < 1:
            counts = np.bincount(self.labels)
            print_log(
                f"label_fraction={label_fraction} (label_seed {label_seed}): {len(paths)} labelled images of "
                f"{len(self.classes)} classes in {root}, {counts.min()} to {counts.max()} a class",
                logger="current",
            )

    def __getitem__(self, index: int) -> dict[str, Any]:
        place, inputs = self._load(int(index), getattr(index, "epoch_seed", None))
        return {"inputs": inputs, "label": int(self.labels[place]), "index": place, "split": self.split}


def _existing_folder(data_root: str | os.PathLike[str]) -> str:
    root = os.path.abspath(os.path.expanduser(os.fspath(data_root)))
    if not os.path.isdir(root):
        why = "is not a folder" if os.path.exists(root) else "does not exist"
        raise FileNotFoundError(f"data_root {root} {why}; set it to the folder that holds the images")
    return root


def _class_folders(root: str) -> dict[str, list[str]]:
    """Class name -> its images, relative to ``root``."""
    with os.scandir(root) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(f"no class folders in {root}; expected {os.path.join(root, '<class>', '<image>')}, one folder a class")
    classes = {name: [os.path.join(name, path) for path in find_images(os.path.join(root, name))] for name in names}
    for name, paths in classes.items():
        if not paths:
            raise DataError(
                f"class folder {os.path.join(root, name)} holds no images (files ending in {_EXTENSION_LIST}); "
                "fill it or remove it"
            )
    return classes


def _list_lines(list_file: str) -> list[str]:
    if not os.path.isfile(list_file):
        raise FileNotFoundError(
            f"list_file {os.path.abspath(list_file)} does not exist; give a text file with one image path a line, or "
            "leave list_file out to search data_root"
        )
    with open(list_file, encoding="utf-8-sig", errors="surrogateescape", newline=None) as lines:
        return [line.strip() for line in lines]


def _listed_path(entry: str, list_file: str, number: int, root: str) -> str:
    """A path of a list, as written but without '.' and '..' parts."""
    if "\0" in entry:
        raise DataError(f"{list_file} line {number} is not text; give a text file with one image path a line")
    path = os.path.normpath(entry)
    if not _is_below(os.path.join(root, path), root):
        raise DataError(
            f"{list_file} line {number}: {entry!r} leaves data_root {root}; set data_root to a folder above all "
            "images (data_root=/ allows every path)"
        )
    return path


def _read_list(list_file: str, root: str) -> list[str]:
    """Paths of a list file."""
    lines = enumerate(_list_lines(list_file), start=1)
    paths = [_listed_path(entry, list_file, number, root) for number, entry in lines if entry]
    if not paths:
        raise DataError(f"list_file {list_file} names no images; write one path a line, relative to {root} or absolute")
    return paths


def _read_labels(list_file: str, root: str) -> dict[str, list[str]]:
    """Class name -> its images, as a list with labels has them."""
    suffix = os.path.splitext(list_file)[1].lower()
    if suffix not in _LABEL_COLUMNS:
        raise DataError(
            f"list of labels {list_file} is of an unknown format; expected a .txt with 'PATH CLASS' a line, a .csv with "
            "'PATH,CLASS' or a .tsv with the two separated by a tab"
        )
    split, example = _LABEL_COLUMNS[suffix]
    classes: dict[str, list[str]] = {}
    for number, line in enumerate(_list_lines(list_file), start=1):
        columns = split(line)
        if not line or (number == 1 and columns == ["path", "label"]):
            continue
        if len(columns) != 2 or not all(columns):
            raise DataError(
                f"{list_file} line {number}: {line[:80]!r} is not a path and a class; a {suffix} has lines like {example!r}"
            )
        classes.setdefault(columns[1], []).append(_listed_path(columns[0], list_file, number, root))
    if not classes:
        raise DataError(f"list of labels {list_file} names no images; write a path and a class a line")
    return classes


def _csv_columns(line: str) -> list[str]:
    return [column.strip() for row in csv.reader([line]) for column in row]


def _tab_columns(line: str) -> list[str]:
    return [column.strip() for column in line.split("\t")]


def _word_columns(line: str) -> list[str]:
    return line.rsplit(maxsplit=1)


# how a line is split, and an example
_LABEL_COLUMNS = {
    ".txt": (_word_columns, "a/1.jpg cat"),
    ".csv": (_csv_columns, "a/1.jpg,cat"),
    ".tsv": (_tab_columns, "a/1.jpg\tcat"),
}


def _is_below(path: str, root: str) -> bool:
    return os.path.commonpath([os.path.normpath(path), root]) == root


def _check_limit(name: str, limit: int | None) -> None:
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"{name} must be None (all images) or a whole number from 1, got {limit!r}")


def _first_shuffled(items: list[_Item], limit: int | None) -> list[_Item]:
    """The first ``limit`` of a copy shuffled with seed 0; without a limit the list as it is."""
    if limit is None:
        return items
    shuffled = list(items)
    random.Random(0).shuffle(shuffled)
    return shuffled[:limit]
