"""Folders, lists and tar shards of images as data sets that outlive damaged files.

A file that cannot be read is skipped: the next readable one takes its place, it is logged once and counted, over all
worker processes of a loader. Files are opened when their turn comes; at the start some are looked at, for what a whole
folder has in common (:mod:`hgkd.data.pixels`). In a run of several GPUs each process counts what its own loader met.

Images are turned upright by their EXIF orientation, as viewers and OpenMMLab do, and torchvision's ``ImageFolder`` does not.
"""

from __future__ import annotations

import io
import logging
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from mmengine.logging import print_log
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from hgkd.data.channels import READING_CHANNELS, decode_channels, measure_channels
from hgkd.data.folders import (
    ARRAY_EXTENSION,
    EXTENSION_LIST,
    IMAGE_EXTENSIONS,
    SHARD_EXTENSION,
    Content,
    folder_identity,
    is_system,
    kind_name,
    printable,
    search,
)
from hgkd.data.lists import read_labels, read_list
from hgkd.data.pixels import (
    READING,
    BandsError,
    Range,
    as_value_range,
    check_value_range,
    decode,
    measure,
    open_image,
    warnings_of,
)
from hgkd.data.sampler import image_seed, seeded
from hgkd.data.shards import ShardIndex, index_shards
from hgkd.data.transforms import ImageTransform, build_transform, eval_transform
from hgkd.errors import DataError, InvalidValueError, MissingFileError, abbreviate
from hgkd.pixels import check_in_chans
from hgkd.registry import DATASETS

_Item = TypeVar("_Item")
_LOOKED_AT = 16
_CHANNEL_EXTENSIONS = (*IMAGE_EXTENSIONS, ARRAY_EXTENSION)


def read_rgb(path: str | os.PathLike[str], value_range: Range | None = None, use_alpha: bool = True) -> Image.Image:
    """Decode an image file as 8-bit RGB, upright; the rules are :func:`hgkd.data.pixels.decode`'s.

    Raises:
        OSError: missing, not a regular file, not an image, truncated.
        Exception: whatever else Pillow's decoders raise on damaged content.
    """
    with open_image(path) as file:
        return decode_rgb(file, value_range, use_alpha)


def read_crops(
    files: Sequence[str | os.PathLike[str]],
    image_size: int | Sequence[int],
    value_range: Sequence[float] | None = None,
    in_chans: int | None = None,
) -> Tensor:
    """Centre crops of image files, uint8 (B, 3, H, W), or with ``in_chans`` float (B, C, H, W) in [0, 1].

    Args:
        value_range, in_chans: as for :class:`UnlabelledImages`.

    Raises:
        DataError: a file cannot be read.
    """
    crop, limits = eval_transform(image_size), as_value_range(value_range)
    crops = []
    for file in files:
        try:
            if in_chans is None:
                crops.append(crop(read_rgb(file, limits)))
            else:
                with open_image(file) as opened:
                    crops.append(crop(decode_channels(opened, in_chans, limits)))
        except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
            raise DataError(
                "image-unreadable",
                f"image {printable(os.fspath(file))} cannot be read ({type(error).__name__}: {error}); leave it out",
            ) from error
    return torch.stack(crops)


def decode_rgb(file: BinaryIO, value_range: Range | None = None, use_alpha: bool = True) -> Image.Image:
    """Decode an open image file; see :func:`read_rgb`."""
    return decode(file, value_range, use_alpha)


