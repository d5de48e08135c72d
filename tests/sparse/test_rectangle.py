"""Visible rectangles: found in the mask, computed as ordinary crops. Operations one by one: ``test_layer_rules.py``; families:
``test_families.py``."""

import pytest
import timm
import torch
from torch import Tensor, nn
from visible_rectangles import rectangles

from hgkd.masking import RandomMask, RectangleMask
from hgkd.sparse import CellLayout, MaskedTensor, PackedTensor, sparsify
from hgkd.sparse.rectangle import RectangleTensor


def test_a_network_sees_the_crop_as_the_ordinary_one_does() -> None:
    """The ordinary network, given the crop as its whole image, is what the masked one computes."""
    torch.manual_seed(0)
    network = timm.create_model("resnet18", num_classes=0, global_pool="").double().train()
    images = torch.randn(2, 3, 96, 128, dtype=torch.float64)
    visible = rectangles(2, 3, (3, 4), (1, 0), (0, 1))
    found = sparsify(network, 32)(images, visible=visible)
    expected = network(torch.stack([images[0, :, 32:96, 0:96], images[1, :, 0:64, 32:128]]))
    assert type(found) is RectangleTensor
    torch.testing.assert_close(found.plain, expected, rtol=1e-10, atol=1e-10)
    dense = found.to_dense(fill=7.0)
    torch.testing.assert_close(dense[0, :, 1:3, 0:3], expected[0], rtol=1e-10, atol=1e-10)
    assert (dense[~visible[:, None].expand_as(dense)] == 7.0).all()


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (rectangles(1, 2, (2, 3), (0, 0), (1, 1)), (1, 2)),
        (rectangles(2, 3, (2, 3), (0, 0)), (2, 3)),
        (torch.cat([rectangles(1, 2, (2, 3), (0, 0)), rectangles(2, 1, (2, 3), (0, 0))]), None),  # two shapes
        (torch.tensor([[[True, False, True], [True, False, True]]]), None),  # two stretches
        (torch.tensor([[[True, True, False], [True, False, False]]]), None),  # a corner is missing
        (torch.tensor([[[True, False, False], [False, True, False]]]), None),
        (torch.tensor([[[False, True, True], [False, True, True]], [[True, False, True], [True, False, True]]]), None),
        (torch.tensor([[[True], [False], [True]], [[True], [True], [False]]]), None),
    ],
)
def test_which_masks_are_rectangles(visible: Tensor, expected: tuple[int, int] | None) -> None:
    assert CellLayout(visible, 4).rectangle == expected


def test_gather_takes_rectangles_as_crops_and_nothing_else() -> None:
    layers, images = nn.Conv2d(3, 4, 3, padding=1), torch.randn(2, 3, 12, 12)
    corners = rectangles(2, 2, (3, 3), (0, 1), (1, 0))
    assert type(sparsify(layers, 4).pack(images, corners)) is RectangleTensor
    assert type(sparsify(layers, 4, renormalize=True).pack(images, corners)) is RectangleTensor
    assert type(sparsify(layers, 4, "masked").pack(images, corners)) is MaskedTensor
    corners[0, 2, 0] = True
    assert type(sparsify(layers, 4).pack(images, corners)) is PackedTensor
    assert type(sparsify(layers, 4).pack(images, torch.ones(2, 3, 3, dtype=torch.bool))) is MaskedTensor


@pytest.mark.parametrize("grid", [(3, 3), (7, 7), (4, 6)])
def test_every_batch_of_a_rectangle_mask_is_one(grid: tuple[int, int]) -> None:
    mask = RectangleMask(0.6)
    assert mask.rectangle(grid) is None
    for _ in range(5):
        drawn = mask(4, grid, device="cpu")
        shape = CellLayout(drawn, 4).rectangle
        assert shape is not None
        assert shape[0] * shape[1] == int(drawn[0].sum())
        assert mask.rectangle(grid) == shape
    assert CellLayout(RandomMask(0.6)(16, (7, 7), device="cpu"), 4).rectangle is None


def test_drop_path_and_gates_act_image_by_image() -> None:
    """Operands of one value an image, which the other backend repeats for each cell."""
    images, visible = torch.randn(3, 4, 8, 8), rectangles(1, 2, (2, 2), (0, 0), (1, 0), (0, 0))
    gate, layout = torch.rand(3, 4, 1, 1), CellLayout(visible, 4)
    found, expected = ((kind.pack(images, layout) * gate).to_dense() for kind in (RectangleTensor, MaskedTensor))
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="does not fit a batch of 3 images"):
        RectangleTensor.pack(images, layout) * gate[:2]
