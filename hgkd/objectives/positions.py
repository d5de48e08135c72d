"""Which positions an objective supervises: masks on finer grids, and means over the chosen positions.

``supervise`` is one of ``'masked'`` (hidden cells only, as SparK and MAE), ``'visible'`` and ``'all'``. Masks: True =
visible.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from hgkd.errors import InvalidValueError
from hgkd.masking import expand

if TYPE_CHECKING:
    from hgkd.sparse import CellLayout

SUPERVISE = ("masked", "visible", "all")


def check_supervise(supervise: str, allowed: tuple[str, ...] = SUPERVISE) -> str:
    """Return ``supervise``, or raise ValueError when it is none of those that an objective knows."""
    if supervise not in allowed:
        raise InvalidValueError(
            "supervise-unknown", f"supervise must be one of {', '.join(map(repr, allowed))}, got {supervise!r}"
        )
    return supervise


def visible_on(visible: Tensor, grid: tuple[int, int]) -> Tensor:
    """The visible cells repeated onto a finer grid: bool (B, h, w) -> bool (B, gh, gw), gh = g * h, gw = g * w.

    Raises:
        ValueError: the grid is no whole multiple of (h, w).
    """
    h, w = visible.shape[-2:]
    if grid[0] % h or grid[1] % w:
        raise InvalidValueError(
            "grid-no-multiple-of-mask", f"grid {grid[0]} x {grid[1]} is no whole multiple of the {h} x {w} mask grid"
        )
    return expand(visible, (grid[0] // h, grid[1] // w))


def supervised_positions(visible: Tensor, supervise: str) -> Tensor:
    """The positions that count: bool mask of the shape of ``visible`` (True = supervised)."""
    if supervise == "visible":
        return visible
    return ~visible if supervise == "masked" else visible | ~visible


def supervised_cells(layout: CellLayout, supervise: str) -> int:
    """Number of supervised cells in the batch, from the layout's counts (no device synchronisation).

    Raises:
        ValueError: there is none, so that the loss would be 0 / 0.
    """
    h, w = layout.grid
    cells = layout.batch * h * w
    count = {"masked": cells - layout.num_cells, "visible": layout.num_cells, "all": cells}[supervise]
    if count < 1:
        state = "hidden" if supervise == "masked" else "visible"
        raise InvalidValueError(
            "nothing-supervised",
            f"supervise={supervise!r}, but no cell of the batch is {state}, so nothing would be learnt; "
            "use supervise='all'" + (" or a mask_ratio above 0" if supervise == "masked" else ""),
        )
    return count


def mean_over(values: Tensor, positions: Tensor, count: float | Tensor) -> Tensor:
    """Sum of ``values`` (B, h, w) at ``positions`` (bool, same shape) divided by ``count``: a scalar.

    ``count`` may exceed the number of True positions: terms that share one mean are divided by their common number.
    """
    return values.masked_fill(~positions, 0.0).sum() / count