def find_images(folder: str, arrays: bool = False) -> list[str]:
    """Paths of all image files below ``folder``, relative to it, sorted; links are followed, cycles are not.

    Args:
        arrays: NumPy arrays (.npy) are images, too.

    Whether a name belongs to an image is told by its extension, upper or lower case. Hidden names and those of a system
    (``._x.jpg``, ``.ipynb_checkpoints``, ``__MACOSX``, ``@eaDir``, ``#recycle``) are passed over.

    Raises:
        DataError: a folder that cannot be listed.
    """
    return search(folder, extensions=_CHANNEL_EXTENSIONS if arrays else IMAGE_EXTENSIONS).images


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
        transform: PIL RGB image -> uint8 tensor (3, H, W); with ``in_chans`` float tensor (C, H, W) -> one.
        max_bad_share: share of the files, in [0, 1], that may turn out unreadable.
        value_range, use_alpha: see :func:`hgkd.data.pixels.decode`.
        shards: where the images lie when they are no files of their own; ``paths`` are then names for messages.
        in_chans: number of channels, see :func:`hgkd.data.channels.decode_channels`; None: 8-bit RGB.
    """

    def __init__(
        self,
        root: str,
        paths: Sequence[str],
        transform: ImageTransform,
        max_bad_share: float,
        value_range: Sequence[float] | None = None,
        use_alpha: bool = True,
        shards: ShardIndex | None = None,
        in_chans: int | None = None,
    ) -> None:
        if not 0 <= max_bad_share <= 1:
            raise InvalidValueError(
                "bad-share-out-of-range", f"max_bad_share is a share of the images in [0, 1], got {max_bad_share}"
            )
        self.value_range = as_value_range(value_range)
        self.use_alpha = use_alpha
        self.in_chans = in_chans
        self.data_root = root
        self.transform = transform
        self.max_bad_share = max_bad_share
        self._paths = _PathTable(paths)
        self._shards = shards
        self._bad = _BadMarks(len(paths))
        self._look()

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, index: int) -> str:
        """Absolute path of an image; of one in a shard, the shard's with the member's name after it."""
        return os.path.join(self.data_root, self._paths[index])

    def names(self) -> Iterator[str]:
        """The paths as they are kept: below ``data_root``, or absolute."""
        return (self._paths[index] for index in range(len(self)))

    def size(self, index: int) -> int:
        """Bytes of an image file or member; -1 when the file is not there."""
        if self._shards is not None:
            return self._shards.size(index)
        return os.path.getsize(self.path(index)) if os.path.exists(self.path(index)) else -1

    @property
    def reading(self) -> dict[str, Any]:
        """How files become pixels, as plain values: what is stored of pixels belongs to it."""
        if self.in_chans is not None:
            return {"channels": self.in_chans, "rules": READING_CHANNELS, "value_range": self.value_range}
        return {"rules": READING, "value_range": self.value_range, "use_alpha": self.use_alpha}

    def open(self, index: int) -> BinaryIO:
        """The file of an image, from wherever it lies."""
        return open_image(self.path(index)) if self._shards is None else io.BytesIO(self._shards.read(index))

    def image(self, index: int) -> Image.Image | Tensor:
        """An image, decoded and no more: 8-bit RGB, or with ``in_chans`` a float tensor (C, H, W); errors as
        :func:`read_rgb`."""
        with self.open(index) as file:
            if self.in_chans is not None:
                return decode_channels(file, self.in_chans, self.value_range)
            return decode_rgb(file, self.value_range, self.use_alpha)

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
        raise DataError("no-readable-images", self._report("none is left"))

    def _look(self) -> None:
        """Measure some images, spread over all, and warn of what they have in common.

        Raises:
            DataError: more of them than ``max_bad_share`` have other bands than can be read, or than ``in_chans``.
            ValueError: a ``value_range`` that makes all of them black or white.
        """
        count = min(_LOOKED_AT, len(self))
        measured, refused = [], []
        for place in range(count):
            index = place * len(self) // count
            try:
                with self.open(index) as file:
                    measured.append(
                        measure(file, self.value_range)
                        if self.in_chans is None
                        else measure_channels(file, self.in_chans, self.value_range)
                    )
            except BandsError as error:
                refused.append(f"{printable(self.path(index))}: {error}")
            except Exception:  # damaged: replaced and counted in its turn
                continue
        if len(refused) > self.max_bad_share * count:
            if self.in_chans is None:
                raise DataError(
                    "images-with-other-bands",
                    f"{len(refused)} of {count} images looked at have too many bands, e.g. {refused[0]}",
                )
            raise DataError(
                "images-of-other-channels",
                f"{len(refused)} of {count} images looked at cannot be read with in_chans={self.in_chans}, e.g. {refused[0]}",
            )
        check_value_range(measured, self.value_range)
        for warning in warnings_of(measured, self.value_range, self.use_alpha):
            print_log(f"{printable(self.data_root)}: {warning}", logger="current", level=logging.WARNING)

    def _mark(self, index: int, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}"
        if not self._bad.flags[index]:
            self._bad.flags[index] = 1
            print_log(
                f"skipping unreadable image {printable(self.path(index))} ({reason}); the next readable one takes its place",
                logger="current",
                level=logging.WARNING,
            )

    def _check_share(self) -> None:
        bad = self._bad.count()
        if bad > self.max_bad_share * len(self):
            raise DataError(
                "too-many-bad-images", self._report(f"max_bad_share={self.max_bad_share} allows {self.max_bad_share:.2%}")
            )

    def _report(self, verdict: str) -> str:
        bad = self._bad.indices()
        files = abbreviate([printable(self.path(i)) for i in bad], 3)
        return (
            f"{len(bad)} of {len(self)} images ({len(bad) / len(self):.2%}) in {printable(self.data_root)} cannot be read, "
            f"{verdict}: {files}. The first: {self._reason(bad[0])}. Repair or remove these files (the log gives all reasons), "
            "or raise max_bad_share"
        )

    def _reason(self, index: int) -> str:
        """Why an image that was found unreadable, perhaps by another process, cannot be read."""
        try:
            self.image(index)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "it can be read by now"


@DATASETS.register_module()
class UnlabelledImages(_ImageFiles):
    """Images for training, from a folder searched recursively, from a list, or from tar shards.

    An item is ``{'inputs': uint8 tensor (3, H, W) RGB, 'index': int}``; ``index`` is the asked one, or for an
    unreadable file that of the image which took its place. Use with ``collate_fn=dict(type='default_collate')``.

    Whenever an unreadable file is met, the run stops if more than ``max_bad_share`` of *all* files have been found
    unreadable: with the default of 10 % a single one ends a run on 9 images, and is tolerated among 10.

    Args:
        data_root: folder of the images (``IMAGE_EXTENSIONS``), any depth and any file names; or of .tar files, at any depth,
            whose images are read (:mod:`hgkd.data.shards`). What is a system's (hidden, ``__MACOSX``) is passed over; what is
            left out is told by kind.
        list_file: text file (UTF-8, or UTF-16 with its mark) used instead of searching: one path a line, relative to
            ``data_root`` or absolute, but below ``data_root``: a list from elsewhere reaches no other file.
        image_size: result side in pixels, or (H, W).
        transform: options of :func:`hgkd.data.train_transform`, or with ``kind='eval'`` of ``eval_transform``.
        max_bad_share: share of unreadable files above which the run stops; 0 tolerates none.
        limit: keep only so many images: the first of a shuffle that is always the same.
        value_range: (low, high), the values of black and white in images of more than 8 bits; see
            :func:`hgkd.data.pixels.decode`.
        use_alpha: False leaves out a band that is tagged as transparency.
        in_chans: number of channels that every file has. The items' ``inputs`` are then float (C, H, W) in [0, 1], with all
        bits
            of the file, and NumPy arrays (.npy) are images, too; see :func:`hgkd.data.channels.decode_channels`. None: RGB.

    Raises:
        FileNotFoundError: the folder or the list does not exist.
        DataError: no images, or images and shards; a folder that cannot be listed; a damaged shard; a list that names what is
            no image, or leaves ``data_root``; images of too many bands; later, too many unreadable files.
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
        value_range: Sequence[float] | None = None,
        use_alpha: bool = True,
        in_chans: int | None = None,
    ) -> None:
        _check_limit("limit", limit)
        extensions = _extensions(in_chans)
        built = build_transform(image_size, transform, in_chans)
        root = _existing_folder(data_root)
        index: ShardIndex | None = None
        if list_file is not None:
            paths = _first_shuffled(read_list(os.path.expanduser(os.fspath(list_file)), root), limit)
        else:
            found = search(root, extensions=extensions)
            if found.shards or found.unfinished:
                paths, index = _from_shards(root, found, limit, extensions)
            else:
                paths = _first_shuffled(_images_of(root, found), limit)
        super().__init__(root, paths, built, max_bad_share, value_range, use_alpha, index, in_chans)
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
        data_root: folder of the class folders; hidden ones and those of a system (``__MACOSX``) are passed over.
        list_file: text file (UTF-8, or UTF-16 with its mark) used instead of class folders: one image a line, its path and
            its class, separated by spaces in a .txt (the class is the last word), by a comma in a .csv, by a tab in a .tsv.
            A first line ``path,label`` is passed over. Paths are relative to ``data_root`` or absolute, but below it.
        image_size: result side in pixels, or (H, W).
        resize_ratio: shorter side before the crop, in units of ``image_size``; at least 1.
        limit_per_class: keep only so many images of a class: the first of a shuffle that is always the same.
        transform: see :class:`UnlabelledImages`, for training; None: the centre crop.
        label_fraction: keep this share of the images of every class, at least one, as drawn with ``label_seed``; logged.
        label_seed: of that draw.
        split: tag that every item carries, so that a metric can tell memory and test images apart.
        max_bad_share, value_range, use_alpha, in_chans: see :class:`UnlabelledImages`.

    Attributes:
        classes: class names, sorted; a label is an index into them.
        labels: int64 array (N,), the label of each image.

    Raises:
        FileNotFoundError: the folder or the list does not exist.
        DataError: no class folders, or one without images, or none but 'train' and 'test'; a list of an unknown format, without
            images, with an image of two classes, or with a path that is no image's or leaves ``data_root``; images of too many
            bands; later, too many unreadable files.
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
        value_range: Sequence[float] | None = None,
        use_alpha: bool = True,
        in_chans: int | None = None,
    ) -> None:
        _check_limit("limit_per_class", limit_per_class)
        extensions = _extensions(in_chans)
        if not 0 < label_fraction <= 1:
            raise InvalidValueError(
                "label-fraction-out-of-range",
                f"label_fraction is the share of the labelled images to use, in (0, 1], got {label_fraction}",
            )
        if transform is not None and resize_ratio != 1.0:
            raise InvalidValueError(
                "resize-ratio-without-crop",
                f"resize_ratio={resize_ratio} is for the centre crop; with transform={dict(transform)} leave it out",
            )
        built = (
            eval_transform(image_size, resize_ratio) if transform is None else build_transform(image_size, transform, in_chans)
        )
        root = _existing_folder(data_root)
        found = (
            _class_folders(root, extensions)
            if list_file is None
            else read_labels(os.path.expanduser(os.fspath(list_file)), root)
        )
        found = {printable(name): paths for name, paths in found.items()}  # names go into logs, tables and files
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
        super().__init__(root, paths, built, max_bad_share, value_range, use_alpha, in_chans=in_chans)
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


