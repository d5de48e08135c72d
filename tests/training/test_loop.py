"""Guarded updates, signals and seeds."""

import math
import os
import random
import signal
import threading

import numpy as np
import pytest
import torch
from mmengine.optim import AmpOptimWrapper, LinearLR, OptimWrapper
from operation_counts import CountingOperations
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

from hgkd.training.loop import GuardedOptimWrapper, StopSignals, ignore_first_signal, seed_step


def draws(seed, rank, step):
    seed_step(seed, rank, step)
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_step_draws_the_same_whatever_was_drawn_before():
    first = draws(0, 1, 5)
    torch.manual_seed(99)
    assert draws(0, 1, 5) == first
    others = [draws(*place) for place in ((1, 1, 5), (0, 0, 5), (0, 1, 6), (0, 5, 1))]
    assert len({first, *others}) == 5


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.linear = nn.Linear(3, 1)

    def step(self, x, guard):
        with guard.optim_context(self):
            loss = self.linear(self.norm(x)).square().mean()
        guard.update_params(loss)
        return guard.settle({"loss": loss})["loss"] if isinstance(guard, GuardedOptimWrapper) else float(loss.detach())


def make(accumulated=1):
    torch.manual_seed(0)
    net = Net()
    wrapper = OptimWrapper(torch.optim.AdamW(net.parameters()), accumulative_counts=accumulated, clip_grad=dict(max_norm=1.0))
    return net, wrapper, GuardedOptimWrapper(wrapper, net)


def state(net, wrapper):
    optimiser = wrapper.optimizer.state_dict()["state"]
    return [v.clone() for v in net.state_dict().values()] + [v.clone() for s in optimiser.values() for v in s.values()]


BAD = torch.tensor([[1.0, float("inf"), 0.0], [0.0, 1.0, 2.0]])


def test_good_steps_are_those_of_the_wrapper_alone():
    net, _, guard = make()
    other, alone, _ = make()
    for _ in range(3):
        x = torch.randn(4, 3)
        net.step(x, guard)
        other.step(x, alone)
        assert (guard.updated, guard.skipped) == (True, False)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_bad_step_changes_nothing_not_even_the_running_statistics():
    net, wrapper, guard = make()
    net.step(torch.randn(4, 3), guard)
    before = state(net, wrapper)
    assert not math.isfinite(net.step(BAD, guard))
    assert (guard.updated, guard.skipped) == (False, True)
    after = state(net, wrapper)
    # BatchNorm's counter of batches is no floating-point number and of no consequence with a momentum
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True) if a.is_floating_point())
    net.step(torch.randn(4, 3), guard)
    assert guard.updated


def test_a_gradient_that_is_not_finite_counts_even_when_the_loss_is_finite():
    net, wrapper, guard = make()
    before = state(net, wrapper)
    with guard.optim_context(net):
        root = net.linear.bias.square().sum().sub(net.linear.bias.detach().square().sum()).sqrt()  # 0, of slope infinity
    assert root == 0
    guard.update_params(root)
    guard.settle({})
    assert guard.skipped
    assert all(torch.equal(a, b) for a, b in zip(before, state(net, wrapper), strict=True))


def test_one_bad_part_spoils_an_accumulated_update_and_all_of_it_is_undone():
    net, wrapper, guard = make(accumulated=2)
    net.step(torch.randn(4, 3), guard)
    assert (guard.updated, guard.skipped) == (False, False)
    net.step(torch.randn(4, 3), guard)
    before = state(net, wrapper)
    net.step(BAD, guard)
    net.step(torch.randn(4, 3), guard)
    assert guard.skipped
    assert all(torch.equal(a, b) for a, b in zip(before, state(net, wrapper), strict=True) if a.is_floating_point())
    for _ in range(2):
        net.step(torch.randn(4, 3), guard)
    assert guard.updated


@pytest.mark.skipif(torch.cuda.is_available(), reason="the scaler is enabled there")
def test_overflowing_gradients_are_the_business_of_the_loss_scaler(monkeypatch):
    monkeypatch.setattr("mmengine.optim.optimizer.amp_optimizer_wrapper.is_npu_available", lambda: True)
    net = Net()
    wrapper = AmpOptimWrapper.__new__(AmpOptimWrapper)
    OptimWrapper.__init__(wrapper, torch.optim.SGD(net.parameters(), 0.1))
    wrapper.loss_scaler, wrapper._scale_update_param, wrapper.cast_dtype = torch.amp.GradScaler("cpu"), None, None
    guard = GuardedOptimWrapper(wrapper, net)
    guard.update_params(net.linear.weight.sum() * 1e38)  # times the scale 65536 it overflows
    guard.settle({})
    assert guard.updated
    assert torch.isfinite(net.linear.weight).all()
    assert wrapper.loss_scaler.get_scale() == 32768


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device: a number taken out of a tensor one by one."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def test_a_step_reads_nothing_but_what_settle_reads_at_once():
    net = Net()
    guard = GuardedOptimWrapper(OptimWrapper(torch.optim.SGD(net.parameters(), 0.1)), net)
    with Reads() as reads:
        loss = net.linear(net.norm(torch.randn(4, 3))).square().mean()
        guard.update_params(loss)
        found = guard.settle({"loss": loss, "double": loss.double() / 3, "half": loss.detach().bfloat16()}, stop=True)
    assert reads.count == 0  # tolist takes all of a tensor in one piece
    assert found == {
        "loss": float(loss.detach()),
        "double": float(loss.detach().double() / 3),
        "half": float(loss.detach().bfloat16()),
    }
    assert (guard.updated, guard.stop, guard.save) == (True, True, False)


