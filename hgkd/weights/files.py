"""Reading weight files without running what they may hold, and loading them strictly, with a report.

Pickled files are read by torch's restricted unpickler (``weights_only=True``) with the few types that mmengine's and MAE's own
checkpoints need; anything else in a file is refused by name. Nothing is ever loaded partly in silence.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import pickletools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, cast

import numpy as np
import safetensors
import torch
from mmengine.logging import HistoryBuffer, print_log
from safetensors.torch import load_file
from torch import Tensor

from hgkd.errors import MissingFileError, WeightsError, first_line

_READ: ContextVar[dict[tuple[Path, int, int], Any] | None] = ContextVar("read", default=None)  # see reading_once
_WRAPPERS = ("state_dict", "model", "module", "network", "teacher")
_FOREIGN_TYPE = re.compile(
    r"(?:GLOBAL|class|recognized function|instantiate|for) ([\w.<>' ]*[\w.>])(?: whose| which| was|,|$|\()"
)
_NO_WEIGHTS = re.compile(r"optim|sched|scaler|message_hub|(^|_)rng|loss", re.IGNORECASE)
# what a pickle of numpy arrays names, as pickletools prints it
_ARRAY_GLOBALS = {
    *(f"numpy.{core}.multiarray {function}" for core in ("core", "_core") for function in ("_reconstruct", "scalar")),
    *(f"numpy.{core}.numeric _frombuffer" for core in ("core", "_core")),
    "numpy ndarray",
    "numpy dtype",
    "_codecs encode",
    "collections OrderedDict",
}
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_HOW_TO_CHOOSE = (
    "for one of these set model.teacher.entry={entry} (a teacher), or write it to a file of its own: "
    "hgkd doctor extract {source} {entry} OUT.safetensors"
)
_AVERAGE = re.compile(r"(^|[._])(ema|averaged?)([._]|$)", re.IGNORECASE)
_WRAPPER_NAMES = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|module)\.")  # torch.compile's and DistributedDataParallel's
_LFS_POINTER = b"version https://git-lfs"
_PREFIXES = ("network.", "backbone.", "encoder.")


def _statistic_of_history(owner: object, name: str) -> object:
    """Stands in for ``getattr``, by which a pickled ``HistoryBuffer`` names its statistics, and reaches nothing else."""
    if owner is not HistoryBuffer or name not in ("min", "max", "mean", "current"):
        raise pickle.UnpicklingError(f"Unsupported global: GLOBAL getattr({owner!r}, {name!r})")
    return getattr(HistoryBuffer, name)


def _under_name(function: Any, module: str, name: str) -> Callable[..., Any]:
    """``function`` under another import path: pickles of numpy 1 name ``numpy.core``, those of numpy 2 ``numpy._core``."""

    def stand_in(*args: object) -> object:
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


@contextmanager
def reading_once() -> Iterator[None]:
    """Context, or decorator, in which a file that is asked for again is not read again, unless it was written since.

    What was read stays in memory until the end.
    """
    before = _READ.get()
    token = _READ.set({} if before is None else before)
    try:
        yield
    finally:
        _READ.reset(token)


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """Content of a file of ``torch.save`` or safetensors, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: damaged, not such a file, one part of a model in several files, or holding types other than tensors and
            plain data.
    """
    alone = part_of_several(str(path))
    if alone is not None and Path(path).expanduser().is_file():
        raise WeightsError("one-part-of-several", f"{path} holds a part of a model only: {alone}")
    return _read_file(Path(path).expanduser())


def _read_file(path: Path) -> Any:
    if path.is_dir():
        raise WeightsError(
            "weight-file-is-a-folder",
            f"{path} is a folder; expected a weight file (.safetensors, .pth, .pt or .bin){_inside(path)}",
        )
    if not path.is_file():
        raise MissingFileError(
            "weight-file-missing", f"weight file {path} does not exist; give a local .safetensors, .pth, .pt or .bin file"
        )
    if path.stat().st_size == 0:
        raise WeightsError("weight-file-empty", f"{path} is empty (0 bytes); copy or download it again")
    kept = _READ.get()
    if kept is None:
        return _content(path)
    state = path.stat()
    key = (path.resolve(), state.st_size, state.st_mtime_ns)
    if key not in kept:
        kept[key] = _content(path)
    return kept[key]


def _content(path: Path) -> Any:
    if path.name.endswith(".index.json"):
        return _read_parts(path)
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise WeightsError(
                "weight-file-is-a-pointer",
                f"{path} is a pointer of Git LFS and not the file itself; run 'git lfs pull' where it was cloned",
            )
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except safetensors.SafetensorError as error:
            raise WeightsError(
                "file-not-safetensors", f"{path} is no intact safetensors file ({error}); copy or download it again"
            ) from error
    try:
        with safe_globals_for_mmengine():
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = _FOREIGN_TYPE.search(str(error))
        if foreign is not None:
            raise WeightsError(
                "weight-file-runs-code",
                f"{path} holds more than tensors and plain data, namely {foreign.group(1)}, and is not read because that "
                "could run foreign code; where you trust the file, save its state_dict alone, best as .safetensors",
            ) from None
        if _is_plain_pickle(path):
            raise WeightsError("weight-file-is-a-pickle", _plain_pickle_message(path)) from None
        raise WeightsError(
            "weight-file-damaged", f"{path} is damaged or no weight file: its content is not what torch.save writes"
        ) from None
    except Exception as error:
        # torch raises RuntimeError, EOFError, KeyError and others on damaged files
        if _is_plain_pickle(path):
            raise WeightsError("weight-file-is-a-pickle", _plain_pickle_message(path)) from None
        if "TorchScript" in str(error):
            raise WeightsError(
                "weight-file-is-torchscript", f"{path} is a TorchScript program; save the state_dict of its module instead"
            ) from None
        raise WeightsError(
            "weight-file-damaged", f"{path} is damaged or no weight file ({type(error).__name__}: {first_line(error)})"
        ) from error


def _is_plain_pickle(path: Path) -> bool:
    """Whether a file is one pickle of arrays, as detectron2 writes its models, not one of torch.save, and runs no code.

    Nothing is unpickled: the opcodes are looked at for what they name.
    """
    with open(path, "rb") as file:
        if file.read(1) != b"\x80":
            return False
        file.seek(0)
        pushed: list[Any] = []
        memo: dict[int, Any] = {}
        try:
            for opcode, arg, _ in pickletools.genops(file):
                name = opcode.name
                if name in ("LONG1", "LONG4") and len(pushed) <= 2:  # torch.save's older format begins with a number
                    return False
                if name == "MEMOIZE":
                    memo[len(memo)] = pushed[-1]
                elif name in ("BINPUT", "LONG_BINPUT"):
                    memo[int(str(arg))] = pushed[-1]
                elif name in ("GLOBAL", "STACK_GLOBAL"):
                    found = str(arg) if name == "GLOBAL" else f"{pushed[-2]} {pushed[-1]}"
                    if found not in _ARRAY_GLOBALS:
                        return False
                    pushed.append(None)
                else:
                    pushed.append(memo.get(int(str(arg))) if name in ("BINGET", "LONG_BINGET") else arg)
        except (ValueError, IndexError):
            return False
    return True


def _plain_pickle_message(path: Path) -> str:
    to = path.with_suffix(".pth")
    return (
        f"{path} is a plain pickle, as detectron2 writes, not what torch.save writes. It is not read because that could run "
        'foreign code; where you trust the file, convert it: python -c "import pickle, torch; '
        f"d = pickle.load(open('{path}', 'rb'), encoding='latin1'); "
        f"torch.save({{k: torch.as_tensor(v) for k, v in d.get('model', d).items()}}, '{to}')\""
    )


def _inside(folder: Path) -> str:
    """Which file of a folder to give instead of the folder, for a message."""
    indices = sorted(folder.glob("*.index.json"))
    files = indices or sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES)
    if not files:
        return "; there is none in it"
    which = "in several parts, all named by this index" if indices else "in it"
    return f"; {which}: give {files[0]}" + (f", or one of {len(files) - 1} others" if len(files) > 1 else "")


def _read_parts(index: Path) -> dict[str, Any]:
    """A model that was saved in several files, from the index that Hugging Face's libraries write next to them."""
    try:
        places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        names = dict.fromkeys(places.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            "weight-index-damaged", f"{index} is no index of a model in several files ({type(error).__name__}: {error})"
        ) from error
    content: dict[str, Any] = {}
    for name in names:
        part = index.parent / Path(name).name  # nothing outside the index's folder is read
        if part.suffix not in _SUFFIXES:
            raise WeightsError(
                "weight-index-names-other-file", f"{index} names {name!r}, which is no weight file ({', '.join(_SUFFIXES)})"
            )
        content.update(_read_file(part))
    absent = [name for name in places if name not in content]
    if absent:
        raise WeightsError(
            "parts-of-another-model",
            f"{index} names {len(absent)} weights that are in none of its {len(names)} files, e.g. {absent[0]}: a file is "
            "of another model or version; download all of them again, with the index",
        )
    return content


