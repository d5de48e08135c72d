"""Lists of images: one path a line, or a path and a class; what is wrong with a list is told before a run, with its line.

A list can hold anything: headings, further columns, paths that lead elsewhere. All names are compared with those of images,
those that differ and some of the others are looked for on the disk.
"""

from __future__ import annotations

import codecs
import csv
import io
import logging
import os

from mmengine.logging import print_log

from hgkd.data.folders import SHARD_EXTENSION, is_image_name, printable
from hgkd.data.pixels import BandsError, measure
from hgkd.data.remote import RemoteStore, shown
from hgkd.data.stores import LocalStore, Store, is_address
from hgkd.errors import DataError, MissingFileError, StoppedError

ListFile = str | os.PathLike[str]

_LOOKED_AT = 16


def _list_lines(list_file: str) -> list[str]:
    if is_address(list_file):
        folder, _, name = list_file.rpartition("/")
        with RemoteStore(folder).open(name) as file:
            return _lines(file.read())
    if not os.path.isfile(list_file):
        raise MissingFileError(
            "list-file-missing",
            f"list_file {printable(os.path.abspath(list_file))} does not exist; give a text file with one image path a line, "
            "or leave list_file out to search data_root",
        )
    with open(list_file, "rb") as file:
        return _lines(file.read())


def _lines(content: bytes) -> list[str]:
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # PowerShell's and Excel's
    # names of files are bytes, and need not be UTF-8
    text = content.decode("utf-16", "replace") if utf16 else content.decode("utf-8-sig", "surrogateescape")
    return [line.strip() for line in io.StringIO(text, newline=None)]


def _named(list_file: ListFile) -> tuple[str, str]:
    """A list's place, and what messages call it."""
    text = os.fspath(list_file)
    return (text, shown(text)) if is_address(text) else (os.path.expanduser(text), printable(os.path.expanduser(text)))


def _listed_path(entry: str, list_file: str, number: int, store: Store) -> str:
    """A path of a list, as written but without '.' and '..' parts."""
    where = f"{list_file} line {number}"
    if "\0" in entry:
        raise DataError("list-file-not-text", f"{where} is not text; give a text file with one image path a line")
    path = store.name_of(entry)
    if path is None:
        everything = "/ allows every path" if isinstance(store, LocalStore) else "https:// allows every address of that kind"
        raise DataError(
            "listed-path-leaves-root",
            f"{where}: {printable(entry)!r} leaves data_root {printable(store.root)}; set data_root to a folder above all "
            f"images (data_root={everything})",
        )
    return path


def read_list(list_file: ListFile, store: Store) -> list[str]:
    """Names of the images of a list file, or of its shards."""
    place, called = _named(list_file)
    lines = [(number, entry) for number, entry in enumerate(_list_lines(place), start=1) if entry]
    paths = [_listed_path(entry, called, number, store) for number, entry in lines]
    if not paths:
        raise DataError(
            "list-file-empty",
            f"list_file {called} names no images; write one path a line, relative to {printable(store.root)} or absolute",
        )
    _check_listed(list(zip([number for number, _ in lines], paths, strict=True)), place, store)
    return paths


