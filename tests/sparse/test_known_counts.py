"""Layouts whose number of visible cells is known: nothing waits for the device, and everything is as when counted."""

import timm
import torch
from operation_counts import CountingOperations
from refusals import refused
from torch import Tensor

from hgkd.sparse import CellLayout, sparsify
from hgkd.sparse.rectangle import RectangleTensor

VISIBLE = torch.tensor([[[True, False], [True, True]], [[False, True], [False, False]]])


def test_equals_the_counted_layout() -> None:
    known, counted = CellLayout(VISIBLE, 8, num_cells=4), CellLayout(VISIBLE, 8)
    assert known.num_cells == counted.num_cells == 4
    assert torch.equal(known._positions, counted._positions)
    for s in (1, 4):
        assert torch.equal(known.row_map(s), counted.row_map(s))


def test_another_number_is_refused() -> None:
    for wrong in (3, 5):
        with refused(ValueError, "visible-cells-miscounted", str(wrong)):
            CellLayout(VISIBLE, 8, num_cells=wrong)


def test_rectangles_that_are_known_equal_those_that_are_found() -> None:
    visible = torch.tensor([[[True, True, False]] * 2 + [[False] * 3], [[False] * 3] + [[False, True, True]] * 2])
    known, found = CellLayout(visible, 8, rectangle=(2, 2)), CellLayout(visible, 8)
    assert known.rectangle == found.rectangle == (2, 2)
    assert torch.equal(known._positions, found._positions)
    for wrong in ((1, 4), (2, 1), (3, 3)):
        with refused(ValueError, "visible-rectangles-differ", f"{wrong[0]} x {wrong[1]}"):
            CellLayout(visible, 8, rectangle=wrong)


def test_a_step_waits_for_nothing() -> None:
    """But for the check of the number, which is made on the CPU alone."""
    net = sparsify(timm.create_model("resnet18", num_classes=0, global_pool=""), 32).train()
    images = torch.randn(2, 3, 64, 64)

    def step(num_cells: int | None) -> tuple[Tensor, Tensor, CountingOperations]:
        net.zero_grad()
        with CountingOperations() as calls:
            out = net(images, visible=CellLayout(VISIBLE, 32, num_cells=num_cells)).plain
            out.square().mean().backward()
        gradient = net.conv1.weight.grad
        assert gradient is not None
        return out.detach(), gradient, calls

    (out, gradient, calls), (expected, expected_gradient, _) = step(4), step(None)
    assert (calls.seen["nonzero"], calls.waits) == (0, 1)
    assert torch.equal(out, expected)
    assert torch.equal(gradient, expected_gradient)


def test_a_step_of_rectangles_waits_for_nothing() -> None:
    """On another device than the CPU they are crops where they are said to be, and found by no look at the mask."""
    net = sparsify(timm.create_model("resnet18", num_classes=0, global_pool=""), 32).train()
    visible = torch.tensor([[[True, False], [True, False]], [[False, True], [False, True]]])
    with CountingOperations() as calls:
        out = net(torch.randn(2, 3, 64, 64), visible=CellLayout(visible, 32, rectangle=(2, 1)))
        out.plain.square().mean().backward()
    assert type(out) is RectangleTensor
    assert (calls.seen["nonzero"], calls.waits) == (0, 1)  # the check alone


def test_geometry_is_checked_once(monkeypatch) -> None:
    from hgkd.sparse import convolution

    convolution._checked_geometry.cache_clear()
    net = sparsify(timm.create_model("resnet18", num_classes=0, global_pool=""), 32).train()
    for _ in range(3):
        net(torch.randn(2, 3, 64, 64), visible=VISIBLE)
    info = convolution._checked_geometry.cache_info()
    assert info.misses < 15  # the geometries of a ResNet-18, not its 21 layers times 3
    assert info.hits + info.misses == 63
