"""The feature cache: right values, one teacher pass a picture, and no stale content."""

import pytest
import torch
from torch import Tensor, nn

from hgkd.structures import TeacherOutput
from hgkd.teachers.cache import FeatureCache, FeatureStore, weights_digest


def features(rows: Tensor) -> Tensor:
    """Made-up tokens (N, 4, 2, 2) that differ from row to row and are exact in fp16."""
    return rows.float().view(-1, 1, 1, 1) + torch.arange(16.0).view(1, 4, 2, 2) / 16


class Counting:
    """Stands for the teacher and counts the pictures it is shown."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.shown = rows, 0

    def __call__(self, selection: Tensor) -> TeacherOutput:
        self.shown += int(selection.sum())
        return TeacherOutput(tokens={3: features(self.rows[selection])}, grid=(2, 2))


def test_each_picture_is_computed_once(tmp_path) -> None:
    index, flipped = torch.tensor([4, 1, 4]), torch.tensor([False, True, True])
    rows = 2 * index + flipped
    for shown in (3, 0):  # the second time in a new cache: another run with the same identity
        cache = FeatureCache(tmp_path, {"teacher": "a"}, 5, [3], 4, (2, 2))
        teacher = Counting(rows)
        found = cache.tokens(index, flipped, [3], teacher)
        assert torch.equal(found.tokens[3], features(rows))
        assert teacher.shown == shown
    teacher = Counting(torch.tensor([8, 0]))
    found = cache.tokens(torch.tensor([4, 0]), torch.tensor([False, False]), [3], teacher)
    assert teacher.shown == 1, "only the picture that was never met"
    assert torch.equal(found.tokens[3], features(torch.tensor([8, 0])))


def test_another_identity_is_another_store(tmp_path) -> None:
    first = FeatureStore(tmp_path, {"teacher": "a"}, 2, (4, 2, 2))
    first.write(torch.tensor([0]), features(torch.tensor([0])))
    second = FeatureStore(tmp_path, {"teacher": "b"}, 2, (4, 2, 2))
    assert second.path != first.path
    assert second.missing(torch.tensor([0])).all()


def test_features_beyond_fp16_are_refused(tmp_path) -> None:
    store = FeatureStore(tmp_path, {}, 1, (1, 1, 1))
    with pytest.raises(ValueError, match="do not fit the store's fp16"):
        store.write(torch.tensor([0]), torch.full((1, 1, 1, 1), 1e6))
    assert store.missing(torch.tensor([0])).all()


def test_digests_see_what_changes() -> None:
    layer = nn.Linear(2, 2)
    before = weights_digest(layer)
    assert before == weights_digest(layer)
    with torch.no_grad():
        layer.weight[0, 0] += 1e-3
    assert weights_digest(layer) != before


def test_digests_do_not_see_how_weights_lie_in_memory() -> None:
    layers = nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2))  # with a counter, which has no axes
    before = weights_digest(layers)
    assert weights_digest(layers.to(memory_format=torch.channels_last)) == before
    assert not layers[0].weight.is_contiguous()
