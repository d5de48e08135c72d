"""Errors that users see, and the helper that suggests what they meant.

A user's mistake raises ``ValueError``, ``TypeError`` or ``FileNotFoundError`` (or a subclass from here) with the value,
what was expected and the remedy, before the first training step.
"""

import difflib
from collections.abc import Iterable


class WeightsError(ValueError):
    """A weight file is damaged, of another kind, or does not fit the network it was given for."""


class NoSparseRuleError(NotImplementedError):
    """An operation that mixes places has no sparse rule, so its result on a masked image would be wrong."""


class DataError(ValueError):
    """The images cannot be used: none found, or too many of them unreadable."""


class StoppedError(RuntimeError):
    """Work that had begun cannot be finished, and the message tells the user why and what to do."""


USER_ERRORS = (ValueError, TypeError, FileNotFoundError, FileExistsError, NoSparseRuleError, StoppedError)
"""What the tools print as one line and answer with exit code 2; anything else is a fault of ours and shows where it is."""


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
