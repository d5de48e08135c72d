"""Gradient shares by hand, that measuring changes nothing, and the two warnings."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from mmengine.optim import OptimWrapper
from refusals import refused
from teaching import ARCH
from test_hooks import Log
from torch import nn

from hgkd.distillers import MAEPretraining, MaskedDistiller
from hgkd.objectives.distances import smooth_l1_by_position
from hgkd.objectives.loss_terms import LossTerm
from hgkd.training.hooks.terms import TermShareHook, gradient_shares


def test_shares_by_hand():
    a, b = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor(3.0))
    losses = {
        "both": 3 * a.sum() / 2**0.5 + 4 * b,  # gradient (3, 3) / sqrt 2 and 4: norm 5
        "one": (2 * b) ** 2 / 24 * 5,  # gradient 5
        "none": torch.tensor(7.0),
        "other": nn.Parameter(torch.tensor(1.0)) * 2,
    }
    shares = gradient_shares(losses, [a, b])
    assert shares == pytest.approx({"both": 0.5, "one": 0.5, "none": 0.0, "other": 0.0})
    assert a.grad is None


def test_loss_of_the_mean_by_hand():
    # one channel; the supervised targets are 0 and 4, their mean 2: smooth L1 of 2 at beta 2 is 1
    target = torch.tensor([[0.0, 100.0], [4.0, 100.0]]).view(1, 1, 2, 2)
    positions = torch.tensor([[[True, False], [True, False]]])
    found = LossTerm(torch.zeros_like(target), target, positions, 2, smooth_l1_by_position, weight=3.0)
    assert found.loss_of_mean().item() == pytest.approx(3.0)
    assert found.loss().item() == pytest.approx(3.0 * (0.0 + 3.0) / 2)  # |0| and |4| - 1


def make(objectives, tmp_path, student=None):
    teacher = MAEPretraining({**ARCH, "decoder_depth": 1}, 64).save_teacher(tmp_path / "mae.safetensors")
    return MaskedDistiller(
        student=student or dict(type="SparseUNet", encoder="test_resnet", decoder_width=16, min_decoder_width=8),
        objectives=objectives,
        mask=dict(type="RandomMask", mask_ratio=0.5),
        image_size=64,
        teacher=dict(type="MAETeacher", checkpoint=str(teacher), allow_random=True),
    )


def run_with(model):
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.0))
    log = Log()
    return SimpleNamespace(model=model, iter=0, logger=log, message_hub=log, optim_wrapper=wrapper)


BATCH = {"inputs": torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8), "index": torch.arange(4)}
MIX = {
    "hgkd": dict(type="HGKD", supervise="all"),
    "g2sd": dict(type="G2SD", decoder_block=0),
    "pixels": dict(type="PixelReconstruction"),
    "mgd": dict(type="MGD", weight=1e-6),
}


def test_every_term_of_a_mix_is_measured_and_the_weak_one_called_out(tmp_path):
    run = run_with(make(MIX, tmp_path))
    hook = TermShareHook(interval=50, patience=100)
    hook.before_train(run)
    for run.iter in range(0, 151, 25):
        hook.before_train_iter(run, 0, BATCH)
    scalars = run.message_hub.scalars
    names = {"hgkd_distill", "g2sd_decoder", "pixels_reconstruction", "mgd_generation"}
    assert set(scalars) == {f"train/{name}_{kind}" for name in names for kind in ("share", "vs_mean")}
    assert sum(scalars[f"train/{name}_share"] for name in names) == pytest.approx(1.0)
    shares = [text for text in run.logger.warnings if "share" in text]
    assert len(shares) == 1
    assert shares[0].startswith(
        "mgd_generation_loss has done nothing so far, from step 0 to 100: its share of the gradient is 0.00%"
    )


def test_measuring_leaves_the_training_as_it_is(tmp_path):
    model = make(MIX, tmp_path)
    run = run_with(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(4)
    expected = model(BATCH["inputs"], mode="loss")
    model.load_state_dict(before)
    torch.manual_seed(4)
    TermShareHook(interval=1).before_train_iter(run, 0, BATCH)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(model(BATCH["inputs"], mode="loss"), expected, rtol=0, atol=0)


class Fixed(nn.Module):
    """Stands for a distiller whose terms are as told."""

    def __init__(self, ratio):
        super().__init__()
        self.student = nn.Linear(2, 1)
        self.ratio = ratio

    def data_preprocessor(self, data, training):
        return data

    def term_report(self, inputs, index):
        loss = self.student.weight.sum() * 0 + self.ratio
        return {"a_loss": loss}, {"a_loss": torch.tensor(2.0)}


def run_of(model):
    log = Log()
    wrapper = SimpleNamespace(optim_context=lambda _: nullcontext())
    return SimpleNamespace(model=model, iter=0, logger=log, message_hub=log, optim_wrapper=wrapper), log


def test_a_term_no_better_than_the_mean_is_called_out_once_and_only_then():
    model = Fixed(2.5)
    run, log = run_of(model)
    hook = TermShareHook(interval=10, patience=20, min_share=0.0)
    data = {"inputs": None}
    hook.before_train_iter(run, 0, data)
    model.ratio, run.iter = 1.5, 10  # better than the mean once: the count starts anew
    hook.before_train_iter(run, 0, data)
    model.ratio = 2.5
    for run.iter in (20, 30, 40, 50, 60):
        assert len(log.warnings) == (run.iter > 40)
        hook.before_train_iter(run, 0, data)
    assert len(log.warnings) == 1
    assert (
        "a_loss has done nothing so far, from step 20 to 40: it is 1.25 times the loss of predicting the mean"
        in log.warnings[0]
    )
    assert log.scalars == {"train/a_share": 0.0, "train/a_vs_mean": 1.25}


def test_a_term_that_still_falls_is_called_out_only_when_it_stops():
    model = Fixed(4.0)
    run, log = run_of(model)
    hook = TermShareHook(interval=10, patience=20, min_share=0.0)
    for run.iter, model.ratio in ((0, 4.0), (10, 3.8), (20, 3.5), (30, 3.4), (40, 3.2), (50, 3.1)):
        hook.before_train_iter(run, 0, {"inputs": None})
    assert not log.warnings
    for run.iter, model.ratio in ((60, 3.1), (70, 3.1), (80, 3.1)):
        hook.before_train_iter(run, 0, {"inputs": None})
    (warning,) = log.warnings
    assert "from step 40 to 60: it is 1.55 times" in warning


def test_refusals():
    with refused(ValueError, "count-not-positive", "1", "0", "200"):
        TermShareHook(interval=0)
    with refused(ValueError, "min-share-out-of-range", "min_share", "0", "1", "1.0"):
        TermShareHook(min_share=1.0)
    with refused(ValueError, "hook-without-distillation", "Linear"):
        TermShareHook().before_train(SimpleNamespace(model=nn.Linear(1, 1)))
