"""PooledFeature by hand: the target, the places that are averaged, gradients, refusals."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import smooth_l1_loss

from hgkd.objectives import PooledFeature
from hgkd.objectives.hgkd import layer_norm0
from hgkd.objectives.pooled import RunningWhitening
from hgkd.structures import TeacherInfo, TeacherOutput
from hgkd.students import SparseUNet

INFO = TeacherInfo("timm", width=6, depth=4, patch_size=16)
CELLS = torch.tensor([[[True, False], [False, True]], [[False, True], [False, False]]])


def prepared(channels=5, **options):
    objective = PooledFeature(**options)
    objective.prepare(SimpleNamespace(feature_channels=(2, channels)), INFO, (4, 4), (2, 2))
    return objective


def test_few_rows_are_standardised_by_loops():
    whitening = RunningWhitening(3, floor=1.0)  # only the identity
    rows = torch.randn(7, 3, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.1]) + 5.0
    expected = torch.stack([(c - c.mean()) / c.var(unbiased=False).sqrt() for c in rows.unbind(1)], 1)
    torch.testing.assert_close(whitening(rows), expected.float(), atol=1e-5, rtol=0)


def test_many_rows_lose_their_correlation():
    torch.manual_seed(0)
    mixing = torch.randn(6, 6, dtype=torch.float64)
    rows = torch.randn(20_000, 6, dtype=torch.float64) @ mixing + 3.0
    white = RunningWhitening(6, floor=0.0)(rows).double()
    torch.testing.assert_close(white.mean(0), torch.zeros(6, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(white.t() @ white / len(white), torch.eye(6, dtype=torch.float64), atol=2e-2, rtol=0)
    assert (np.corrcoef(rows.numpy().T) - np.eye(6)).max() > 0.3, "the rows themselves are correlated"


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_batches_add_up_to_the_whole(sizes):
    rows = torch.randn(sum(sizes), 4)
    together, piecewise = RunningWhitening(4), RunningWhitening(4)
    together(rows)
    for part in rows.split(sizes):
        piecewise(part)
    for name, value in together.state_dict().items():
        torch.testing.assert_close(piecewise.state_dict()[name], value, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(together.eval()(rows), piecewise.eval()(rows), atol=1e-4, rtol=1e-4)


def test_a_constant_channel_becomes_0():
    rows = torch.randn(5, 3)
    rows[:, 1] = 2.0
    white = RunningWhitening(3)(rows)
    assert torch.isfinite(white).all()
    assert white[:, 1].abs().max() < 1e-3


def test_statistics_stand_still_in_eval_mode_and_are_in_the_checkpoint():
    objective = prepared()
    objective.whitening(torch.randn(8, 6))
    before = {k: v.clone() for k, v in objective.state_dict().items()}
    assert {"whitening.count", "whitening.mean", "whitening.moment"} <= set(before)
    objective.eval()
    objective.whitening(torch.randn(8, 6))
    for name, value in objective.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_visible_places_of_the_last_level_are_averaged_and_all_places_of_the_teacher():
    student = SparseUNet("test_resnet", decoder_width=16, min_decoder_width=8).eval()
    student.prepare(64)
    objective = PooledFeature(block=-2, beta=1.0)
    objective.prepare(student, INFO, (4, 4), (2, 2))
    assert objective.needs.blocks == (2,)
    assert not objective.needs.visible_only
    out = student(torch.rand(2, 3, 64, 64), CELLS)
    tokens = torch.randn(2, 6, 4, 4)
    loss = objective(out, TeacherOutput({2: tokens}, (4, 4)), out.layout)["pooled"]

    last = out.features[-1].to_dense(fill=torch.zeros(student.feature_channels[-1]))
    pooled = torch.stack([(last[0, :, 0, 0] + last[0, :, 1, 1]) / 2, last[1, :, 0, 1]])
    target = RunningWhitening(6)(layer_norm0(tokens.mean((2, 3), keepdim=True)).flatten(1))
    expected = smooth_l1_loss(objective.head(pooled), target, beta=1.0)
    torch.testing.assert_close(loss, expected)


def test_it_trains_the_encoder_and_not_the_teacher():
    student = SparseUNet("test_resnet", decoder_width=16, min_decoder_width=8)
    student.prepare(64)
    objective = PooledFeature()
    objective.prepare(student, INFO, (4, 4), (2, 2))
    out = student(torch.rand(2, 3, 64, 64), CELLS)
    tokens = torch.randn(2, 6, 4, 4, requires_grad=True)
    objective(out, TeacherOutput({3: tokens}, (4, 4)), out.layout)["pooled"].backward()
    assert tokens.grad is None
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in student.encoder.parameters())


def test_refusals():
    with pytest.raises(ValueError, match="beta must be above 0, got 0"):
        PooledFeature(beta=0)
    with pytest.raises(ValueError, match="needs a teacher"):
        PooledFeature().prepare(SimpleNamespace(feature_channels=(5,)), None, None, (2, 2))
    with pytest.raises(ValueError, match=r"block 4 is out of range: the teacher has depth 4"):
        prepared(block=4)
    with pytest.raises(RuntimeError, match=r"prepare\(\) must be called before"):
        PooledFeature()(SimpleNamespace(), TeacherOutput({}, (1, 1)), None)
