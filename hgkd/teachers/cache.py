"""Teacher features kept on disk, so that a fixed picture costs a teacher pass once and never again.

On small machines the teacher takes most of a step. When every epoch shows the same pictures (a fixed crop, flipped or not),
its tokens can be computed once, in fp16, in memory-mapped files that runs with the same teacher, data and size share. A store
is found by the hash of everything that its content depends on, so a stale one is never opened: another teacher, image list,
size or block simply has another name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hgkd.structures import TeacherOutput

Compute = Callable[[Tensor], TeacherOutput]


def weights_digest(module: nn.Module) -> str:
    """SHA-256 of a network's parameters and buffers, names included."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class FeatureStore:
    """One block's tokens of every picture, (rows, D, gh, gw) fp16 on disk, filled as they are met.

    Args:
        folder: where the files lie; made when absent.
        identity: everything that the features depend on, JSON-able; its hash is the file name.
        rows: number of pictures.
        shape: (D, gh, gw).
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any], rows: int, shape: tuple[int, int, int]) -> None:
        text = json.dumps({**identity, "rows": rows, "shape": list(shape)}, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:20]
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"tokens-{name}.npy"
        self._values = _open(self.path, (rows, *shape), np.float16)
        self._filled = _open(folder / f"tokens-{name}.filled.npy", (rows,), np.uint8)
        (folder / f"tokens-{name}.json").write_text(text)

    def missing(self, rows: Tensor) -> Tensor:
        """Which of the rows (N,) are not stored yet, bool (N,)."""
        return torch.from_numpy(self._filled[rows.numpy()] == 0)

    def write(self, rows: Tensor, values: Tensor) -> None:
        """Store values (N, D, gh, gw); a value beyond fp16's range is an error, not an infinity."""
        half = values.detach().to("cpu", torch.float16)
        if not bool(torch.isfinite(half).all()):
            raise ValueError(
                f"teacher features up to {values.abs().max().item():.3g} do not fit fp16; train without the feature cache"
            )
        self._values[rows.numpy()] = half.numpy()
        self._filled[rows.numpy()] = 1  # after the values: a run that dies between the two computes them again

    def read(self, rows: Tensor) -> Tensor:
        """Values of the rows, fp32 (N, D, gh, gw)."""
        return torch.from_numpy(self._values[rows.numpy()]).float()


def _open(path: Path, shape: tuple[int, ...], dtype: Any) -> np.memmap:
    mode = "r+" if path.exists() else "w+"
    mapped: np.memmap = np.lib.format.open_memmap(path, mode=mode, dtype=dtype, shape=None if mode == "r+" else shape)  # type: ignore[no-untyped-call]
    if mapped.shape != shape or mapped.dtype != dtype:
        raise ValueError(f"{path} holds {mapped.shape} {mapped.dtype}, expected {shape} {dtype}; delete it")
    return mapped


class FeatureCache:
    """A :class:`FeatureStore` a block, and the passes that fill them.

    Args:
        folder, identity, pictures: see :class:`FeatureStore`; ``pictures`` images give two rows each, plain and flipped.
        blocks: block indices that are stored.
        width: channels D.
        grid: (gh, gw).
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
        self.stores = {
            block: FeatureStore(folder, {**identity, "block": block}, 2 * pictures, (width, *grid)) for block in blocks
        }

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
