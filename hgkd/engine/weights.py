"""Reading weight files without running what they may hold, and loading them strictly, with a report.

Pickled files are read by torch's restricted unpickler (``weights_only=True``) with the few types that mmengine's and MAE's own
checkpoints need; anything else in a file is refused by name. Nothing is ever loaded partly in silence.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from mmengine.logging import HistoryBuffer, print_log
from safetensors.torch import load_file
from torch import Tensor, nn

from hgkd.errors import WeightsError


class NoPlainNumbersError(WeightsError):
    """A weight is quantised, sparse, complex, an integer or without data, where a network has floating-point numbers."""


_WRAPPERS = ("state_dict", "model", "module", "network", "teacher")
_FOREIGN_TYPE = re.compile(
    r"(?:GLOBAL|class|recognized function|instantiate|for) ([\w.<>' ]*[\w.>])(?: whose| which| was|,|$|\()"
)
_LFS_POINTER = b"version https://git-lfs"
_PREFIXES = ("module.", "network.", "backbone.", "encoder.")


def _statistic_of_history(owner: Any, name: str) -> Any:
    """Stands in for ``getattr``, by which a pickled ``HistoryBuffer`` names its statistics, and reaches nothing else."""
    if owner is not HistoryBuffer or name not in ("min", "max", "mean", "current"):
        raise pickle.UnpicklingError(f"Unsupported global: GLOBAL getattr({owner!r}, {name!r})")
    return getattr(HistoryBuffer, name)


def _under_name(function: Any, module: str, name: str) -> Callable[..., Any]:
    """A function that a pickle finds as ``module.name``: numpy 1 and 2 have different homes for the same function."""

    def stand_in(*args: Any) -> Any:
        return function(*args)

    stand_in.__module__, stand_in.__name__, stand_in.__qualname__ = module, name, name
    return stand_in


def _plain_data_types() -> list[Any]:
    rebuild_array, rebuild_scalar = np.array(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    homes = ("numpy.core.multiarray", "numpy._core.multiarray")
    return [
        HistoryBuffer,
        argparse.Namespace,
        np.ndarray,
        np.dtype,
        *{type(np.dtype(name)) for name in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?")},
        *(_under_name(rebuild_array, home, "_reconstruct") for home in homes),
        *(_under_name(rebuild_scalar, home, "scalar") for home in homes),
        _under_name(_statistic_of_history, "builtins", "getattr"),
    ]


_PLAIN_DATA_TYPES = _plain_data_types()


@contextmanager
def safe_globals_for_mmengine() -> Iterator[None]:
    """Context in which torch reads checkpoints of mmengine's runner and of MAE with ``weights_only=True``.

    Since torch 2.6 that is the default, and mmengine 0.10.7 cannot resume without this: its files hold ``HistoryBuffer`` and
    numpy scalars. The official MAE files hold an ``argparse.Namespace``. All of these are plain data. What was allowed before
    is allowed again afterwards, no more and no less.
    """
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals(_PLAIN_DATA_TYPES)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """Whatever a file of ``torch.save`` or safetensors holds, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: damaged, not such a file, or holding types other than tensors and plain data.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise WeightsError(f"{path} is a folder; expected a weight file (.safetensors, .pth, .pt or .bin)")
    if not path.is_file():
        raise FileNotFoundError(f"weight file {path} does not exist; give a local .safetensors, .pth, .pt or .bin file")
    if path.stat().st_size == 0:
        raise WeightsError(f"{path} is empty (0 bytes); copy or download it again")
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise WeightsError(
                f"{path} is a pointer of Git LFS and not the file itself; run 'git lfs pull' where it was cloned"
            )
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except safetensors.SafetensorError as error:
            raise WeightsError(f"{path} is no intact safetensors file ({error}); copy or download it again") from error
    try:
        with safe_globals_for_mmengine():
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = _FOREIGN_TYPE.search(str(error))
        if foreign is not None:
            raise WeightsError(
                f"{path} holds more than tensors and plain data, namely {foreign.group(1)}, and is not read because that "
                "could run foreign code; where you trust the file, save its state_dict alone, best as .safetensors"
            ) from None
        raise WeightsError(f"{path} is damaged or no weight file: its content is not what torch.save writes") from None
    except Exception as error:
        # torch raises RuntimeError, EOFError, KeyError and others on damaged files
        if "TorchScript" in str(error):
            raise WeightsError(f"{path} is a TorchScript program; save the state_dict of its module instead") from None
        first = (str(error).splitlines() or [""])[0]
        raise WeightsError(f"{path} is damaged or no weight file ({type(error).__name__}: {first})") from error


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a weight file by name, unwrapped from the usual containers and from a prefix common to all names.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: see :func:`read_checkpoint`, or there are no tensors in it.
    """
    return tensors_of(read_checkpoint(path), source=str(path))


def tensors_of(content: Any, *, source: str) -> dict[str, Tensor]:
    """What :func:`read_weights` makes of a file's content.

    Args:
        content: see :func:`read_checkpoint`.
        source: name of the file, for messages.

    Raises:
        WeightsError: there are no tensors in it.
    """
    found = content
    notes = []
    for _ in range(3):
        inner = next((k for k in _WRAPPERS if isinstance(found, Mapping) and isinstance(found.get(k), Mapping)), None)
        if inner is None:
            break
        found = found[inner]
        notes.append(f"taken from its entry {inner!r}")
    if not isinstance(found, Mapping):
        raise WeightsError(f"{source} holds a {type(found).__name__}, expected named tensors (a state_dict)")
    weights = {str(key): value for key, value in found.items() if isinstance(value, Tensor)}
    if not weights:
        raise WeightsError(f"{source} holds no tensors; its entries are {', '.join(map(str, list(found)[:5])) or 'none'}")
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in weights):
            weights = {key.removeprefix(prefix): value for key, value in weights.items()}
            notes.append(f"prefix {prefix!r} removed")
    if notes:
        print_log(f"{source}: {'; '.join(notes)}", "current")
    return weights


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The text metadata of a safetensors file; empty for other kinds."""
    if Path(path).suffix != ".safetensors":
        return {}
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{path} is no intact safetensors file ({error}); copy or download it again") from error


