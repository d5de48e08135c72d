"""From ``data_root`` and ``list_file`` to a source of images, and to the classes of its images.

What is wrong with them is told here, before anything is read.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence

from mmengine.logging import print_log

from hgkd.data.folders import (
    ARRAY_EXTENSION,
    EXTENSION_LIST,
    IMAGE_EXTENSIONS,
    SHARD_EXTENSION,
    SPLITS,
    Content,
    folder_identity,
    holds_a_run,
    is_run_folder,
    is_system,
    kind_name,
    printable,
    search,
)
from hgkd.data.lists import is_shard_name, read_labels, read_list
from hgkd.data.shards import index_shards
from hgkd.data.sources import FileImages, ImageSource, locate, root_text, store_of
from hgkd.data.stores import LocalStore, Store
from hgkd.data.tables import TableImages, arrow_tables, check_splits
from hgkd.errors import DataError, InvalidValueError
from hgkd.pixels import check_in_chans

CHANNEL_EXTENSIONS = (*IMAGE_EXTENSIONS, ARRAY_EXTENSION)
Path = str | os.PathLike[str]


def extensions_of(in_chans: int | None) -> tuple[str, ...]:
    """Of the files that are images."""
    if in_chans is None:
        return IMAGE_EXTENSIONS
    check_in_chans(in_chans, "in_chans")
    return CHANNEL_EXTENSIONS


def find_source(
    data_root: Path, list_file: Path | None, extensions: tuple[str, ...], image_column: str | None = None
) -> ImageSource:
    """The images that ``data_root`` and ``list_file`` name; arguments and errors as of :class:`hgkd.data.UnlabelledImages`."""
    if list_file is not None:
        _refuse_columns(image_column=image_column)
        store = store_of(data_root)
        names = read_list(list_file, store)
        listed = Content(shards=[name for name in names if is_shard_name(name)])
        return _of_shards(store, listed, extensions) if len(listed.shards) == len(names) else FileImages(store, names)
    store, found = locate(data_root, extensions)
    if found.images or found.shards or found.unfinished or not found.tables:
        _refuse_columns(image_column=image_column)
        # beside pictures and shards a table holds what is said about them (img2dataset's)
        found.left_out.update(map(kind_name, found.tables))
        if found.shards or found.unfinished:
            return _of_shards(store, found, extensions)
        return FileImages(store, _images_of(store, found))
    return _of_tables(store, found, image_column)


def find_labelled(
    data_root: Path,
    list_file: Path | None,
    extensions: tuple[str, ...],
    image_column: str | None = None,
    label_column: str | None = None,
) -> tuple[ImageSource, dict[str, list[int]]]:
    """The labelled images that ``data_root`` and ``list_file`` name, and class name -> their numbers.

    Arguments and errors as of :class:`hgkd.data.LabelledImages`.
    """
    if list_file is not None:
        _refuse_columns(image_column=image_column, label_column=label_column)
        store = store_of(data_root)
        return _numbered(store, read_labels(list_file, store))
    if _holds_images(data_root, extensions):
        _refuse_columns(image_column=image_column, label_column=label_column)
        store = store_of(data_root)
        return _numbered(store, _class_folders(store.root, extensions))
    store, found = locate(data_root, extensions)
    if found.tables and not found.images and not found.shards:
        tables = _of_tables(store, found, image_column)
        names, labels = tables.labels(label_column)
        members: dict[str, list[int]] = {name: [] for name in names}
        for place, label in enumerate(labels.tolist()):
            members[names[label]].append(place)
        return tables, members
    _refuse_columns(image_column=image_column, label_column=label_column)
    if found.shards and not found.images:
        raise DataError(
            "shards-without-labels",
            f"{printable(store.root)} holds {len(found.shards)} shards, whose images have no labels here; give one folder a "
            "class, a list with labels, or Parquet files",
        )
    if isinstance(store, LocalStore):
        return _numbered(store, _class_folders(store.root, extensions))
    return _numbered(store, _class_prefixes(store, found))


def _holds_images(data_root: Path, extensions: tuple[str, ...]) -> bool:
    """Whether a folder of this machine has an image, as far as it shows without links: found without looking at all files."""
    root = os.path.expanduser(root_text(data_root))
    for here, folders, names in os.walk(root):
        if here != root and holds_a_run(here, folders, names):
            folders.clear()
            continue
        folders[:] = [name for name in folders if not is_system(name)]
        if any(name.lower().endswith(extensions) and not is_system(name) for name in names):
            return True
    return False


def _numbered(store: Store, classes: dict[str, list[str]]) -> tuple[ImageSource, dict[str, list[int]]]:
    names: list[str] = []
    members = {}
    for name, images in classes.items():
        members[name] = list(range(len(names), len(names) + len(images)))
        names += images
    return FileImages(store, names), members


def _refuse_columns(**columns: str | None) -> None:
    for option, name in columns.items():
        if name is not None:
            raise InvalidValueError(
                "column-without-tables",
                f"{option}={name!r} is for Parquet and Arrow files, and data_root names others; leave it out",
            )


def _of_tables(store: Store, found: Content, column: str | None) -> TableImages:
    tables = arrow_tables(store, found.tables)
    check_splits(store, tables)
    source = TableImages(store, tables, column)
    where = printable(store.root)
    print_log(f"{len(source)} images in the column {source.column!r} of {len(tables)} tables below {where}", logger="current")
    return source


def _images_of(store: Store, found: Content) -> list[str]:
    root = store.root
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


def _of_shards(store: Store, found: Content, extensions: tuple[str, ...]) -> ImageSource:
    where = printable(store.root)
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
    left_out = Content(left_out=found.left_out.copy(), system=found.system, runs=found.runs)
    source = index_shards(store, found.shards, extensions, left_out)
    if not len(source):
        raise DataError(
            "no-images-in-shards",
            f"no images below {where}; looked for files ending in {EXTENSION_LIST} and for members of its {len(found.shards)} "
            f".tar shards named like key.jpg; there are {left_out.told() or 'none of other kinds'}. Set data_root to the "
            "folder that holds them, or pack them again (hgkd make-shards)",
        )
    print_log(f"{len(source)} images in {len(found.shards)} shards below {where}", logger="current")
    _tell(store.root, len(source), left_out)
    return source


def _tell(root: str, count: int, found: Content) -> None:
    """Say what was left out: a warning when there are pictures among it."""
    told = found.told()
    if told:
        level = logging.WARNING if found.misses_pictures else logging.INFO
        print_log(f"{count} images below {printable(root)}; left out: {told}", logger="current", level=level)


def _class_folders(root: str, extensions: tuple[str, ...] = IMAGE_EXTENSIONS) -> dict[str, list[str]]:
    """Class name -> its images, relative to ``root``."""
    where = printable(root)
    with os.scandir(root) as entries:
        inside = [entry for entry in entries if not is_system(entry.name)]
        folders = sorted(entry.name for entry in inside if entry.is_dir())
    names = [name for name in folders if not is_run_folder(os.path.join(root, name))]
    _refuse_splits(where, names)
    identities = {name: folder_identity(os.path.join(root, name)) for name in names}
    beside = Content(
        left_out=Counter(kind_name(entry.name) for entry in inside if not entry.is_dir()), runs=len(folders) - len(names)
    )
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
        beside.runs += found.runs
        if found.runs and not found.images:  # such as work_dirs
            continue
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
    if not classes:
        raise DataError(
            "no-class-folders", f"no class folders in {where}; expected {where}/<class>/<image>, one folder a class"
        )
    _refuse_splits(where, list(classes))  # without folders that hold work folders alone
    _tell(root, sum(map(len, classes.values())), beside)
    if len(classes) == 1:
        print_log(
            f"{where} holds one class folder only ({printable(*classes)}), so there is nothing to tell apart; is data_root the "
            "folder of the class folders?",
            logger="current",
            level=logging.WARNING,
        )
    return classes


def _class_prefixes(store: Store, found: Content) -> dict[str, list[str]]:
    """The same behind an address, of which the names of all files are known."""
    where = printable(store.root)
    classes: dict[str, list[str]] = {}
    for name in found.images:
        folder, slash, _ = name.partition("/")
        if slash:
            classes.setdefault(folder, []).append(name)
        else:
            found.left_out[kind_name(name)] += 1
    if not classes:
        raise DataError(
            "no-class-folders", f"no class folders in {where}; expected {where}/<class>/<image>, one folder a class"
        )
    _refuse_splits(where, sorted(classes))
    _tell(store.root, sum(map(len, classes.values())), found)
    return classes


def _refuse_splits(where: str, names: Sequence[str]) -> None:
    if names and SPLITS.issuperset(map(str.lower, names)):
        raise DataError(
            "splits-as-classes",
            f"the folders in {where} are called {', '.join(names)}, which are no classes; set data_root to one of them, "
            f"e.g. {os.path.join(where, names[-1])}",
        )
