"""Errors that users see, and the helper that suggests what they meant.

A user's mistake raises ``ValueError``, ``TypeError`` or ``FileNotFoundError`` (or a subclass from here) with the value,
what was expected and the remedy, before the first training step.
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

_Error = TypeVar("_Error", bound=Exception)


def coded(code: str, error: _Error) -> _Error:
    """The error with a stable name, in its attribute ``code``: words may be improved, a code stays.

    >>> coded("mask-ratio-too-high", ValueError("use at most 0.75")).code
    'mask-ratio-too-high'
    """
    error.code = code  # type: ignore[attr-defined]
    return error


def code_of(error: BaseException) -> str | None:
    """The stable name that :func:`coded` gave an error, or the one that caused it; None: it has none."""
    code: str | None = getattr(error, "code", None)
    return code if isinstance(code, str) or error.__cause__ is None else code_of(error.__cause__)


class WeightsError(ValueError):
    """A weight file is damaged, of another kind, or does not fit the network it was given for."""


class NoSparseRuleError(NotImplementedError):
    """An operation that mixes places has no sparse rule, so its result on a masked image would be wrong."""


class DataError(ValueError):
    """The images cannot be used: none found, or too many of them unreadable."""


class StoppedError(RuntimeError):
    """Work that had begun cannot be finished, and the message tells the user why and what to do."""


class DivergedError(StoppedError):
    """The loss is not a finite number any more, or far above where it began; training on would only damage the weights "
    "further."""


USER_ERRORS = (ValueError, TypeError, FileNotFoundError, FileExistsError, NoSparseRuleError, StoppedError)
"""What the tools print as one line and answer with exit code 2; anything else is a fault of ours and shows where it is."""


@contextmanager
def configured() -> Iterator[None]:
    """Context of building what a config describes, in which complaints of other packages count as the user's mistakes.

    mmengine, torch and timm answer a wrong value with ``assert``, an unknown name with ``KeyError``, an absent package with
    ``ImportError`` and a string in the place of a class with ``AttributeError``. Raised within this project such an error is a
    fault of ours, and goes on as it is.

    Raises:
        ValueError: with the words of the package.
    """
    try:
        yield
    except (AssertionError, AttributeError, ImportError, KeyError, TypeError) as error:
        text = str(error.args[0]) if error.args else ""
        if isinstance(error, TypeError):  # a user's mistake in any case, but these words are about nothing in the config
            if text != "'str' object is not callable":
                raise
            text = "a name (str) stands where a class is expected; set it in a Python config, not on the command line"
        if not text or _module_of(error).partition(".")[0] == "hgkd":
            raise
        package = _module_of(error).partition(".")[0]
        raise ValueError(f"the config cannot be built, says {package}: {' '.join(text.split())}") from error


def _module_of(error: BaseException) -> str:
    """Name of the module whose code raised an error."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return "" if place is None else str(place.tb_frame.f_globals.get("__name__", ""))


def nearest_names(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The ``count`` names of ``known`` that look most like ``name``, best first (may be empty)."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.4)


def unknown_name_message(what: str, name: str, known: Iterable[str]) -> str:
    """Message for a name that is not in a list, with the nearest ones.

    >>> unknown_name_message("student", "resnet81", ["resnet18", "vgg11"])
    "unknown student 'resnet81'; did you mean 'resnet18'?"
    """
    known = list(known)
    near = nearest_names(name, known)
    if near:
        hint = "did you mean " + ", ".join(repr(n) for n in near) + "?"
    else:
        hint = f"there are {len(known)} known names, e.g. " + ", ".join(repr(n) for n in known[:3])
    return f"unknown {what} {name!r}; {hint}"


def abbreviate(names: Sequence[object], most: int = 6) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(map(str, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
