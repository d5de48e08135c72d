"""Images in tables: Parquet files of any maker, and Hugging Face data sets on disk (Parquet, or ``load_from_disk``'s Arrow).

A column of images is one of bytes, or Hugging Face's ``struct<bytes, path>``; a column of labels one of texts or of whole
numbers, whose names the ``ClassLabel`` in the schema gives. pyarrow reads all of it (Apache-2.0); the library ``datasets`` is
not needed: its Arrow files are ordinary IPC streams, and what it says about columns lies in their schema as JSON
(huggingface/datasets, ``arrow_writer.py``: key ``huggingface``).

Arrow files are mapped, so any order costs the same. Of a Parquet file a row group at least is read at once; a process keeps
those of :data:`KEPT_BYTES`, and :attr:`blocks` lets the sampler mix the images of so many row groups at a time, or each image
would cost a row group. Only the bytes of the images are read, no other column.
"""

from __future__ import annotations

import bisect
import io
import json
import logging
import os
import posixpath
import re
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from mmengine.logging import print_log
from numpy.typing import NDArray

from hgkd.data.folders import SPLITS, printable
from hgkd.data.sources import Blocks, ImageSource
from hgkd.data.stores import LocalStore, Store
from hgkd.errors import DataError, InvalidValueError, MissingPackageError, abbreviate

if TYPE_CHECKING:
    import pyarrow as pa

KEPT_BYTES = 2**28
"""Bytes of row groups that a process keeps."""

_FEW_GROUPS = 4  # fewer kept at once mix the images badly
_LABEL_NAMES = ("label", "labels", "class", "category", "target", "cls")
_IMAGE_NAMES = ("image", "img", "picture", "jpg", "png")
_PART = re.compile(r"[-_.]?\d+(-of-\d+)?([-_.][0-9a-f]{6,})?$")
Rows = NDArray[np.int64]


def _pyarrow() -> Any:
    try:
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise MissingPackageError(
            "pyarrow-missing", f"Parquet and Arrow files need pyarrow ({error}); pip install 'hgkd[parquet]'"
        ) from error
    return pyarrow


class _Parquet:
    """A Parquet file: blocks are its row groups."""

    def __init__(self, store: Store, name: str) -> None:
        self._file = _pyarrow().parquet.ParquetFile(store.open(name), pre_buffer=False)

    @property
    def schema(self) -> pa.Schema:
        return self._file.schema_arrow

    def rows(self) -> list[int]:
        meta = self._file.metadata
        return [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]

    def bytes_of(self, column: str) -> list[int]:
        """Size of a column in each row group."""
        meta = self._file.metadata
        place = next(i for i in range(meta.num_columns) if meta.schema.column(i).path == column)
        return [meta.row_group(group).column(place).total_uncompressed_size for group in range(meta.num_row_groups)]

    def block(self, number: int, column: str) -> pa.Array:
        # one thread: pools of threads do not outlive a fork
        return self._file.read_row_group(number, columns=[column], use_threads=False).column(0).combine_chunks()

    def column(self, name: str) -> pa.ChunkedArray:
        return self._file.read(columns=[name], use_threads=False).column(0)


class _Arrow:
    """An Arrow IPC stream or file, mapped: blocks are its record batches."""

    def __init__(self, store: Store, name: str) -> None:
        arrow = _pyarrow()
        if isinstance(store, LocalStore):
            source = arrow.memory_map(store.path(name))
        else:
            opened = store.open(name)
            source = (
                arrow.memory_map(opened.name) if isinstance(getattr(opened, "name", None), str) else arrow.PythonFile(opened)
            )
        try:
            self._table = arrow.ipc.open_stream(source).read_all()
        except arrow.ArrowInvalid:
            source.seek(0)
            self._table = arrow.ipc.open_file(source).read_all()

    @property
    def schema(self) -> pa.Schema:
        return self._table.schema

    def rows(self) -> list[int]:
        return [len(chunk) for chunk in self._table.column(0).chunks]

    def block(self, number: int, column: str) -> pa.Array:
        return self._table.column(column.partition(".")[0]).chunk(number)

    def column(self, name: str) -> pa.ChunkedArray:
        return self._table.column(name)


