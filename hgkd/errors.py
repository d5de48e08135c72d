"""Errors that users see, and the helper that suggests what they meant.

A user's mistake raises ``ValueError``, ``TypeError`` or ``FileNotFoundError``, by a subclass from here, with a code, the value,
what was expected and the remedy, before the first training step.
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class Refusal(Exception):
    """Base of the errors that users see: a stable code, and words that may be improved.

    Every class below is this and the builtin exception that Python's habits ask for, so ``except ValueError`` catches an
    :class:`InvalidValueError`. ``hgkd doctor errors`` and docs/reference/errors.md list all codes.

    >>> raise InvalidValueError("mask-ratio-too-high", "mask_ratio 0.95 leaves no visible cell; use at most 0.75")
    Traceback (most recent call last):
    hgkd.errors.InvalidValueError: mask_ratio 0.95 leaves no visible cell; use at most 0.75

    Args:
        code: name of the cause in kebab-case; where two places refuse for one cause, they share it.
        message: the value, what was expected, and the remedy. Without it ``code`` is the message and there is no code: torch
            raises the error of a process that reads images anew, from its type and one text.
    """

    def __init__(self, code: str, message: str | None = None) -> None:
        super().__init__(code if message is None else message)
        self.code = None if message is None else code

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self),) if self.code is None else (self.code, str(self))


def code_of(error: BaseException) -> str | None:
    """The code of an error, or of the one that caused it; None: it has none."""
    code = error.code if isinstance(error, Refusal) else None
    return code if code is not None or error.__cause__ is None else code_of(error.__cause__)


class InvalidValueError(Refusal, ValueError):
    """A value that cannot be used."""


class InvalidTypeError(Refusal, TypeError):
    """A value of a type that cannot be used."""


class MissingFileError(Refusal, FileNotFoundError):
    """A file or folder that is not there."""


class ExistingFileError(Refusal, FileExistsError):
    """A file or folder that stands where another is to be written."""


class MissingPackageError(Refusal, ModuleNotFoundError):
    """A Python package that is needed and not installed."""


class MissingOperatorError(Refusal, NotImplementedError):
    """An operator of mmcv that is called and has no replacement here."""


class WeightsError(Refusal, ValueError):
    """A weight file is damaged, of another kind, or does not fit the network it was given for."""


class NoSparseRuleError(Refusal, NotImplementedError):
    """An operation that mixes places has no sparse rule, so its result on a masked image would be wrong."""


class DataError(Refusal, ValueError):
    """The images cannot be used: none found, or too many of them unreadable."""


class StoppedError(Refusal, RuntimeError):
    """Work that had begun cannot be finished, and the message tells the user why and what to do."""


class DivergedError(StoppedError):
    """The loss is no finite number any more, or far above where it began; more steps would only damage the weights."""


USER_ERRORS = (Refusal, ValueError, TypeError, FileNotFoundError, FileExistsError)
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
        raise InvalidValueError(
            "config-not-buildable", f"the config cannot be built, says {package}: {' '.join(text.split())}"
        ) from error


def _module_of(error: BaseException) -> str:
    """Name of the module whose code raised an error."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return "" if place is None else str(place.tb_frame.f_globals.get("__name__", ""))


def first_line(error: BaseException) -> str:
    """The first line of what an error says, for a message; its type, where it says nothing.

    >>> first_line(RuntimeError("out of memory\\nstack:"))
    'out of memory'
    >>> first_line(AssertionError())
    'AssertionError'
    """
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


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


def check_counts(**counts: int) -> None:
    """Raise ValueError for the first of some options that is below 1."""
    for name, value in counts.items():
        if value < 1:
            raise InvalidValueError("count-not-positive", f"{name} must be 1 or more, got {value}")