def shared_images(first: Dataset[Any], second: Dataset[Any]) -> int:
    """How many images of two data sets are the same, by their paths; 0 where a data set is of another kind."""
    if not isinstance(first, _ImageFiles) or not isinstance(second, _ImageFiles):
        return 0
    paths = [{os.path.join(os.path.realpath(part.data_root), path) for path in part.names()} for part in (first, second)]
    return len(paths[0] & paths[1])


def _existing_folder(data_root: str | os.PathLike[str]) -> str:
    root = os.path.abspath(os.path.expanduser(os.fspath(data_root)))
    if not os.path.isdir(root):
        why = "is not a folder" if os.path.exists(root) else "does not exist"
        raise MissingFileError(
            "data-root-missing", f"data_root {printable(root)} {why}; set it to the folder that holds the images"
        )
    return root


def _images_of(root: str, found: Content) -> list[str]:
    if not found.images:
        told = found.told()
        raise DataError(
            "no-images",
            f"no images below {printable(root)}; looked for files ending in {EXTENSION_LIST}"
            + (f"; there are {told}" if told else "")
            + ". Set data_root to the folder that holds them",
        )
    _tell(root, len(found.images), found)
    return found.images


def _extensions(in_chans: int | None) -> tuple[str, ...]:
    """Of the files that are images."""
    if in_chans is None:
        return IMAGE_EXTENSIONS
    check_in_chans(in_chans, "in_chans")
    return _CHANNEL_EXTENSIONS


