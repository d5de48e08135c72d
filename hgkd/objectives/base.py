"""Base of the two kinds of objective, which are built in two steps."""

from __future__ import annotations

from torch import nn


class Objective(nn.Module):
    """A module whose layers depend on student and teacher, and are made by ``prepare`` before the optimiser is."""

    _prepared = False

    def require_prepared(self) -> None:
        """Raise RuntimeError when ``prepare`` was not called."""
        if not self._prepared:
            raise RuntimeError(f"{type(self).__name__}.prepare() must be called before the objective is used")
