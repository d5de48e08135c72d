"""Check of an error that a user sees: its type, its code and the values in its message, and not the words around them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hgkd.errors import code_of


@contextmanager
def refused(kind: type[BaseException] | tuple[type[BaseException], ...], code: str, *values: Any) -> Iterator[Any]:
    """Context in which an error of a type and code must be raised; as :func:`pytest.raises`, it gives what was caught.

    Args:
        code: of the error, or of the one that caused it.
        values: what its message names (numbers, files, keys, options), each standing alone: 0.7 is not in ``0.75``.
    """
    with pytest.raises(kind) as caught:
        yield caught
    message = " ".join(str(caught.value).split())
    assert code_of(caught.value) == code, f"{code_of(caught.value)}: {message}"
    absent = [value for value in values if not stands_alone(" ".join(str(value).split()), message)]
    assert not absent, f"{absent} not in: {message}"


def stands_alone(value: str, message: str) -> bool:
    """Whether a text has a value that is no part of a longer word or number.

    >>> stands_alone("0.7", "use 0.75"), stands_alone("0.7", "use 0.7."), stands_alone("k", "k=3")
    (False, True, True)
    """
    before = r"(?<![\w.])" if value[:1].isdigit() else r"(?<!\w)" if value[:1].isalpha() else ""
    after = r"(?!\w|\.\d)" if value[-1:].isalnum() else ""
    return re.search(before + re.escape(value) + after, message) is not None