def _from_shards(
    root: str, found: Content, limit: int | None, extensions: tuple[str, ...] = IMAGE_EXTENSIONS
) -> tuple[list[str], ShardIndex]:
    """Names of the images in the shards, and where they lie."""
    where = printable(root)
    if found.unfinished:
        raise DataError(
            "shards-unfinished",
            f"packing the shards in {where} did not come to its end ({printable(found.unfinished[0])} is left), so images "
            "would be missing; remove the folder and pack again",
        )
    if found.images:
        raise DataError(
            "images-and-shards-mixed",
            f"{where} holds {len(found.images)} image files (e.g. {printable(found.images[0])}) and {len(found.shards)} shards "
            f"(e.g. {printable(found.shards[0])}); which are meant? Set data_root to a folder of one kind, move the others "
            "away, or name the images in a list_file",
        )
    left_out = Content(left_out=found.left_out.copy(), system=found.system)
    shards, names, places = index_shards(root, extensions, left_out)
    if not names:
        raise DataError(
            "no-images-in-shards",
            f"no images below {where}; looked for files ending in {EXTENSION_LIST} and for members of its {len(shards)} .tar "
            f"shards named like key.jpg; there are {left_out.told() or 'none of other kinds'}. Set data_root to the folder "
            "that holds them, or pack them again (hgkd make-shards)",
        )
    print_log(f"{len(names)} images in {len(shards)} shards below {where}", logger="current")
    _tell(root, len(names), left_out)
    kept = _first_shuffled(list(zip(names, places, strict=True)), limit)
    return [name for name, _ in kept], ShardIndex(root, shards, (place for _, place in kept))


