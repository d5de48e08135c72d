"""Teacher features kept on disk, so that a fixed picture costs a teacher pass once and never again.

On small machines the teacher takes most of a step. When every epoch shows the same pictures (a fixed crop, flipped or not),
its tokens can be computed once, in fp16, in memory-mapped files that runs with the same teacher, data and size share. A store
is found by the hash of everything that its content depends on, so a stale one is never opened: another teacher (weights, what
its network does with them, pixel statistics), image list, size or block simply has another name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from hgkd.errors import InvalidValueError, StoppedError
from hgkd.structures import TeacherOutput
from hgkd.writing import locked

_PIECE = 1 << 24
WITHOUT_STORE = "train without a store (teacher_features=None), which costs a pass of the teacher in every step"

Compute = Callable[[Tensor], TeacherOutput]


def weights_digest(module: nn.Module) -> str:
    """SHA-256 of a network's parameters and buffers, names included."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


_INCIDENTAL = ("training", "fused_attn")  # settings of a module that change no token by more than rounding


def function_digest(module: nn.Module) -> str:
    """SHA-256 of what a network does with its weights, the same in every process: its modules and their plain settings.

    Two networks may have the same weights and heads, epsilons or activations of their own.
    """
    digest = hashlib.sha256()
    for name, part in module.named_modules():
        public = {key: value for key, value in vars(part).items() if not key.startswith("_") and key not in _INCIDENTAL}
        digest.update(f"{name}\0{type(part).__qualname__}\0{sorted(plain_settings(public).items())}\0".encode())
    return digest.hexdigest()


def plain_settings(attributes: Mapping[str, object]) -> dict[str, str]:
    """Those of some attributes that are plain values, as text; others are left out."""
    found = {key: _plain(value) for key, value in attributes.items()}
    return {key: value for key, value in found.items() if value is not None}


def _plain(value: object) -> str | None:
    """A setting as text that holds no address of this process; None: it is no plain one."""
    if isinstance(value, (FunctionType, BuiltinFunctionType)):
        return value.__qualname__
    if isinstance(value, (tuple, list)):
        parts = [_plain(part) for part in value]
        return None if None in parts else str(parts)
    return repr(value) if value is None or isinstance(value, (bool, int, float, str)) else None


def store_bytes(pictures: int, blocks: int, width: int, grid: tuple[int, int]) -> int:
    """Disk space of a :class:`FeatureCache` in bytes: two rows (plain, mirrored) an image and block, fp16, with checksums."""
    return 2 * pictures * blocks * (width * grid[0] * grid[1] * 2 + 4)


def gigabytes(size: float) -> str:
    """A size in bytes for people, in decimal units."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} bytes"


def _text(identity: Mapping[str, Any], rows: int, shape: tuple[int, int, int]) -> str:
    return json.dumps({**identity, "rows": rows, "shape": list(shape)}, sort_keys=True)


def _path(folder: Path, identity: Mapping[str, Any], rows: int, shape: tuple[int, int, int]) -> Path:
    return folder / f"tokens-{hashlib.sha256(_text(identity, rows, shape).encode()).hexdigest()[:20]}.npy"


class FeatureStore:
    """One block's tokens of every picture, (rows, D, gh, gw) fp16 on disk, filled as they are met.

    Args:
        folder: where the files lie; made when absent.
        identity: everything that the features depend on, JSON-able; its hash is the file name.
        rows: number of pictures.
        shape: (D, gh, gw).
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any], rows: int, shape: tuple[int, int, int]) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = _path(folder, identity, rows, shape)
        sums = self.path.with_suffix(".sums.npy")
        # of runs that start together one makes the files; filled they may be by all, which store the same values
        with locked(self.path.with_suffix(".lock")):
            if not self.path.exists():  # deleted, say: nothing of it is filled
                sums.unlink(missing_ok=True)
            self._values = _open(self.path, (rows, *shape), np.float16)
            self._sums = _open(sums, (rows,), np.uint32)
            self.path.with_suffix(".json").write_text(_text(identity, rows, shape), encoding="utf-8")
        self._sound = np.zeros(rows, dtype=bool)  # rows whose values were compared with their checksum

    def missing(self, rows: Tensor) -> Tensor:
        """Which of the rows (N,) are not stored yet, bool (N,).

        A row is stored when its checksum says so, which is asked once a row and process: a power failure may keep any part of
        what was written last.
        """
        new = rows.numpy()[~self._sound[rows.numpy()]]
        for row in new[self._sums[new] != 0]:
            self._sound[row] = self._sums[row] == _checksum(self._values[row])
        return torch.from_numpy(~self._sound[rows.numpy()])

    def write(self, rows: Tensor, values: Tensor) -> None:
        """Store values (N, D, gh, gw).

        Raises:
            ValueError: NaN or inf among them, or a value beyond fp16's range; nothing is stored then.
        """
        values = values.detach().cpu()
        broken = (~torch.isfinite(values)).flatten(1).any(1)
        if bool(broken.any()):
            row = int(rows[broken][0])
            raise InvalidValueError(
                "teacher-image-not-finite",
                f"the teacher gives NaN or inf for image {row // 2}{' mirrored' if row % 2 else ''}, which no student can "
                "learn; the fault is the teacher's, not the store's: set model.teacher.dtype=float32, and look at its file "
                "with hgkd doctor teacher",
            )
        half = values.to(torch.float16)
        if not bool(torch.isfinite(half).all()):
            raise InvalidValueError(
                "store-overflows",
                f"teacher features up to {values.abs().max().item():.3g} do not fit the store's fp16, which ends at 65504; "
                f"{WITHOUT_STORE}",
            )
        self._values[rows.numpy()] = half.numpy()
        self._sums[rows.numpy()] = [_checksum(row) for row in half.numpy()]
        self._sound[rows.numpy()] = True

    def read(self, rows: Tensor) -> Tensor:
        """Values of the rows, fp32 (N, D, gh, gw)."""
        return torch.from_numpy(self._values[rows.numpy()]).float()


