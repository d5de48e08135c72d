"""Files behind an address (http, s3, gs and what else fsspec knows), with copies in a folder of this machine.

fsspec (BSD-3; torch needs it as well) speaks with the server; a protocol's own package (aiohttp, s3fs, gcsfs) must be there.
A file is fetched whole, piece by piece where the server gives byte ranges, so that a break costs a piece; what was fetched
before a run was stopped is kept. It appears under its name when all its bytes are there: the length is compared with what the
server said. Its name in the cache follows from address, size and the server's mark of the version (ETag, date), so a changed
file is fetched anew.

``HGKD_CACHE`` names the folder, ``HGKD_CACHE_GB`` limits it (in 10**9 bytes). What does not fit is read by ranges, image by
image, and never takes the place of what this very data set has stored: nothing is fetched in a circle.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
import posixpath
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar, cast

from mmengine.logging import print_log

from hgkd.data.folders import Content, sort_in
from hgkd.data.stores import Store, read_part
from hgkd.errors import DataError, InvalidValueError, MissingFileError, MissingPackageError, Refusal, StoppedError
from hgkd.writing import PARTIAL, locked, user_cache, write_bytes, writing, written_beside

PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds before each further try; a server that restarts is back in a quarter of a minute."""

_PIECE = 2**23  # bytes of one request
_LARGE = 2**25  # from here on a file is fetched in pieces, by one process at a time
_STREAMS = 4
_PASSING = frozenset({408, 425, 429})  # of the states 4xx those after which one asks again
_PACKAGES = {"http": "aiohttp (hgkd's extra 'remote')", "https": "aiohttp (hgkd's extra 'remote')", "s3": "s3fs", "gs": "gcsfs"}
_MARKS = ("ETag", "etag", "Last-Modified", "LastModified", "updated", "created", "mtime")
_Result = TypeVar("_Result")


class _ShortError(OSError):
    """Fewer bytes than asked for."""


def cache_folder() -> Path:
    """Where copies are kept: ``HGKD_CACHE``, else ``hgkd/data`` in the user's cache folder."""
    return user_cache("HGKD_CACHE", "data")


def cache_limit() -> float:
    """Bytes that the folder may hold.

    Raises:
        ValueError: ``HGKD_CACHE_GB`` is no number from 0 on.
    """
    text = os.environ.get("HGKD_CACHE_GB") or "inf"
    with suppress(ValueError):
        if (limit := float(text)) >= 0:
            return limit * 1e9
    raise InvalidValueError("cache-limit-not-a-number", f"HGKD_CACHE_GB must be a number of gigabytes from 0 on, got {text!r}")


class _Cache:
    """Files of one address in the folder of copies.

    With a limit, the files of other addresses go first, the longest unused first; those of this one stay.
    """

    def __init__(self, address: str) -> None:
        self._all, self._limit = cache_folder(), cache_limit()
        self.folder = self._all / hashlib.sha256(address.encode()).hexdigest()[:16]
        self._free, self._added = 0.0, math.inf  # when the folder was last looked through, and since; at first it never was
        self._promised = 0  # bytes that are on their way
        self._refused = math.inf  # what did not fit once: the folder is not looked through for every image

    def path(self, key: str) -> str:
        return str(self.folder / key)

    def takes(self, size: int) -> bool:
        """Whether there is room for so many bytes more, made where need be, and promised until they are :meth:`settled`."""
        if math.isinf(self._limit):
            return True
        if size >= self._refused:
            return False
        wanted = self._promised + size
        if self._added > self._limit / 64 or self._added + wanted > self._free:  # other processes add as well
            self._free, self._added = self._make_room(wanted), 0.0
        if self._added + wanted > self._free:
            self._refused = size
            return False
        self._promised = wanted
        return True

    def settled(self, size: int) -> None:
        """Promised bytes have come."""
        if not math.isinf(self._limit):
            self._promised, self._added = self._promised - size, self._added + size

    def _make_room(self, size: int) -> float:
        """Bytes that are free now."""
        found = []
        for path in self._all.rglob("*"):
            with suppress(OSError):
                if path.is_file():
                    status = path.stat()
                    found.append((path.parent == self.folder, status.st_mtime, status.st_size, path))
        free = self._limit - sum(entry[2] for entry in found)
        for own, _, length, path in sorted(found):
            if free >= size or own:
                break
            with suppress(OSError):
                path.unlink()
                free += length
        return free