def _tell(root: str, count: int, found: Content) -> None:
    """Say what was left out: a warning when there are pictures among it."""
    told = found.told()
    if told:
        level = logging.WARNING if found.misses_pictures else logging.INFO
        print_log(f"{count} images below {printable(root)}; left out: {told}", logger="current", level=level)


_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval"})


def _class_folders(root: str, extensions: tuple[str, ...] = IMAGE_EXTENSIONS) -> dict[str, list[str]]:
    """Class name -> its images, relative to ``root``."""
    where = printable(root)
    with os.scandir(root) as entries:
        inside = [entry for entry in entries if not is_system(entry.name)]
        names = sorted(entry.name for entry in inside if entry.is_dir())
    if not names:
        raise DataError(
            "no-class-folders", f"no class folders in {where}; expected {where}/<class>/<image>, one folder a class"
        )
    if _SPLITS.issuperset(map(str.lower, names)):
        raise DataError(
            "splits-as-classes",
            f"the folders in {where} are called {', '.join(names)}, which are no classes; set data_root to one of them, "
            f"e.g. {os.path.join(where, names[-1])}",
        )
    identities = {name: folder_identity(os.path.join(root, name)) for name in names}
    beside = Content(left_out=Counter(kind_name(entry.name) for entry in inside if not entry.is_dir()))
    classes: dict[str, list[str]] = {}
    taken: dict[object, str] = {folder_identity(root): "data_root itself"}
    for name in names:
        folder = os.path.join(root, name)
        if identities[name] in taken:
            raise DataError(
                "class-folder-linked-twice",
                f"class folder {printable(folder)} is the same folder as {printable(taken[identities[name]])}, so its images "
                "would have two classes; remove the link",
            )
        taken[identities[name]] = name
        # a link from one class into another would give images two classes
        found = search(folder, {folder_identity(root), *identities.values()} - {identities[name]}, extensions)
        if not found.images:
            told = f"; there are {found.told()}" if found.told() else ""
            raise DataError(
                "class-folder-empty",
                f"class folder {printable(folder)} holds no images (files ending in {EXTENSION_LIST}){told}; "
                "fill it or remove it",
            )
        classes[name] = [os.path.join(name, path) for path in found.images]
        beside.left_out += found.left_out + Counter({SHARD_EXTENSION: len(found.shards)})
        beside.system += found.system
    _tell(root, sum(map(len, classes.values())), beside)
    if len(classes) == 1:
        print_log(
            f"{where} holds one class folder only ({printable(names[0])}), so there is nothing to tell apart; is data_root the "
            "folder of the class folders?",
            logger="current",
            level=logging.WARNING,
        )
    return classes


def _check_limit(name: str, limit: int | None) -> None:
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise InvalidValueError(
            "limit-not-positive", f"{name} must be None (all images) or a whole number from 1, got {limit!r}"
        )


def _first_shuffled(items: list[_Item], limit: int | None) -> list[_Item]:
    """The first ``limit`` of a copy shuffled with seed 0; without a limit the list as it is."""
    if limit is None:
        return items
    shuffled = list(items)
    random.Random(0).shuffle(shuffled)
    return shuffled[:limit]