def _checksum(values: np.ndarray) -> int:
    """CRC-32 of a row; never 0, which says that a row is not stored."""
    return zlib.crc32(values.tobytes()) or 1


def _open(path: Path, shape: tuple[int, ...], dtype: Any) -> np.memmap:
    """Map a file, made when absent, all of whose space is its own: a disk that is full later cannot end the process."""
    new = not path.exists()
    try:
        if not new:  # refuses a file whose end is missing, to which opening for writing would add zeros
            np.lib.format.open_memmap(path, mode="r")  # type: ignore[no-untyped-call]
        mapped: np.memmap = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
            path, mode="w+" if new else "r+", dtype=dtype, shape=shape if new else None
        )
        _allocate(path)
    except (OSError, ValueError) as error:
        if new:
            path.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise InvalidValueError("store-damaged", f"{path} is damaged ({error}); delete it") from error
        raise StoppedError(
            "store-not-writable",
            f"the teacher's feature store cannot be made: {path}: {error.strerror or error}; free some space, choose another "
            f"folder (teacher_features=FOLDER), or {WITHOUT_STORE}",
        ) from error
    if mapped.shape != shape or mapped.dtype != dtype:
        raise InvalidValueError(
            "store-of-other-shape", f"{path} holds {mapped.shape} {mapped.dtype}, expected {shape} {dtype}; delete it"
        )
    return mapped


def _allocate(path: Path) -> None:
    """Give a file, which may have holes, the disk space of its whole length; what it holds stays.

    Raises:
        OSError: there is no room.
    """
    size = path.stat().st_size
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    elif _on_disk(path) < size:  # macOS, Windows: by writing what is read, holes included
        with open(path, "r+b") as file:
            for start in range(0, size, _PIECE):
                file.seek(start)
                piece = file.read(_PIECE)
                file.seek(start)
                file.write(piece)
            os.fsync(file.fileno())


def _on_disk(path: Path) -> int:
    """Bytes of disk space that a file has; 0 when it is absent, or where the system does not tell."""
    return getattr(path.stat(), "st_blocks", 0) * 512 if path.exists() else 0


def _room(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free


class FeatureCache:
    """A :class:`FeatureStore` a block, and the passes that fill them.

    Args:
        folder, identity, pictures: see :class:`FeatureStore`; ``pictures`` images give two rows each, plain and flipped.
        blocks: block indices that are stored.
        width: channels D.
        grid: (gh, gw).

    Raises:
        StoppedError: the disk has no room for all of it; the message says how much it takes.
    """

    def __init__(
        self,
        folder: str | Path,
        identity: Mapping[str, Any],
        pictures: int,
        blocks: Iterable[int],
        width: int,
        grid: tuple[int, int],
    ) -> None:
        self.grid = grid
        blocks = tuple(blocks)
        shape = (width, *grid)
        identities = {block: {**identity, "block": block} for block in blocks}
        planned = store_bytes(pictures, len(blocks), width, grid)
        there = sum(_on_disk(_path(Path(folder), identities[block], 2 * pictures, shape)) for block in blocks)
        free = _room(Path(folder))
        size = (
            f"the teacher's features of {pictures} images take {gigabytes(planned)} in {folder} ({gigabytes(there)} of it are "
            f"there already; {gigabytes(planned / max(pictures, 1))} an image, plain and mirrored, {len(blocks)} block(s))"
        )
        if planned - there > free:
            raise StoppedError(
                "store-too-large",
                f"{size}, but {gigabytes(free)} are free on that disk; choose another folder (teacher_features=FOLDER), or "
                f"{WITHOUT_STORE}",
            )
        print_log(f"{size}; {gigabytes(free)} are free on that disk", "current")
        self.stores = {block: FeatureStore(folder, identities[block], 2 * pictures, shape) for block in blocks}

    def tokens(self, index: Tensor, flipped: Tensor, blocks: Iterable[int], compute: Compute) -> TeacherOutput:
        """Tokens of a batch, from the stores or, for pictures never met, from ``compute``.

        Args:
            index: image numbers, int64 (B,).
            flipped: bool (B,), the picture is mirrored left to right.
            blocks: the blocks wanted, all among those stored.
            compute: function of a bool (B,) selection that runs the teacher on these pictures.
        """
        rows = 2 * index.cpu() + flipped.cpu()
        blocks = tuple(blocks)
        missing = torch.zeros(len(rows), dtype=torch.bool)
        for block in blocks:
            missing |= self.stores[block].missing(rows)
        if bool(missing.any()):
            found = compute(missing)
            for block in blocks:
                self.stores[block].write(rows[missing], found.tokens[block])
        device = index.device
        tokens = {block: self.stores[block].read(rows).to(device, non_blocking=True) for block in blocks}
        return TeacherOutput(tokens=tokens, grid=self.grid)