class RemoteStore(Store):
    """Files below an address.

    Args:
        address: of a folder, or scheme and '//' alone, below which every address lies.

    Raises:
        ModuleNotFoundError, ValueError: the package of the protocol is not installed, or there is no such protocol.
    """

    def __init__(self, address: str) -> None:
        self._base = address if address.endswith("/") else f"{address}/"
        self.root = shown(address)
        self._cache = _Cache(self._base)
        self._infos: dict[str, tuple[int, str]] = {}  # name -> size (-1: not told), mark of its version
        self._process = 0
        self._system: Any = None
        self._ranged = True
        _ = self._fs

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_system": None, "_process": 0}

    @property
    def _fs(self) -> Any:
        if self._process != os.getpid():  # its threads and connections do not outlive a fork
            self._system, self._process = _filesystem(self._base), os.getpid()
        return self._system

    def search(self, extensions: tuple[str, ...]) -> Content:
        found = Content()
        listed = self._tried("", self._listed)
        base = self._fs._strip_protocol(self._base).rstrip("/") + "/"
        for path, info in listed.items():
            name = path.removeprefix(base)
            if info.get("size") is not None:
                self._infos[name] = _size_and_mark(info)
            sort_in(found, name, extensions)
        found.sort()
        return found

    def _listed(self) -> dict[str, Any]:
        listed: dict[str, Any] = self._fs.find(self._base, detail=True)
        if not listed:
            self._fs.ls(self._base)  # says why, where fsspec's walk passes over a server that does not answer
        return listed

    def matching(self, pattern: str) -> list[str]:
        """Names that a pattern with ``*`` fits, sorted."""
        base = self._fs._strip_protocol(self._base).rstrip("/") + "/"
        return sorted(path.removeprefix(base) for path in self._tried(pattern, lambda: self._fs.glob(self._base + pattern)))

    def path(self, name: str) -> str:
        return shown(self._base + name)

    def name_of(self, entry: str) -> str | None:
        if "://" in entry:
            return entry.removeprefix(self._base) if entry.startswith(self._base) else None
        name = posixpath.normpath(entry)
        return None if name.startswith(("/", "../")) or name == ".." else name

    def exists(self, name: str) -> bool:
        with suppress(FileNotFoundError):
            self._info(name)
            return True
        return False

    def size(self, name: str) -> int:
        with suppress(FileNotFoundError):
            return self._info(name)[0]
        return -1

    def open(self, name: str) -> BinaryIO:
        size, _ = self._infos.get(name, (-1, ""))
        if size < _LARGE:
            return self._open_small(name, size)
        if self._fits(name):
            return open(self._fetched(name), "rb")
        return cast(BinaryIO, self._fs.open(self._base + name, "rb"))

    def _open_small(self, name: str, size: int) -> BinaryIO:
        """An image, of which the server is asked once."""
        target = self._target(name)
        with suppress(FileNotFoundError):
            return open(target, "rb")

        def get() -> bytes:
            content = bytes(self._fs.cat_file(self._base + name))
            if size >= 0 and len(content) != size:
                raise _ShortError(f"{len(content)} of {size} bytes came")
            return content

        content = self._tried(name, get)
        if self._cache.takes(len(content)):
            with written_beside(target) as beside:
                beside.write_bytes(content)
            self._cache.settled(len(content))
        return io.BytesIO(content)

    def read(self, name: str, offset: int, size: int) -> bytes:
        with suppress(FileNotFoundError):
            return read_part(self._target(name), offset, size)
        return self._tried(name, lambda: self._piece(name, offset, size)) if size else b""

    def prepare(self, names: list[str]) -> None:
        """Look all files up, and fetch those that fit into the cache.

        Raises:
            StoppedError, FileNotFoundError, DataError: one cannot be had.
        """
        with ThreadPoolExecutor(_STREAMS) as pool:
            sizes = [size for size, _ in pool.map(self._info, names)]
            absent = [name for name in names if not os.path.isfile(self._target(name))]
            if absent:
                total = sum(max(0, self._infos[name][0]) for name in absent)
                print_log(
                    f"fetching {len(absent)} of {len(names)} files ({total / 1e9:.2f} GB) below {self.root} into "
                    f"{self._cache.folder}",
                    logger="current",
                )
            kept = [name for name in names if self._fits(name)]
            list(pool.map(self._fetched, kept))
        if len(kept) < len(names):
            print_log(
                f"{len(names) - len(kept)} of {len(names)} files ({sum(sizes) / 1e9:.2f} GB in all) below {self.root} do not "
                f"fit into the cache and are read piece by piece; HGKD_CACHE_GB is {cache_limit() / 1e9:g}",
                logger="current",
                level=logging.WARNING,
            )

    @contextmanager
    def _copied(self, name: str) -> Iterator[str]:
        if os.path.isfile(self._target(name)) or self._fits(name):
            yield self._fetched(name)
            return
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "copy")
            self._fetch(name, path)
            yield path

    def copy(self, name: str) -> AbstractContextManager[str]:
        return self._copied(name)

    def note(self, name: str, kind: str, make: Callable[[], bytes]) -> bytes:
        """What ``make`` gives for a file, kept beside the copies for as long as the file stays as it is."""
        path = Path(f"{self._target(name)}.{kind}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(f"{path}.lock"):
            if not path.exists():
                write_bytes(path, make())
            return path.read_bytes()

    def _info(self, name: str) -> tuple[int, str]:
        if name not in self._infos:
            self._infos[name] = _size_and_mark(self._tried(name, lambda: self._fs.info(self._base + name)))
        return self._infos[name]

    def _target(self, name: str) -> str:
        """Path of the copy. Without the address's query, whose signature changes from day to day."""
        address = (self._base + name).partition("?")[0]
        text = "\n".join((address, *map(str, self._infos.get(name, ()))))
        return self._cache.path(hashlib.sha256(text.encode()).hexdigest()[:40])

    def _fits(self, name: str) -> bool:
        size = max(0, self._info(name)[0])
        return os.path.isfile(self._target(name)) or self._cache.takes(size)

    def _fetched(self, name: str) -> str:
        """Path of the whole copy, fetched when it is not there."""
        target = self._target(name)
        if not os.path.isfile(target):
            with writing(self._cache.folder, "free some space, or set HGKD_CACHE and HGKD_CACHE_GB"):
                self._cache.folder.mkdir(parents=True, exist_ok=True)
                with locked(f"{target}.lock"):
                    if not os.path.isfile(target):
                        self._fetch(name, target)
                        self._cache.settled(max(0, self._info(name)[0]))
                Path(f"{target}.lock").unlink(missing_ok=True)  # who waits for it finds the file
        os.utime(target)  # the longest unused goes first
        return target

    def _fetch(self, name: str, target: str) -> None:
        """Write a file's copy to ``target``; what came of it before is gone on with."""
        size, _ = self._info(name)
        partial = Path(f"{target}{PARTIAL}")
        if size < 0 or not self._ranged:
            self._tried(name, lambda: self._whole(name, partial, size))
        else:
            with partial.open("ab") as out:
                if out.tell() > size:
                    out.truncate(0)
                    out.seek(0)
                while (done := out.tell()) < size:
                    piece = self._tried(name, lambda: self._piece(name, done, min(_PIECE, size - done)))
                    out.write(piece)
                    out.flush()
        os.replace(partial, target)

    def _whole(self, name: str, partial: Path, size: int) -> None:
        """By one request; for servers that give no ranges."""
        self._fs.get_file(self._base + name, str(partial))
        came = partial.stat().st_size
        if size >= 0 and came != size:
            partial.unlink()
            raise _ShortError(f"{came} of {size} bytes came")

    def _piece(self, name: str, start: int, size: int) -> bytes:
        content = bytes(self._fs.cat_file(self._base + name, start=start, end=start + size))
        if len(content) > size:  # the whole file, from a server that gives no ranges
            self._ranged = False
            content = content[start : start + size]
        if len(content) != size:
            raise _ShortError(f"{len(content)} of {size} bytes came")
        return content

    def _tried(self, name: str, call: Callable[[], _Result]) -> _Result:
        """The result of asking the server, several times when it does not answer.

        Raises:
            StoppedError: it does not answer, or breaks off.
            FileNotFoundError, DataError: it answers that there is no such file, or that it may not be read.
        """
        where = self.path(name)
        pauses = iter(PAUSES)
        while True:
            try:
                return call()
            except Refusal:
                raise
            except Exception as error:
                cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ is not None else error
                _raise_final(cause, where)
                pause = next(pauses, None)
                told = f"{type(cause).__name__}: {cause}"[:300]
                if pause is None:
                    _give_up(cause, f"{where} cannot be read after {len(PAUSES) + 1} tries ({told})")
            print_log(f"{where}: {told}; trying again in {pause:g} s", logger="current", level=logging.WARNING)
            time.sleep(pause)


def shown(address: str) -> str:
    """An address for messages: without its query and credentials, which are secrets."""
    scheme, _, rest = address.partition("?")[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def _filesystem(address: str) -> Any:
    import fsspec

    scheme = address.partition("://")[0].lower()
    # without it a server may compress what it sends, and lengths say nothing
    options = {"headers": {"Accept-Encoding": "identity"}} if scheme in ("http", "https") else {}
    try:
        return fsspec.filesystem(scheme, skip_instance_cache=True, **options)
    except ImportError as error:
        raise MissingPackageError(
            "protocol-package-missing",
            f"{shown(address)} needs a package for {scheme}:// ({error}); pip install {_PACKAGES.get(scheme, scheme + 'fs')}",
        ) from error
    except ValueError as error:
        raise InvalidValueError(
            "address-protocol-unknown",
            f"{shown(address)}: fsspec knows no protocol {scheme}:// ({error}); use http(s)://, s3:// or gs://, or a path",
        ) from error


def _size_and_mark(info: dict[str, Any]) -> tuple[int, str]:
    size = info.get("size")
    return -1 if size is None else int(size), next((str(info[key]) for key in _MARKS if info.get(key)), "")


def _raise_final(cause: BaseException, where: str) -> None:
    """Raise what no further try would change.

    Raises:
        FileNotFoundError, DataError, ModuleNotFoundError.
    """
    status = int(getattr(cause, "status", 0) or 0)
    if isinstance(cause, FileNotFoundError) or status in (404, 410):
        raise MissingFileError("address-not-found", f"{where} is not there, says the server ({cause}); look at the address")
    if isinstance(cause, PermissionError) or (400 <= status < 500 and status not in _PASSING):
        raise DataError(
            "address-not-allowed",
            f"{where} may not be read, says the server ({type(cause).__name__}: {cause}); give fsspec the credentials of its "
            "protocol (environment variables or its configuration file)",
        )


def _give_up(cause: BaseException, told: str) -> NoReturn:
    """Raise what ends a run.

    Raises:
        StoppedError.
    """
    kept = "what was fetched is kept: start again, a training with --resume"
    if isinstance(cause, _ShortError):
        raise StoppedError(
            "download-truncated", f"{told}: the connection breaks off, or the file is changing; {kept}"
        ) from cause
    raise StoppedError("address-unreachable", f"{told}; look at the address and the network. Then, {kept}") from cause