@dataclass(frozen=True)
class LoadReport:
    """How a set of weights met a network.

    Attributes:
        source: where the weights are from.
        total: entries of the network.
        matched: entries that were loaded.
        missing: entries of the network without weights.
        unexpected: weights without an entry.
        mismatched: 'name: shape found, expected shape' of entries whose shapes differ.
        ignored: names that the caller declared irrelevant and that were passed over.
    """

    source: str
    total: int
    matched: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    ignored: tuple[str, ...] = field(default=())

    @property
    def complete(self) -> bool:
        """Everything found its place and nothing is left over."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        parts = [f"{self.source}: {self.matched} of {self.total} entries loaded"]
        for what, names in (
            ("missing", self.missing),
            ("unexpected", self.unexpected),
            ("of another shape", self.mismatched),
            ("ignored", self.ignored),
        ):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                parts.append(f"{len(names)} {what}: {', '.join(names[:5])}{more}")
        return "; ".join(parts)


def match(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str,
    ignore_missing: Sequence[str] = (),
    ignore_unexpected: Sequence[str] = (),
) -> LoadReport:
    """How weights would meet a network; nothing is loaded. Arguments and errors: see :func:`load_strict`."""
    own = module.state_dict()
    unfit = [f"{key} ({kind})" for key in own if key in state and (kind := _no_plain_numbers(state[key], own[key]))]
    if unfit:
        raise NoPlainNumbersError(
            f"{source} holds {len(unfit)} weights that are no plain floating-point numbers, e.g. {unfit[0]}; it is a quantised "
            "or incomplete file: save the state_dict of the ordinary network"
        )
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    ignored = [key for key in missing if key.startswith(tuple(ignore_missing))] if ignore_missing else []
    ignored += [key for key in unexpected if key.startswith(tuple(ignore_unexpected))] if ignore_unexpected else []
    skipped = set(ignored)
    mismatched = {
        key: f"{key}: {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    }
    report = LoadReport(
        source=source,
        total=len(own),
        matched=len(own) - len(missing) - len(mismatched),
        missing=tuple(key for key in missing if key not in skipped),
        unexpected=tuple(key for key in unexpected if key not in skipped),
        mismatched=tuple(mismatched.values()),
        ignored=tuple(ignored),
    )
    if not report.complete:
        raise WeightsError(f"the weights do not fit {type(module).__name__}: {report}")
    return report


def _no_plain_numbers(value: Tensor, place: Tensor) -> str | None:
    """What kind of tensor a file has where a network has plain numbers; None when it has the same."""
    if value.device.type == "meta":
        return "without data: the meta device"
    if value.layout != torch.strided or value.is_quantized:
        return str(value.dtype if value.is_quantized else value.layout)
    return str(value.dtype) if place.is_floating_point() and not value.is_floating_point() else None


def load_strict(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str,
    ignore_missing: Sequence[str] = (),
    ignore_unexpected: Sequence[str] = (),
) -> LoadReport:
    """Load weights into a network, all or nothing, and log the report.

    Args:
        module: its floating-point precision is kept; fp16 files are converted.
        source: name of the file, for the report.
        ignore_missing, ignore_unexpected: beginnings of names that may be absent, or left over.

    Raises:
        WeightsError: anything missing, left over or of another shape; the network is unchanged then.
    """
    report = match(module, state, source=source, ignore_missing=ignore_missing, ignore_unexpected=ignore_unexpected)
    own = module.state_dict()
    module.load_state_dict({key: value for key, value in state.items() if key in own}, strict=False)
    print_log(str(report), "current")
    return report