def read_weights(path: str | os.PathLike[str], entry: str | None = None) -> dict[str, Tensor]:
    """The tensors of a weight file by name, unwrapped from the usual containers and from a prefix common to all names.

    Args:
        entry: see :func:`tensors_of`.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: see :func:`read_checkpoint`, or there are no tensors in it.
    """
    return tensors_of(read_checkpoint(path), source=str(path), entry=entry)


def tensors_of(content: object, *, source: str, entry: str | None = None) -> dict[str, Tensor]:
    """The weights in a file's content; see :func:`read_weights`.

    Args:
        content: see :func:`read_checkpoint`.
        source: name of the file, for messages.
        entry: the entry to take, inner ones behind a dot ('state_dict_ema'). None: the usual one ('state_dict', 'model', ...),
            else the only one that holds named tensors, wherever it is. The others are named in the log.

    Raises:
        WeightsError: there are no tensors in it, there is no such entry, or several that could be meant.
    """
    if not isinstance(content, Mapping):
        raise WeightsError(
            "weights-not-named-tensors", f"{source} holds a {type(content).__name__}, expected named tensors (a state_dict)"
        )
    places = _sets_of_tensors(content)
    place = _usual_place(content) if entry is None else entry
    if entry is not None and entry not in places:
        known = ", ".join(map(repr, filter(None, places))) or "none"
        raise WeightsError("entry-missing", f"{source} has no entry {entry!r} with named tensors; those that it has: {known}")
    if place not in places and len(places) > 1:
        raise WeightsError(
            "several-sets-of-weights",
            f"{source} holds {len(places)} sets of weights, {', '.join(map(repr, places))}, none of them under a usual "
            "name; " + _HOW_TO_CHOOSE.format(source=source, entry=next(iter(places))),
        )
    if place not in places and places:
        place = next(iter(places))
    if place not in places:
        raise WeightsError(
            "no-tensors", f"{source} holds no tensors; its entries are {', '.join(map(str, list(content)[:5])) or 'none'}"
        )
    weights = {str(key): value for key, value in places[place].items() if isinstance(value, Tensor)}
    notes = [f"taken from its entry {place!r}"] if place else []
    others = [name for name in places if name and name != place]
    if others and place and entry is None:
        how = _HOW_TO_CHOOSE.format(source=source, entry=others[0])
        average = "; model.teacher.ema=True takes the average" if any(map(_AVERAGE.search, others)) else ""
        if place == "state_dict" and trained_weights(content) is not None:
            average = f": {place!r} is their moving average"
        notes.append(f"it also holds {', '.join(map(repr, others))}, not taken by default{average}; {how}")
    plain = {_WRAPPER_NAMES.sub("", key): value for key, value in weights.items()}
    if len(plain) == len(weights) and plain.keys() != weights.keys():
        weights = plain
        notes.append("'module.' and '_orig_mod.' removed from its names")
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in weights):
            weights = {key.removeprefix(prefix): value for key, value in weights.items()}
            notes.append(f"prefix {prefix!r} removed")
    if notes:
        print_log(f"{source}: {'; '.join(notes)}", "current")
    return weights