class TableImages(ImageSource):
    """Images in the rows of tables.

    Args:
        store: of the tables.
        tables: their names, all with the same columns.
        column: of the images; None: the one that is told by its type or name.

    Raises:
        DataError: a table is damaged, no or several columns could be meant, tables differ, images are not in it.
        ModuleNotFoundError: pyarrow is not installed.
    """

    def __init__(self, store: Store, tables: Sequence[str], column: str | None = None) -> None:
        self.store = store
        self.tables = list(tables)
        self._process = 0
        self._files: dict[int, _Parquet | _Arrow] = {}
        self._kept: OrderedDict[int, pa.Array] = OrderedDict()
        store.prepare(self.tables)
        _pyarrow()
        rows = [self._rows_of(number) for number in range(len(self.tables))]
        schema = self.schema
        self.column = _image_column(schema, column, printable(store.path(self.tables[0])))
        self._leaf = f"{self.column}.bytes" if _is_struct(schema.field(self.column).type) else self.column
        for number, table in enumerate(self.tables):
            if self._file(number).schema.field(self.column).type != schema.field(self.column).type:
                raise DataError(
                    "tables-differ",
                    f"{printable(store.path(table))} and {printable(store.path(self.tables[0]))} have different types of the "
                    f"column {self.column!r}; set data_root to tables of one kind",
                )
        self._first_block = np.cumsum([0, *map(len, rows)])  # of each table
        self._starts = np.cumsum([0, *(count for counts in rows for count in counts)])  # of each block, in rows of all
        self._rows: Rows = np.arange(int(self._starts[-1]))
        self._sizes = [store.size(table) for table in self.tables]
        self._window = self._window_of()
        self._set_blocks()
        self._require_bytes()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": 0, "_files": {}, "_kept": OrderedDict()}

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        table, _, row = self._place(index)
        return f"{self.tables[table].partition('?')[0]}/{row}"

    def size(self, index: int) -> int:
        return self._sizes[self._place(index)[0]]

    def open(self, index: int) -> BinaryIO:
        block = bisect.bisect_right(self._starts, int(self._rows[index])) - 1
        value = self._block(block)[int(self._rows[index] - self._starts[block])].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None:
            raise OSError("this row holds no bytes of an image")
        return io.BytesIO(content)

    def taken(self, places: Sequence[int]) -> TableImages:
        made = TableImages.__new__(TableImages)
        made.__dict__ = self.__getstate__()
        made._rows = self._rows[np.asarray(places, dtype=np.int64)]
        made._set_blocks()
        return made

    @property
    def schema(self) -> pa.Schema:
        return self._file(0).schema

    def labels(self, column: str | None = None) -> tuple[list[str], Rows]:
        """Names of the classes, and of each row the number of its.

        Args:
            column: None: the one that is told by its kind or name.

        Raises:
            DataError: no or several columns could be meant, rows without a class.
        """
        where = printable(self.store.path(self.tables[0]))
        column = _label_column(self.schema, column, self.column, where)
        values: list[Any] = []
        for number in range(len(self.tables)):
            values += self._file(number).column(column).to_pylist()
        values = [values[row] for row in self._rows]
        names = _class_names(self.schema, column)
        if names is None:
            texts = [None if value is None else str(value) for value in values]
            names = sorted({text for text in texts if text is not None})
            numbers = {name: number for number, name in enumerate(names)}
            values = [None if text is None else numbers[text] for text in texts]
        absent = sum(value is None or not 0 <= value < len(names) for value in values)
        if absent:
            raise DataError(
                "table-rows-without-a-class",
                f"{absent} of {len(values)} rows below {where} have no class in the column {column!r}, as test sets of "
                "competitions have it; take the part with labels",
            )
        return _distinct(names), np.asarray(values, dtype=np.int64)

    def _place(self, index: int) -> tuple[int, int, int]:
        """Table, block in all tables, row in the table."""
        row = int(self._rows[index])
        block = bisect.bisect_right(self._starts, row) - 1
        table = bisect.bisect_right(self._first_block, block) - 1
        return table, block, row - int(self._starts[self._first_block[table]])

    def _file(self, number: int) -> _Parquet | _Arrow:
        if self._process != os.getpid():  # handles and their places are not shared with a parent
            self._process, self._files, self._kept = os.getpid(), {}, OrderedDict()
        if number not in self._files:
            name = self.tables[number]
            kind = _Parquet if name.partition("?")[0].lower().endswith(".parquet") else _Arrow
            self._files[number] = kind(self.store, name)
        return self._files[number]

    def _rows_of(self, number: int) -> list[int]:
        arrow = _pyarrow()
        try:
            return self._file(number).rows()
        except (arrow.ArrowException, OSError) as error:
            raise DataError(
                "table-damaged",
                f"{printable(self.store.path(self.tables[number]))} is damaged or no Parquet or Arrow file ({error}); write or "
                "fetch it again, or move it away",
            ) from error

    def _block(self, block: int) -> pa.Array:
        table = bisect.bisect_right(self._first_block, block) - 1
        file = self._file(table)  # first: it empties what a parent has kept
        if block in self._kept:
            self._kept.move_to_end(block)
        else:
            while len(self._kept) >= self._window:
                self._kept.popitem(last=False)
            self._kept[block] = file.block(block - int(self._first_block[table]), self._leaf)
        return self._kept[block]

    def _window_of(self) -> int:
        """Row groups that a process keeps."""
        sizes: list[int] = []
        for number in range(len(self.tables)):
            file = self._file(number)
            if isinstance(file, _Parquet):
                sizes += file.bytes_of(self._leaf)
        if not sizes:
            return len(self._starts)  # mapped: nothing is held
        largest = max(1, *sizes)
        window = max(1, KEPT_BYTES // largest)
        if window < min(_FEW_GROUPS, len(sizes)):
            print_log(
                f"{printable(self.store.root)}: a row group holds {largest / 1e6:.0f} MB of images, and each reading process "
                f"keeps {window}; images are mixed within these only, and all are read for one. Write smaller row groups "
                "(row_group_size=100), or pack shards of it (hgkd make-shards)",
                logger="current",
                level=logging.WARNING,
            )
        return window

    def _set_blocks(self) -> None:
        if any(isinstance(self._file(number), _Parquet) for number in range(len(self.tables))):
            of = np.searchsorted(self._starts, self._rows, side="right") - 1
            self.blocks = Blocks(of.astype(np.int64), self._window)

    def _require_bytes(self) -> None:
        if not len(self):
            raise DataError("table-without-rows", f"the tables below {printable(self.store.root)} have no rows")
        try:
            self.open(0)
        except OSError as error:
            raise DataError(
                "table-without-bytes",
                f"{printable(self.path(0))}: {error}; tables that name files are not followed: write them with the images "
                "inside (datasets: save_to_disk or to_parquet after cast_column(..., Image()))",
            ) from error


def arrow_tables(store: Store, tables: Sequence[str]) -> list[str]:
    """Which of the files below a root are the data: of ``save_to_disk`` those that its ``state.json`` names, in its order.

    Raises:
        DataError: the folder holds several data sets (``DatasetDict``), or misses a file of its own.
    """
    if all(table.partition("?")[0].lower().endswith(".parquet") for table in tables):
        return list(tables)
    if _has(store, "dataset_dict.json"):
        with store.open("dataset_dict.json") as file:
            splits = json.load(file).get("splits", [])
        raise DataError(
            "table-splits-mixed",
            f"{printable(store.root)} holds several data sets of Hugging Face ({', '.join(splits)}); set data_root to one of "
            f"them, e.g. {printable(store.path(splits[0] if splits else 'train'))}",
        )
    if not _has(store, "state.json"):
        # beside a data set lie what its maps have made of it
        return [table for table in tables if not posixpath.basename(table).startswith(("cache-", "tmp"))]
    with store.open("state.json") as file:
        named = [str(entry["filename"]) for entry in json.load(file)["_data_files"]]
    absent = [name for name in named if name not in tables and not store.exists(name)]
    if absent:
        raise DataError(
            "table-files-missing",
            f"{printable(store.root)} misses {abbreviate(absent)}, which its state.json names; copy the whole folder",
        )
    return [name for name in named if name in tables]  # of a pattern some


def _has(store: Store, name: str) -> bool:
    """Whether a file is there. Some servers say of what is not there that it may not be read."""
    try:
        return store.exists(name)
    except DataError:
        return False


def check_splits(store: Store, tables: Iterable[str]) -> None:
    """Refuse tables of several parts, as a snapshot of the Hugging Face Hub has them side by side.

    Raises:
        DataError: with the pattern that chooses one of them.
    """
    found: dict[str, str] = {}
    for table in tables:
        stem = _PART.sub("", posixpath.splitext(posixpath.basename(table))[0])
        words = [*posixpath.dirname(table).split("/"), *re.split(r"[-_.]", stem)]
        split = next((word.lower() for word in reversed(words) if word.lower() in SPLITS), None)
        if split is not None:
            found.setdefault(split, table)
    if len(found) > 1:
        folder, base = posixpath.split(next(iter(found.values())))
        parted = base.lower().startswith(tuple(found))
        example = posixpath.join(folder, f"{next(iter(found))}*") if parted else folder
        raise DataError(
            "table-splits-mixed",
            f"the tables below {printable(store.root)} are of several parts ({', '.join(found)}); set data_root to one of "
            f"them, e.g. {printable(store.path(example))}",
        )


def _is_struct(kind: pa.DataType) -> bool:
    arrow = _pyarrow()
    return bool(arrow.types.is_struct(kind)) and kind.get_field_index("bytes") >= 0


def _is_binary(kind: pa.DataType) -> bool:
    types = _pyarrow().types
    return bool(types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind))


