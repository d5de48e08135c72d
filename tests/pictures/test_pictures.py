"""Token colours and picture grids."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from full_disk import full_disk
from refusals import refused

from hgkd.pictures.columns import colour_basis, hide_cells, picture_grid, token_colours
from hgkd.pictures.comparison import write_picture
from hgkd.pictures.confusion import write_class_report
from hgkd.pictures.files import save_picture
from hgkd.training import VisualizationHook
from hgkd.writing import WriteError


def test_three_clusters_get_three_colours_and_equal_tokens_equal_ones():
    directions = torch.eye(8)[:3] * torch.tensor([[3.0], [2.0], [1.0]])
    tokens = directions[torch.tensor([[0, 1, 2], [2, 0, 1]])].permute(2, 0, 1)[None]  # (1, 8, 2, 3)
    colours = token_colours(tokens, colour_basis(tokens))
    assert colours.shape == (1, 3, 2, 3)
    assert colours.min() >= 0
    assert colours.max() <= 1
    torch.testing.assert_close(colours[0, :, 0, 0], colours[0, :, 1, 1])
    assert (colours[0, :, 0, 0] - colours[0, :, 0, 1]).abs().max() > 0.5


def test_first_colour_follows_the_direction_that_varies_most():
    tokens = torch.zeros(1, 4, 1, 101)
    tokens[0, 2] = torch.linspace(-1, 1, 101)
    basis = colour_basis(tokens)
    torch.testing.assert_close(basis.directions[:, 0], torch.tensor([0.0, 0.0, 1.0, 0.0]))
    colours = token_colours(tokens, basis)
    assert torch.all(colours[0, 0, 0].diff() >= 0)
    assert colours[0, 0, 0, 0] == 0
    assert colours[0, 0, 0, -1] == 1
    assert torch.all(colours[0, 1:] == 0.5)  # nothing varies there


def test_basis_is_shared_between_teacher_and_student():
    teacher = torch.randn(2, 16, 4, 4)
    basis = colour_basis(teacher)
    torch.testing.assert_close(token_colours(teacher.clone(), basis), token_colours(teacher, basis))
    assert not torch.equal(token_colours(-teacher, basis), token_colours(teacher, basis))


def test_fewer_than_three_channels_and_constant_tokens_are_allowed():
    colours = token_colours(torch.ones(1, 2, 2, 2), colour_basis(torch.ones(1, 2, 2, 2)))
    assert torch.all(colours == 0.5)


def test_hidden_cells_are_grey_and_visible_ones_untouched():
    images = torch.rand(1, 3, 4, 4)
    shown = hide_cells(images, torch.tensor([[[True, False], [False, True]]]))
    torch.testing.assert_close(shown[..., :2, :2], images[..., :2, :2])
    assert torch.all(shown[..., :2, 2:] == 0.5)


def test_grid_places_rows_and_columns():
    picture = picture_grid({"a": torch.zeros(2, 3, 8, 8), "b": torch.ones(2, 3, 2, 2)})
    assert picture.dtype == np.uint8
    assert picture.shape == (14 + 2 * 10, 2 * 10, 3)
    assert np.all(picture[14:22, :8] == 0)
    assert np.all(picture[24:32, 10:18] == 255)


def test_refusals():
    with refused(ValueError, "token-maps-shape"):
        colour_basis(torch.zeros(3, 4))
    with refused(ValueError, "picture-counts-differ"):
        picture_grid({"a": torch.zeros(1, 3, 2, 2), "b": torch.zeros(2, 3, 2, 2)})


def _hook(folder, monkeypatch):
    monkeypatch.setattr("hgkd.training.hooks.pictures.distillation_columns", lambda *given: {"a": torch.rand(1, 3, 64, 64)})
    model = SimpleNamespace(student=None)
    dataset = [{"inputs": torch.zeros(3, 64, 64)}]
    run = SimpleNamespace(
        work_dir=str(folder), epoch=0, max_epochs=1, model=model, train_dataloader=SimpleNamespace(dataset=dataset)
    )
    hook = VisualizationHook()
    hook.before_train(run)
    hook.after_train_epoch(run)


WRITERS = {
    "confusion.png": lambda folder, _: write_class_report(folder, np.eye(3, dtype=int), "abc"),
    "compare.png": lambda folder, _: write_picture(
        [{"row": "a", "seed": 0, "scores": {"knn": {"top1": 1.0}}}], folder / "compare.png"
    ),
    "seen.png": lambda folder, _: save_picture({"a": torch.rand(1, 3, 64, 64)}, folder, "seen", "caption"),
    "pictures/epoch_1.png": _hook,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_no_half_picture(tmp_path, monkeypatch, name):
    with full_disk(500), refused(WriteError, "file-not-written", name):
        WRITERS[name](tmp_path, monkeypatch)
    assert [file for file in tmp_path.rglob("*.png") if os.path.isfile(file)] == []
