"""Folders, lists and tar shards of images as data sets that outlive damaged files.

A file that cannot be read is skipped: the next readable one takes its place, it is logged once and counted, over all
worker processes of a loader. Files are opened when their turn comes; at the start some are looked at, for what a whole
folder has in common (:mod:`hgkd.data.pixels`). In a run of several GPUs each process counts what its own loader met.

Images are turned upright by their EXIF orientation, as viewers and OpenMMLab do, and torchvision's ``ImageFolder`` does not.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from mmengine.logging import print_log
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from hgkd.data.channels import READING_CHANNELS, decode_channels, measure_channels
from hgkd.data.finding import CHANNEL_EXTENSIONS, extensions_of, find_labelled, find_source
from hgkd.data.folders import IMAGE_EXTENSIONS, printable, search
from hgkd.data.pixels import (
    READING,
    BandsError,
    Range,
    Shrink,
    as_value_range,
    check_value_range,
    decode,
    measure,
    open_image,
    warnings_of,
)
from hgkd.data.sampler import image_seed, seeded
from hgkd.data.sources import Blocks, ImageSource
from hgkd.data.transforms import ImageTransform, build_transform, eval_transform, shrink_of
from hgkd.errors import DataError, InvalidValueError, StoppedError, abbreviate
from hgkd.registry import DATASETS

_Item = TypeVar("_Item")
_LOOKED_AT = 16


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
    (``._x.jpg``, ``.ipynb_checkpoints``, ``__MACOSX``, ``@eaDir``, ``#recycle``) are passed over, and so are work folders
    of trainings below ``folder``.

    Raises:
        DataError: a folder that cannot be listed.
    """
    return search(folder, extensions=CHANNEL_EXTENSIONS if arrays else IMAGE_EXTENSIONS).images


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
        source: the images.
        transform: PIL RGB image -> uint8 tensor (3, H, W); with ``in_chans`` float tensor (C, H, W) -> one.
        max_bad_share: share of the files, in [0, 1], that may turn out unreadable.
        value_range, use_alpha: see :func:`hgkd.data.pixels.decode`.
        in_chans: number of channels, see :func:`hgkd.data.channels.decode_channels`; None: 8-bit RGB.
        shrink: how much smaller JPEGs may be decoded; None: not at all.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: ImageTransform,
        max_bad_share: float,
        value_range: Sequence[float] | None = None,
        use_alpha: bool = True,
        in_chans: int | None = None,
        shrink: Shrink | None = None,
    ) -> None:
        if not 0 <= max_bad_share <= 1:
            raise InvalidValueError(
                "bad-share-out-of-range", f"max_bad_share is a share of the images in [0, 1], got {max_bad_share}"
            )
        self.value_range = as_value_range(value_range)
        self.use_alpha = use_alpha
        self.in_chans = in_chans
        self.shrink = shrink
        self.source = source
        self.data_root = source.store.root
        self.transform = transform
        self.max_bad_share = max_bad_share
        self._bad = _BadMarks(len(source))
        self._look()

    def __len__(self) -> int:
        return len(self.source)

    def path(self, index: int) -> str:
        """Absolute path or address of an image; of one in a shard or table, that with the member or row after it."""
        return self.source.path(index)

    def names(self) -> Iterator[str]:
        """The names of the images: below ``data_root``, or absolute."""
        return (self.source.name(index) for index in range(len(self)))

    def size(self, index: int) -> int:
        """Bytes of an image, in a table of the table's file; -1 when it is not there."""
        return self.source.size(index)

    @property
    def blocks(self) -> Blocks | None:
        """Which images are read together, for the sampler."""
        return self.source.blocks

    @property
    def reading(self) -> dict[str, Any]:
        """How files become pixels, as plain values: what is stored of pixels belongs to it."""
        if self.in_chans is not None:
            return {"channels": self.in_chans, "rules": READING_CHANNELS, "value_range": self.value_range}
        scaled = {} if self.shrink is None else {"scaled_decoding": True}
        return {"rules": READING, "value_range": self.value_range, "use_alpha": self.use_alpha, **scaled}

    def open(self, index: int) -> BinaryIO:
        """The file of an image, from wherever it lies."""
        return self.source.open(index)

    def image(self, index: int) -> Image.Image | Tensor:
        """An image, decoded and no more: 8-bit RGB, or with ``in_chans`` a float tensor (C, H, W); errors as
        :func:`read_rgb`."""
        with self.open(index) as file:
            if self.in_chans is not None:
                return decode_channels(file, self.in_chans, self.value_range)
            return decode(file, self.value_range, self.use_alpha, self.shrink)

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
                except StoppedError:  # a network that is down says nothing about an image
                    raise
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
        data_root: folder of the images (``IMAGE_EXTENSIONS``), any depth and any file names; or of .tar files
            (:mod:`hgkd.data.shards`), or of Parquet and Arrow files (:mod:`hgkd.data.tables`). Or an address of such a folder
            (``s3://``, ``https://``), one .tar or .parquet file, or a pattern of them (:mod:`hgkd.data.sources`). What is a
            system's (hidden, ``__MACOSX``), and work folders of trainings below it, are passed over; what is left out is told
            by kind.
        list_file: text file (UTF-8, or UTF-16 with its mark) used instead of searching: one path of an image a line, or one of
            a .tar file, relative to ``data_root`` or absolute, but below ``data_root``: a list from elsewhere reaches no other
            file.
        image_size: result side in pixels, or (H, W).
        transform: options of :func:`hgkd.data.train_transform`, or with ``kind='eval'`` of ``eval_transform``.
        max_bad_share: share of unreadable files above which the run stops; 0 tolerates none.
        limit: keep only so many images: the first of a shuffle that is always the same.
        value_range: (low, high), the values of black and white in images of more than 8 bits; see
            :func:`hgkd.data.pixels.decode`.
        use_alpha: False leaves out a band that is tagged as transparency.
        in_chans: number of channels that every file has. The items' ``inputs`` are then float (C, H, W) in [0, 1], with all
            bits of the file, and NumPy arrays (.npy) are images, too; see :func:`hgkd.data.channels.decode_channels`. None:
            RGB.
        image_column: of Parquet and Arrow files, where it does not follow from types and names.
        scaled_decoding: decode JPEGs that are much larger than their crops at a half, quarter or eighth of their sides. Faster,
            and the pixels differ a little (docs/howto/scaling.md); small images are read as ever.

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
        image_column: str | None = None,
        scaled_decoding: bool = False,
    ) -> None:
        _check_limit("limit", limit)
        built = build_transform(image_size, transform, in_chans)
        source = find_source(data_root, list_file, extensions_of(in_chans), image_column)
        if limit is not None:
            kept = _first_shuffled(list(range(len(source))), limit)
            source = source.taken(kept if source.blocks is None else sorted(kept))
        shrink = _shrink(scaled_decoding, in_chans, image_size, transform)
        super().__init__(source, built, max_bad_share, value_range, use_alpha, in_chans, shrink)
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
        data_root: folder of the class folders; hidden ones, those of a system (``__MACOSX``) and work folders of trainings are
            passed over. Or an address of such a folder, or Parquet and Arrow files as of :class:`UnlabelledImages`;
            ``label_column`` tells the class.
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
        max_bad_share, value_range, use_alpha, in_chans, image_column, scaled_decoding: see :class:`UnlabelledImages`.
        label_column: of Parquet and Arrow files, where it does not follow from types and names.

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
        image_column: str | None = None,
        label_column: str | None = None,
        scaled_decoding: bool = False,
    ) -> None:
        _check_limit("limit_per_class", limit_per_class)
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
        source, found = find_labelled(data_root, list_file, extensions_of(in_chans), image_column, label_column)
        found = {printable(name): places for name, places in found.items()}  # names go into logs, tables and files
        self.classes = sorted(found)
        self.split = split
        self.metainfo: dict[str, Any] = {"classes": tuple(self.classes)}
        kept: list[tuple[int, int]] = []
        for label, name in enumerate(self.classes):
            places = _first_shuffled(found[name], limit_per_class)
            if label_fraction < 1 and places:
                drawn = random.Random(f"{label_seed} {name}").sample(places, max(1, round(label_fraction * len(places))))
                places = sorted(drawn, key=source.name)
            kept += [(place, label) for place in places]
        if source.blocks is not None:  # rows that lie together are read together
            kept.sort()
        self.labels = np.array([label for _, label in kept], dtype=np.int64)
        source = source.taken([place for place, _ in kept])
        shrink = _shrink(scaled_decoding, in_chans, image_size, transform or {"kind": "eval"}, resize_ratio)
        super().__init__(source, built, max_bad_share, value_range, use_alpha, in_chans, shrink)
        if label_fraction < 1:
            counts = np.bincount(self.labels)
            print_log(
                f"label_fraction={label_fraction} (label_seed {label_seed}): {len(self)} labelled images of "
                f"{len(self.classes)} classes in {self.data_root}, {counts.min()} to {counts.max()} a class",
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


def _check_limit(name: str, limit: int | None) -> None:
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise InvalidValueError(
            "limit-not-positive", f"{name} must be None (all images) or a whole number from 1, got {limit!r}"
        )


def _shrink(
    scaled: bool, in_chans: int | None, size: int | Sequence[int], transform: Mapping[str, Any] | None, ratio: float = 1.0
) -> Shrink | None:
    if scaled and in_chans is not None:
        raise InvalidValueError(
            "scaled-decoding-for-rgb",
            f"scaled_decoding is for JPEGs of photographs, and in_chans={in_chans} promises all bits; leave one of them out",
        )
    return shrink_of(size, transform, ratio) if scaled else None


def _first_shuffled(items: list[_Item], limit: int | None) -> list[_Item]:
    """The first ``limit`` of a copy shuffled with seed 0; without a limit the list as it is."""
    if limit is None:
        return items
    shuffled = list(items)
    random.Random(0).shuffle(shuffled)
    return shuffled[:limit]
