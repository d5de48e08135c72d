"""SparK's pixel objective by hand: cell statistics, patch order, positions, pictures, refusals."""

from types import SimpleNamespace

import pytest
import torch
from refusals import refused
from torch import Tensor, nn

from hgkd.objectives import Setup
from hgkd.objectives.masked.pixels import (
    PixelReconstruction,
    cell_statistics,
    join_cells,
    split_cells,
    squared_error_by_position,
    standardised_cells,
)
from hgkd.registry import MASKED_OBJECTIVES
from hgkd.sparse import CellLayout
from hgkd.structures import StudentOutput

VISIBLE = torch.tensor([[[True, False, False], [False, True, False]]])


HEADLESS = {"in_chans": 3, "give_pixels": lambda: False}  # a student without a pixel head of its own


def prepared(channels: int = 3, out_stride: int = 1, **options: object) -> PixelReconstruction:
    objective = PixelReconstruction(**options)
    objective.prepare(
        Setup(
            SimpleNamespace(**HEADLESS, decoded_channels=channels, out_stride=out_stride, cell=4),
            None,
            None,
            (2, 3),
        )
    )
    return objective


def identity(objective: PixelReconstruction) -> PixelReconstruction:
    assert objective.head is not None
    with torch.no_grad():
        objective.head.weight.copy_(torch.eye(*objective.head.weight.shape[:2])[:, :, None, None])
        objective.head.bias.zero_()
    return objective


def standardised(images: Tensor, cell: int) -> Tensor:
    """The target by naive loops, still as images."""
    target = torch.zeros_like(images)
    for b in range(images.shape[0]):
        for y in range(0, images.shape[2], cell):
            for x in range(0, images.shape[3], cell):
                block = images[b, :, y : y + cell, x : x + cell]
                values = block.flatten().tolist()
                mean = sum(values) / len(values)
                variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
                target[b, :, y : y + cell, x : x + cell] = (block - mean) / (variance + 1e-6) ** 0.5
    return target


def test_split_cells_keeps_channel_row_column_order() -> None:
    images = torch.randn(2, 3, 4, 6)
    cells = split_cells(images, 2)
    assert cells.shape == (2, 2, 3, 12)
    for b in range(2):
        for y in range(2):
            for x in range(3):
                for c in range(3):
                    for i in range(2):
                        for j in range(2):
                            assert cells[b, y, x, c * 4 + i * 2 + j] == images[b, c, y * 2 + i, x * 2 + j]
    assert join_cells(cells, 2).equal(images)


def test_cell_statistics_are_unbiased_over_all_colours() -> None:
    mean, std = cell_statistics(torch.tensor([0.0, 1.0, 2.0, 5.0]))
    assert mean.item() == 2.0
    assert std.item() == pytest.approx((14 / 3 + 1e-6) ** 0.5)


def test_error_by_hand() -> None:
    # a cell of one pixel, colours (0, 1, 2): mean 1, variance 1, target (-1, 0, 1)
    image = torch.tensor([0.0, 1.0, 2.0]).view(1, 3, 1, 1)
    error = squared_error_by_position(torch.zeros(1, 3, 1, 1), standardised_cells(image, 1))
    assert error.item() == pytest.approx(2 / 3, abs=1e-5)


def test_flat_cell_has_target_zero() -> None:
    assert standardised_cells(torch.full((1, 3, 2, 2), 0.5), 2).equal(torch.zeros(1, 12, 1, 1))


@pytest.mark.parametrize("supervise", ["masked", "visible", "all"])
def test_loss_against_naive_loops(supervise: str) -> None:
    images, decoded = torch.rand(1, 3, 8, 12), torch.randn(1, 3, 8, 12)
    losses = identity(prepared(supervise=supervise))(StudentOutput(decoded, images=images), None, CellLayout(VISIBLE, 4))
    assert list(losses) == ["reconstruction"]
    error = (decoded - standardised(images, 4)).square().mean(1)[0]
    by_cell = torch.tensor([[error[y : y + 4, x : x + 4].mean() for x in (0, 4, 8)] for y in (0, 4)])
    chosen = {"masked": ~VISIBLE[0], "visible": VISIBLE[0], "all": torch.ones(2, 3, dtype=torch.bool)}[supervise]
    torch.testing.assert_close(losses["reconstruction"], by_cell[chosen].mean(), atol=1e-5, rtol=1e-5)
    assert losses["reconstruction"].dtype == torch.float32