def test_a_step_must_be_settled_before_the_next():
    net, _, guard = make()
    with pytest.raises(RuntimeError, match="settle comes after a train_step"):
        guard.settle({})
    guard.update_params(net.linear.weight.sum())
    with pytest.raises(RuntimeError, match="updates parameters twice"):
        guard.update_params(net.linear.weight.sum())


def test_a_second_signal_acts_as_ever():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with StopSignals() as signals:
            assert signals.received is None
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.received == "SIGINT"
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_nothing_is_noted():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with StopSignals() as signals:
            seen.append((signal.getsignal(signal.SIGTERM), signals.received))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, None)]


class Pids(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return os.getpid()


def test_a_reading_process_outlives_the_first_signal():
    loader = DataLoader(Pids(), 1, num_workers=1, worker_init_fn=ignore_first_signal)
    reader = iter(loader)
    pid = int(next(reader))
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGTERM)
    assert [int(found) for found in reader] == [pid] * 39


class TestClipping:
    """The guard clips by the norm that it has read with everything else: mmengine's wrapper would wait once more to log it."""

    @pytest.mark.parametrize("accumulated", [1, 2])
    def test_equals_mmengines_bit_for_bit(self, accumulated):
        nets = {}
        for guarded in (True, False):
            net, wrapper, guard = make(accumulated)
            wrapper.initialize_count_status(net, 0, 100)
            for step in range(4):
                x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step)) * 30
                net.step(x, guard if guarded else wrapper)
            logged = wrapper.message_hub.get_scalar("train/grad_norm").data[0]
            nets[guarded] = (*state(net, wrapper), torch.tensor(logged[-(4 // accumulated) :]))
        for one, other in zip(nets[True], nets[False], strict=True):
            assert torch.equal(one, other)
        assert nets[True][-1].max() > 1.0, "nothing was clipped"

    def test_nothing_is_read_a_second_time(self):
        net = Net()
        wrapper = OptimWrapper(torch.optim.SGD(net.parameters(), 0.1), clip_grad=dict(max_norm=1.0))
        guard = GuardedOptimWrapper(wrapper, net)
        loss = net.linear(net.norm(torch.randn(4, 3))).square().mean()
        guard.update_params(loss)
        with Reads() as reads:
            guard.settle({"loss": loss})
        assert (reads.count, guard.updated) == (0, True)
        assert wrapper.message_hub.get_scalar("train/grad_norm").current() > 0.0

    def test_an_update_that_is_left_out_says_its_losses(self):
        net, _, guard = make()
        loss = net.linear(net.norm(BAD)).square().mean()
        guard.update_params(loss)
        assert list(guard.settle({"loss": loss, "other": torch.tensor(2.0)})) == ["loss", "other"]
        assert guard.skipped

    def test_schedulers_count_the_updates(self, recwarn):
        net = Net()
        wrapper = OptimWrapper(torch.optim.SGD(net.parameters(), 0.1), clip_grad=dict(max_norm=1.0))
        scheduler = LinearLR(wrapper, start_factor=0.5, end=4)
        options, guard = wrapper.clip_grad_kwargs, GuardedOptimWrapper(wrapper, net)
        loss = net.linear(net.norm(torch.randn(4, 3))).square().mean()
        guard.update_params(loss)
        guard.settle({"loss": loss})
        scheduler.step()
        assert wrapper.clip_grad_kwargs is options
        assert not [str(w.message) for w in recwarn if "optimizer.step" in str(w.message)]

    def test_other_ways_to_clip_are_left_to_the_wrapper(self):
        net = Net()
        options = [
            dict(type="value", clip_value=0.1),
            dict(max_norm=1.0, norm_type=1),
            dict(max_norm=1.0, error_if_nonfinite=True),
        ]
        for clip_grad in options:
            wrapper = OptimWrapper(torch.optim.SGD(net.parameters(), 0.1), clip_grad=clip_grad)
            guard = GuardedOptimWrapper(wrapper, net)
            loss = net.linear(net.norm(torch.randn(4, 3))).square().mean()
            guard.update_params(loss)
            guard.settle({"loss": loss})
            assert guard.updated


def test_buffers_are_kept_by_one_operation():
    net = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(20)))
    guard = GuardedOptimWrapper(OptimWrapper(torch.optim.SGD(net.parameters(), 0.1)), net)
    with CountingOperations() as counted, guard.optim_context(net):
        pass
    assert counted.seen == {"_foreach_copy_": 1}
