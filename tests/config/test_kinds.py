"""Values against annotations: what fits, where it does not, and how that is said."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Optional, Union

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hgkd.config.kinds import fits, kinds_of, misfit, words_of

PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@pytest.mark.parametrize(
    ("value", "wanted", "fit"),
    [
        (3, int, True),
        (1e3, int, True),  # typed, 1e3 is a float
        (1.5, int, False),
        (float("inf"), int, False),
        (True, int, False),
        ("3", int, False),
        (3, float, True),
        ("2e-5", float, False),  # as YAML reads it
        (0, bool, True),
        (2, bool, False),
        ("yes", bool, False),
        (5, str, False),
        (None, str, False),
        (None, str | None, True),
        (None, Optional[str], True),  # noqa: UP045 (as mmengine writes it)
        ([1, 2], Union[dict, list], True),  # noqa: UP007
        ("a", str | os.PathLike[str], True),
        (["a"], str | os.PathLike[str], False),
        ([1, 2.5], Sequence[float], True),
        ((1, "a"), Sequence[float], False),
        ("12", Sequence[str], False),
        ({"a": 1}, Mapping[str, Any], True),
        ({"a": 1}, Mapping[str, Mapping[str, Any]], False),
        ({"a": None}, dict[str, dict[str, Any] | None] | None, True),
        ([], dict, False),
        ("measure", Literal["measure", "rule"], True),
        ("fast", Literal["measure", "rule"], False),
        ("resnet18", nn.Module | dict, False),
        ({"type": "Identity"}, nn.Module, True),  # is built before it is handed on
        ({"type": "Identity"}, str, False),
        ({"name": "Identity"}, nn.Module, False),
        (nn.Identity(), str, True),  # an object: its reader judges
        ("x", Any, True),
        ("x", object, True),
    ],
)
def test_by_hand(value, wanted, fit):
    assert fits(value, wanted) is fit
    assert (misfit("place", value, wanted) is None) is fit


@given(PLAIN | st.lists(PLAIN) | st.dictionaries(st.text(), PLAIN))
def test_a_value_fits_its_own_type_and_a_union_fits_what_one_of_it_does(value):
    own = None if value is None else type(value)
    assert fits(value, own) or value in (float("inf"), -float("inf"))
    for wanted in (int, str, float, bool, list, dict):
        assert fits(value, wanted | None) == (fits(value, wanted) or value is None)


def test_the_innermost_place_is_told():
    assert misfit("model", {"a": {}, "b": 5}, Mapping[str, Mapping[str, Any]]) == ("model.b", 5, Mapping[str, Any])
    assert misfit("mask_ratio", [0.1, "high"], float | Sequence[float]) == ("mask_ratio.1", "high", float)
    assert misfit("model", 5, Mapping[str, Any] | None) == ("model", 5, Mapping[str, Any] | None)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (int, "a whole number"),
        (str | None, "a text or None"),
        (Optional[int], "a whole number or None"),  # noqa: UP045
        (float | Sequence[float], "a number or a list, each of it a number"),
        (Mapping[str, Any] | None, "a dict or None"),
        (nn.Module | dict, "Module or a dict"),
        (Literal["a", "b"], "'a' or 'b'"),
        (Sequence[Sequence[int]], "a list"),
        (None, "None"),
    ],
)
def test_words(wanted, words):
    assert words_of(wanted) == words


def test_kinds_of_a_class_are_those_of_its_constructor_and_what_cannot_be_evaluated_is_none():
    class Part:
        def __init__(self, size: int, name="x") -> None: ...

    def unknown(x: "NotThere") -> None: ...  # noqa: F821

    assert kinds_of(Part) == {"size": int}
    assert kinds_of(unknown) == {}
