"""Tables of neighbours are int32 wherever their numbers fit, and change nothing that is computed with them."""

from collections import Counter

import pytest
import torch
from operation_counts import CountingOperations
from torch import Tensor

from hgkd.sparse import CellLayout, kernels
from hgkd.sparse.kernels import ConvGeometry
from hgkd.sparse.layout import NOTHING

VISIBLE = torch.tensor([[[1, 0, 1], [1, 1, 0]], [[0, 0, 1], [1, 0, 0]]]).bool()
STRIDED = ConvGeometry(4, (3, 3), (2, 2), (1, 1), (1, 1))  # its outputs of an input differ in number


@pytest.fixture
def wide(monkeypatch):
    """Switches layouts to the indices of maps that int32 cannot number."""

    def switch() -> None:
        monkeypatch.setattr(CellLayout, "_index_dtype", lambda self, size: torch.int64)

    return switch


def tables(layout: CellLayout) -> dict[str, Tensor]:
    near = (-1, 0, 1)
    return {
        "rows": layout.row_map(4),
        "neighbours": layout.neighbours(4, 4, 1, near, near),
        "outside told apart": layout.neighbours(4, 1, 1, (-2, -1, 0, 1, 2, 3, 4), near, outside=1),
        "mirrored": layout.neighbours(4, 4, 1, near, near, border="reflect"),
        "transposed": kernels._transposed_index(STRIDED, layout),
    }


def test_half_the_memory_and_the_same_numbers(wide) -> None:
    narrow = tables(CellLayout(VISIBLE, 8))
    assert Counter(table.dtype for table in narrow.values()) == {torch.int32: 5}
    wide()
    for name, table in tables(CellLayout(VISIBLE, 8)).items():
        assert table.dtype == torch.int64, name
        assert torch.equal(table, narrow[name].long()), name
        assert narrow[name].nbytes * 2 == table.nbytes, name


def test_as_many_numbers_as_int32_holds() -> None:
    layout = CellLayout(VISIBLE, 8)  # 6 cells, and the numbers of hidden ones and of those outside
    assert layout._index_dtype(NOTHING // 8) == torch.int32
    assert layout._index_dtype(NOTHING // 8 + 1) == torch.int64
    assert torch.iinfo(torch.int32).max + 1 >= 2 * NOTHING


@pytest.mark.parametrize(
    ("kernel", "geometry", "groups"),
    [
        ("columns", ConvGeometry(4, (3, 3), (1, 1), (1, 1), (1, 1)), 1),
        ("columns", STRIDED, 1),
        ("halo", ConvGeometry(4, (3, 3), (1, 1), (1, 1), (1, 1)), 1),
        ("halo", ConvGeometry(4, (3, 3), (1, 1), (1, 1), (1, 1), "reflect"), 1),
        ("map", ConvGeometry(4, (7, 7), (1, 1), (3, 3), (1, 1)), 8),
    ],
)
def test_values_and_gradients_are_those_of_int64(wide, kernel, geometry, groups) -> None:
    torch.manual_seed(0)
    packed, weight = torch.randn(6, 8, 4, 4), torch.randn(8, 8 // groups, *geometry.kernel)

    def computed() -> list[Tensor]:
        given = [packed.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = kernels.convolve(*given, None, groups, geometry, CellLayout(VISIBLE, 8), kernel)
        return [out, *torch.autograd.grad(out.square().sum(), given)]

    narrow = computed()
    wide()
    for found, expected in zip(narrow, computed(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_visible_cells_are_taken_out_of_the_map_as_it_is(memory) -> None:
    """With their gradients, twice differentiable; the whole map is not laid out by cells before."""
    layout = CellLayout(VISIBLE, 8)
    dense = torch.randn(2, 5, 8, 12, dtype=torch.float64).contiguous(memory_format=memory).requires_grad_()
    cells = dense.view(2, 5, 2, 4, 3, 4).permute(0, 2, 4, 1, 3, 5)[VISIBLE]
    found = layout.gather_cells(dense, 4)
    assert torch.equal(found, cells)
    assert found.is_contiguous(memory_format=torch.channels_last)
    probe = torch.randn_like(cells)
    assert torch.equal(*(torch.autograd.grad((out * probe).sum(), dense)[0] for out in (found, cells)))
    assert torch.autograd.gradgradcheck(lambda x: layout.gather_cells(x, 4).square(), dense)
    with CountingOperations() as counted:
        layout.gather_cells(dense.detach(), 4)
    assert (counted.seen["index"], counted.seen["index_select"]) == (1, 0)
