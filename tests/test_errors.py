"""The examples in the docstrings of hgkd.errors."""

import doctest

from hgkd import errors


def test_the_examples_hold():
    found = doctest.testmod(errors)
    assert found.attempted > 3
    assert not found.failed