def shortest_places(weights: Mapping[str, Tensor], name: str) -> list[str]:
    """What stands before a network's entry ``name`` in a file, the shortest; several where it does not say which is meant."""
    places = [key.removesuffix(name) for key in weights if key.endswith(name)]
    places = [place for place in places if not place or place.endswith(".")]
    return teachers_alone([place for place in places if len(place) == min(map(len, places))])


def teachers_alone(places: Sequence[str]) -> list[str]:
    """Of a network's places of equal length in a file the teacher's, if there is exactly one; else all.

    Self-distillation (DINO's, DINOv2's) trains a student and publishes its teacher, as :func:`tensors_of` knows of entries.
    """
    teachers = [place for place in places if "teacher" in place.split(".")]
    return teachers if len(teachers) == 1 and len(set(map(len, places))) == 1 else list(places)


def average_entry(content: object, source: str) -> str:
    """The entry of a file that holds the moving average of its weights, to be given as ``entry`` of :func:`tensors_of`.

    Raises:
        WeightsError: it has none; the message names the sets of weights that it has.
    """
    if trained_weights(content) is not None:
        return "state_dict"
    places = _sets_of_tensors(content) if isinstance(content, Mapping) else {}
    found = next((place for place in places if _AVERAGE.search(place)), None)
    if found is None:
        known = ", ".join(map(repr, filter(None, places))) or "one alone, without a name"
        raise WeightsError(
            "no-average-of-weights",
            f"{source} holds no moving average of its weights (an entry such as 'state_dict_ema' or 'model_ema'); the sets "
            f"of weights in it: {known}. Leave ema=True out, or name one with entry=...",
        )
    return found