def test_zero_at_the_target_and_blind_to_visible_cells() -> None:
    images = torch.rand(1, 3, 8, 12)
    hidden = ~VISIBLE.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)
    decoded = torch.where(hidden, standardised(images, 4), torch.full((1, 3, 8, 12), 50.0))
    losses = identity(prepared())(StudentOutput(decoded, images=images), None, CellLayout(VISIBLE, 4))
    assert losses["reconstruction"].item() == pytest.approx(0.0, abs=1e-9)


def test_coarse_students_predict_the_pixels_of_a_place() -> None:
    objective = prepared(channels=5, out_stride=2)
    decoded = torch.randn(1, 5, 4, 6)
    picture = objective.predict(StudentOutput(decoded))
    assert picture.shape == (1, 3, 8, 12)
    values = objective.head(decoded)  # channel c * 4 + i * 2 + j is colour c at (i, j) inside the place
    for c in range(3):
        for i in range(2):
            for j in range(2):
                assert picture[:, c, i::2, j::2].equal(values[:, c * 4 + i * 2 + j])


def test_gradient_reaches_student_and_head() -> None:
    objective = prepared(channels=5, out_stride=2)
    decoded = torch.randn(1, 5, 4, 6, requires_grad=True)
    images = torch.rand(1, 3, 8, 12, requires_grad=True)
    objective(StudentOutput(decoded, images=images), None, CellLayout(VISIBLE, 4))["reconstruction"].backward()
    assert all(p.grad is not None and p.grad.any() for p in objective.parameters())
    positions = VISIBLE.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert (decoded.grad.abs().sum(1) > 0).equal(~positions)


def test_reconstruct_undoes_the_standardisation() -> None:
    images = torch.rand(1, 3, 8, 12)
    layout = CellLayout(VISIBLE, 4)
    perfect = identity(prepared()).reconstruct(StudentOutput(standardised(images, 4), images=images), layout)
    torch.testing.assert_close(perfect, images, atol=1e-5, rtol=1e-5)
    blank = identity(prepared()).reconstruct(StudentOutput(torch.zeros(1, 3, 8, 12), images=images), layout)
    assert blank[0, :, :4, :4].equal(images[0, :, :4, :4])  # visible: the image itself
    torch.testing.assert_close(blank[0, :, :4, 4:8], images[0, :, :4, 4:8].mean().expand(3, 4, 4))


def test_refusals() -> None:
    with refused(ValueError, "supervise-unknown"):
        PixelReconstruction(supervise="none")
    everything = CellLayout(torch.ones_like(VISIBLE), 4)
    with refused(ValueError, "nothing-supervised", "supervise='all'"):
        prepared()(StudentOutput(torch.zeros(1, 3, 8, 12), images=torch.zeros(1, 3, 8, 12)), None, everything)
    with refused(ValueError, "student-images-missing"):
        prepared()(StudentOutput(torch.zeros(1, 3, 8, 12)), None, CellLayout(VISIBLE, 4))


def test_is_registered_and_needs_no_teacher() -> None:
    objective = MASKED_OBJECTIVES.build({"type": "PixelReconstruction"})
    assert isinstance(objective, PixelReconstruction)
    assert isinstance(objective, nn.Module)
    assert objective.needs is None


def test_without_standardisation_the_target_is_what_the_student_gets() -> None:
    """DMAE's released script, and MAE without norm-pix: the loss against naive loops."""
    objective = PixelReconstruction(standardise=False)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1), torch.tensor([0.5, 0.25, 1.0]).view(1, 3, 1, 1)
    student = SimpleNamespace(**HEADLESS, decoded_channels=3, out_stride=1, cell=4, mean=mean, std=std)
    objective.prepare(Setup(student, None, None, (2, 3)))
    images, decoded = torch.rand(1, 3, 8, 12), torch.rand(1, 3, 8, 12)
    layout = CellLayout(VISIBLE, 4)
    loss = identity(objective)(StudentOutput(decoded, images=images), None, layout)["reconstruction"]
    errors = []
    for y in range(8):
        for x in range(12):
            if not VISIBLE[0, y // 4, x // 4]:
                for c in range(3):
                    target = (images[0, c, y, x] - mean[0, c, 0, 0]) / std[0, c, 0, 0]
                    errors.append(float(decoded[0, c, y, x] - target) ** 2)
    torch.testing.assert_close(loss, torch.tensor(sum(errors) / len(errors)))
    perfect = objective.reconstruct(StudentOutput((images - mean) / std, images=images), layout)
    torch.testing.assert_close(perfect, images)
    assert not objective.state_dict().keys() - {"head.weight", "head.bias"}, "checkpoints are as they were"