def _check_listed(paths: list[tuple[int, str]], list_file: str, store: Store) -> None:
    """Look at some paths of a list: those not named like images, which must be images all the same, and some of all.

    Args:
        paths: (number of the line, path).

    Raises:
        DataError: a path that is no image, or none of the looked at exists; with the line, and the cause where it shows.
    """
    shards = all(is_shard_name(path) for _, path in paths)
    odd = [] if shards else [place for place in paths if not is_image_name(place[1].partition("?")[0])][:_LOOKED_AT]
    for number, path in odd:
        if not _is_image(store, path):
            raise DataError(
                "listed-path-no-image",
                f"{printable(list_file)} line {number}: {printable(path)[:200]!r} is no image{_cause(path, list_file, store)}; "
                "a list has the path of one image a line, and nothing else",
            )
    count = min(_LOOKED_AT, len(paths))
    looked_at = [paths[i * len(paths) // count] for i in range(count)]
    absent = [place for place in looked_at if not store.exists(place[1])]
    if not absent:
        return
    number, path = absent[0]
    told = (
        f"{len(absent)} of {count} images of {printable(list_file)} that were looked for do not exist, e.g. line {number}: "
        f"{printable(store.path(path))[:300]}{_cause(path, list_file, store)}"
    )
    if len(absent) == count:
        raise DataError(
            "listed-images-missing", f"{told}; write paths relative to data_root {printable(store.root)}, or absolute"
        )
    print_log(told, logger="current", level=logging.WARNING)


def is_shard_name(name: str) -> bool:
    """Whether a list names a shard, and no image."""
    return name.partition("?")[0].lower().endswith(SHARD_EXTENSION)


def _is_image(store: Store, path: str) -> bool:
    try:
        with store.open(path) as file:
            measure(file)
    except BandsError:
        return True  # is told elsewhere
    except StoppedError:
        raise
    except Exception:  # as above
        return False
    return True


_HEADINGS = frozenset({"path", "paths", "file", "filename", "file_name", "filepath", "image", "images", "image_path", "img"})


def _cause(path: str, list_file: str, store: Store) -> str:
    """Why a listed path leads nowhere, in brackets, as far as it shows."""
    root = store.root
    folder = os.path.dirname(os.path.abspath(list_file))
    words = path.replace(",", " ").replace(";", " ").split()
    if path.lower() in _HEADINGS or (words and words[0].lower() in _HEADINGS and not any(map(is_image_name, words))):
        return " (a heading: remove this line)"
    if path[0] in "\"'":
        return " (remove the quotes)"
    if path[0] in "[{":
        return " (the file seems to be JSON)"
    if "://" in path or path.startswith(("http:", "https:", "s3:", "gs:")):
        return " (an address: set data_root to the address that all of them begin with)"
    if SHARD_EXTENSION in path:
        return " (a list names images, or shards, and not both)"
    if not isinstance(store, LocalStore):
        return ""
    if "\\" in path and os.path.lexists(os.path.join(root, path.replace("\\", "/"))):
        return " (write / instead of \\)"
    if len(words) > 1 and os.path.lexists(os.path.join(root, words[0])):
        return f" (the path {printable(words[0])!r} is followed by something else; remove it)"
    if os.path.lexists(os.path.join(folder, path)):
        return f" (it lies below the list's own folder: set data_root={printable(folder)})"
    if os.path.lexists(os.path.join(os.path.dirname(root), path)):
        return f" (it lies one folder higher: set data_root={printable(os.path.dirname(root))})"
    return " (the list is not UTF-8, or the file's name is not)" if printable(path) != path else ""


def read_labels(list_file: ListFile, store: Store) -> dict[str, list[str]]:
    """Class name -> its images, as a list with labels has them."""
    place, called = _named(list_file)
    suffix = os.path.splitext(place.partition("?")[0])[1].lower()
    if suffix not in _LABEL_COLUMNS:
        raise DataError(
            "label-list-suffix",
            f"list of labels {called} is of an unknown format; expected a .txt with 'PATH CLASS' a line, a .csv with "
            "'PATH,CLASS' or a .tsv with the two separated by a tab",
        )
    split, example = _LABEL_COLUMNS[suffix]
    found: dict[str, tuple[int, str]] = {}  # path -> line, class
    classes: dict[str, list[str]] = {}
    for number, line in enumerate(_list_lines(place), start=1):
        columns = split(line)
        if not line or (number == 1 and columns == ["path", "label"]):
            continue
        if len(columns) != 2 or not all(columns):
            raise DataError(
                "label-list-line",
                f"{called} line {number}: {printable(line)[:80]!r} is not a path and a class; "
                f"a {suffix} has lines like {example!r}",
            )
        if is_image_name(columns[1]) and not is_image_name(columns[0]):
            raise DataError(
                "label-list-columns-swapped",
                f"{called} line {number}: {printable(line)[:80]!r} names the class first; a {suffix} has lines like "
                f"{example!r}",
            )
        path = _listed_path(columns[0], called, number, store)
        line_before, name_before = found.setdefault(path, (number, columns[1]))
        if name_before != columns[1]:
            raise DataError(
                "label-list-two-classes",
                f"{called} line {number}: {printable(path)} is of class {columns[1]!r}, and in line {line_before} of class "
                f"{name_before!r}; an image has one class",
            )
        classes.setdefault(columns[1], []).append(path)
    if not classes:
        raise DataError("label-list-empty", f"list of labels {called} names no images; write a path and a class a line")
    _check_listed([(number, path) for path, (number, _) in found.items()], place, store)
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