def _features(schema: pa.Schema) -> Mapping[str, Any]:
    """What Hugging Face has written about the columns."""
    try:
        return dict(json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"])
    except (KeyError, TypeError, ValueError):
        return {}


def _kind_of_feature(feature: object) -> str:
    return str(feature.get("_type", "")) if isinstance(feature, Mapping) else ""


def _image_column(schema: pa.Schema, asked: str | None, where: str) -> str:
    fits = [field.name for field in schema if _is_struct(field.type) or _is_binary(field.type)]
    if asked is not None and asked not in fits:
        raise InvalidValueError(
            "image-column-unknown",
            f"image_column={asked!r} is no column of bytes in {where}; there are {abbreviate(fits) or 'none'} (all columns: "
            f"{abbreviate(schema.names)})",
        )
    told = [name for name, feature in _features(schema).items() if _kind_of_feature(feature) == "Image" and name in fits]
    return _chosen("image", asked, told or fits, _IMAGE_NAMES, schema, where)


def _label_column(schema: pa.Schema, asked: str | None, image: str, where: str) -> str:
    types = _pyarrow().types
    kinds = (types.is_integer, types.is_string, types.is_large_string)
    fits = [field.name for field in schema if field.name != image and any(kind(field.type) for kind in kinds)]
    if asked is not None and asked not in fits:
        raise InvalidValueError(
            "label-column-unknown",
            f"label_column={asked!r} is no column of whole numbers or texts in {where}; there are {abbreviate(fits) or 'none'}",
        )
    told = [name for name, feature in _features(schema).items() if _kind_of_feature(feature) == "ClassLabel" and name in fits]
    return _chosen("label", asked, told or [name for name in fits if name.lower() in _LABEL_NAMES], _LABEL_NAMES, schema, where)


def _chosen(what: str, asked: str | None, fits: Sequence[str], usual: Sequence[str], schema: pa.Schema, where: str) -> str:
    """The column that is meant.

    Raises:
        DataError: none, or several.
    """
    if asked is not None:
        return asked
    named = [name for name in usual if name in fits]
    if len(fits) != 1 and not named:
        raise DataError(
            "table-columns-unclear",
            f"{where} has {len(fits)} columns that could hold the {what}s ({abbreviate(fits) or 'none'}), of the columns "
            f"{abbreviate(schema.names)}; say it with {what}_column=NAME",
        )
    return named[0] if named else fits[0]


def _class_names(schema: pa.Schema, column: str) -> list[str] | None:
    feature = _features(schema).get(column, {})
    if _kind_of_feature(feature) == "ClassLabel" and _pyarrow().types.is_integer(schema.field(column).type):
        return [str(name) for name in feature.get("names") or ()] or None
    return None


def _distinct(names: Sequence[str]) -> list[str]:
    """Names of which two are the same (ImageNet has two cranes) get their numbers."""
    counts = Counter(names)
    return [f"{name} {number}" if counts[name] > 1 else name for number, name in enumerate(names)]