def trained_weights(content: object) -> dict[str, Tensor] | None:
    """Of a checkpoint that was written with mmengine's ``EMAHook``: the weights that the optimiser steps, by name; else None.

    The hook exchanges the two sets where it writes: 'state_dict' holds the average, 'ema_state_dict' the weights, with
    'module.' before their names and the count of the average's steps beside them (mmengine 0.10.7, ``ema_hook.py``).
    """
    other = content.get("ema_state_dict") if isinstance(content, Mapping) else None
    if not isinstance(other, Mapping) or "steps" not in other or "state_dict" not in cast(Mapping[str, object], content):
        return None
    return {key.removeprefix("module."): value for key, value in other.items() if key.startswith("module.")}


def _usual_place(content: Mapping[Any, Any]) -> str:
    """Where a training script usually keeps its weights: names joined by dots, '' for the file itself."""
    place: list[str] = []
    found = content
    for _ in range(3):
        inner = next((k for k in _WRAPPERS if isinstance(found, Mapping) and isinstance(found.get(k), Mapping)), None)
        if inner is None:
            break
        found = found[inner]
        place.append(inner)
    return ".".join(place)


def _sets_of_tensors(content: Mapping[Any, Any], depth: int = 4) -> dict[str, Mapping[Any, Any]]:
    """Every mapping of named tensors in a file, by its place; what optimisers and schedules keep is none."""
    found: dict[str, Mapping[Any, Any]] = {}
    if any(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        found[""] = content
    for key, value in content.items() if depth else ():
        if isinstance(value, Mapping) and isinstance(key, str) and not _NO_WEIGHTS.search(key):
            inside = _sets_of_tensors(value, depth - 1)
            found.update({f"{key}.{place}" if place else key: inner for place, inner in inside.items()})
    return found


def part_of_several(source: str) -> str | None:
    """A sentence about a file that is one part of a model in several files, by its name; None for other names."""
    part = re.search(r"-0*(\d+)-of-0*(\d+)", Path(source).name)
    if part is None or int(part[2]) < 2:
        return None
    indices = sorted(Path(source).expanduser().absolute().parent.glob("*.index.json"))
    index = f": {indices[0]}" if len(indices) == 1 else ""
    return (
        f"this is part {part[1]} of {part[2]}; give the index file (*.index.json) beside it, which names all parts{index}"
        + ("" if indices else ". There is none in its folder: download it too, with all parts")
    )


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The text metadata of a safetensors file; empty for other kinds."""
    if Path(path).suffix != ".safetensors":
        return {}
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise WeightsError(
            "file-not-safetensors", f"{path} is no intact safetensors file ({error}); copy or download it again"
        ) from error
