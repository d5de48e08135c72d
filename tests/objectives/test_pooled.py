"""PooledFeature by hand: the target, the positions that are averaged, gradients, refusals."""

from types import SimpleNamespace

import pytest
import torch
from refusals import refused
from torch.nn.functional import smooth_l1_loss

from hgkd.objectives import PooledFeature, Setup
from hgkd.objectives.masked.pooled import standardised_mean
from hgkd.sparse import CellLayout, PackedTensor
from hgkd.structures import TeacherInfo, TeacherOutput
from hgkd.students import SparseUNet

INFO = TeacherInfo("timm", width=6, depth=4, patch_size=16)
CELLS = torch.tensor([[[True, False], [False, True]], [[False, True], [False, False]]])


def prepared(channels=5, **options):
    objective = PooledFeature(**options)
    objective.prepare(Setup(SimpleNamespace(feature_channels=(2, channels)), INFO, (4, 4), (2, 2)))
    return objective


def test_target_by_loops():
    tokens = torch.randn(3, 6, 2, 2, dtype=torch.float64)
    means = []
    for image in tokens:
        mean = torch.stack([channel.sum() / 4 for channel in image])
        means.append((mean - mean.mean()) / (mean.var(unbiased=False) + 1e-6).sqrt())
    expected = torch.stack(means)
    for channel in range(6):
        column = expected[:, channel]
        expected[:, channel] = (column - column.mean()) / (column.var(unbiased=False) + 1e-6).sqrt()
    torch.testing.assert_close(standardised_mean(tokens), expected.float(), atol=1e-5, rtol=0)


def test_target_has_mean_0_and_variance_1_over_the_batch():
    target = standardised_mean(5.0 + torch.randn(16, 6, 3, 3))
    torch.testing.assert_close(target.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(target.var(0, unbiased=False), torch.ones(6), atol=1e-3, rtol=0)


def test_visible_places_of_the_last_level_are_averaged_and_all_places_of_the_teacher():
    student = SparseUNet("test_resnet", decoder_width=16, min_decoder_width=8).eval()
    student.prepare(64)
    objective = PooledFeature(block=-2, beta=1.0)
    objective.prepare(Setup(student, INFO, (4, 4), (2, 2)))
    assert objective.needs.blocks == (2,)
    assert not objective.needs.visible_only
    out = student(torch.rand(2, 3, 64, 64), CELLS)
    tokens = torch.randn(2, 6, 4, 4)
    loss = objective(out, TeacherOutput({2: tokens}, (4, 4)), out.layout)["pooled"]

    last = out.features[-1].to_dense(fill=torch.zeros(student.feature_channels[-1]))
    pooled = torch.stack([(last[0, :, 0, 0] + last[0, :, 1, 1]) / 2, last[1, :, 0, 1]])
    expected = smooth_l1_loss(objective.head(pooled), standardised_mean(tokens), beta=1.0)
    torch.testing.assert_close(loss, expected)


def test_with_visible_the_teachers_visible_tokens_are_averaged():
    objective = prepared(supervise="visible", block=2)
    tokens = torch.randn(2, 6, 4, 4)
    first, second = tokens
    shown = torch.stack(  # cells (0, 0) and (1, 1) of the first image, (0, 1) of the second; a cell has 2 x 2 tokens
        [(first[:, :2, :2].sum((1, 2)) + first[:, 2:, 2:].sum((1, 2))) / 8, second[:, :2, 2:].sum((1, 2)) / 4]
    )
    student_out = SimpleNamespace(features=[PackedTensor.pack(torch.randn(2, 5, 2, 2), CellLayout(CELLS, 1))])
    layout = CellLayout(CELLS, 32)
    loss = objective(student_out, TeacherOutput({2: tokens}, (4, 4)), layout)["pooled"]
    prediction = objective.head(student_out.features[0].mean(dim=(2, 3)))
    torch.testing.assert_close(loss, smooth_l1_loss(prediction, standardised_mean(shown[:, :, None, None]), beta=2.0))


def test_visible_and_all_are_the_same_where_nothing_is_hidden():
    tokens = torch.randn(2, 6, 4, 4)
    everywhere = torch.ones(2, 4, 4, dtype=torch.bool)
    torch.testing.assert_close(standardised_mean(tokens, everywhere), standardised_mean(tokens))


def test_it_trains_the_encoder_and_not_the_teacher():
    student = SparseUNet("test_resnet", decoder_width=16, min_decoder_width=8)
    student.prepare(64)
    objective = PooledFeature()
    objective.prepare(Setup(student, INFO, (4, 4), (2, 2)))
    out = student(torch.rand(2, 3, 64, 64), CELLS)
    tokens = torch.randn(2, 6, 4, 4, requires_grad=True)
    objective(out, TeacherOutput({3: tokens}, (4, 4)), out.layout)["pooled"].backward()
    assert tokens.grad is None
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.encoder.parameters())


def test_refusals():
    with refused(ValueError, "beta-not-positive", "0"):
        PooledFeature(beta=0)
    with refused(ValueError, "supervise-unknown", "'all', 'visible'", "'masked'"):
        PooledFeature(supervise="masked")
    with refused(ValueError, "grid-no-multiple-of-mask", "3 x 3", "2 x 2"):
        PooledFeature(supervise="visible").prepare(Setup(SimpleNamespace(feature_channels=(5,)), INFO, (3, 3), (2, 2)))
    with refused(ValueError, "objective-without-teacher"):
        PooledFeature().prepare(Setup(SimpleNamespace(feature_channels=(5,)), None, None, (2, 2)))
    with refused(ValueError, "teacher-block-out-of-range", "block", "4"):
        prepared(block=4)
    with refused(ValueError, "batch-of-one", "1"):
        standardised_mean(torch.randn(1, 6, 2, 2))
    with refused(ValueError, "batch-of-one", "1"):
        standardised_mean(torch.randn(3, 6, 2, 2), views=3)
    with pytest.raises(RuntimeError, match=r"prepare\(\) must be called before"):
        PooledFeature()(SimpleNamespace(), TeacherOutput({}, (1, 1)), None)
