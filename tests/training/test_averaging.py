"""The average of the weights: mmengine's numbers, in calls that do not grow with the number of tensors."""

from types import SimpleNamespace

import mmengine.hooks
import mmengine.model
import pytest
import torch
import torchvision
from mmengine.registry import MODELS, DefaultScope
from operation_counts import CountingOperations
from torch import nn

from hgkd.registry import HOOKS
from hgkd.training.averaging import EMAHook, ExponentialMovingAverage


def net() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=3)


def moved(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for value in (*model.parameters(), *model.buffers()):
        if value.is_floating_point():
            value.data.add_(torch.randn(value.shape, generator=generator).abs())
        else:
            value.add_(1)


@pytest.mark.parametrize("options", [{}, {"update_buffers": True}, {"interval": 2}, {"momentum": 0.7}], ids=str)
def test_the_numbers_are_mmengines(options) -> None:
    options = {"momentum": 0.1, **options}
    model = net()
    ours, theirs = (kind(model, **options) for kind in (ExponentialMovingAverage, mmengine.model.ExponentialMovingAverage))
    for step in range(4):
        moved(model, step)
        for average in (ours, theirs):
            average.update_parameters(model)
    found, expected = ours.state_dict(), theirs.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert not torch.equal(found["module.conv1.weight"], model.conv1.weight)


def test_weights_in_another_type_are_averaged_in_a_call_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    ours, theirs = (kind(model, momentum=0.1) for kind in (ExponentialMovingAverage, mmengine.model.ExponentialMovingAverage))
    for step in range(2):
        moved(model, step)
        with CountingOperations() as counted:
            ours.update_parameters(model)
        theirs.update_parameters(model)
    assert counted.seen["_foreach_lerp_"] == 2
    assert all(torch.equal(found, expected) for found, expected in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_as_many_calls_as_types() -> None:
    model = net()
    average = ExponentialMovingAverage(model, momentum=0.1)
    for copies, means in ((3, 0), (2, 1)):  # the parameters, and buffers of floats and of counts
        with CountingOperations() as counted:
            average.update_parameters(model)
        assert (counted.seen["_foreach_copy_"], counted.seen["_foreach_lerp_"]) == (copies, means)
        assert not counted.seen["lerp_"] + counted.seen["copy_"]


def test_the_hook_takes_it_in_hgkds_scope() -> None:
    hook = EMAHook(momentum=0.1)
    with DefaultScope.overwrite_default_scope("hgkd"):
        built = MODELS.build(hook.ema_cfg, default_args=dict(model=net()))
    assert type(built) is ExponentialMovingAverage


@pytest.mark.parametrize("accumulated", [1, 3])
def test_steps_that_update_nothing_are_not_averaged(accumulated: int) -> None:
    """Otherwise the average would follow the weights faster, the more steps an update has."""
    with DefaultScope.overwrite_default_scope("hgkd"):
        hook = HOOKS.build(dict(type="EMAHook", momentum=0.1, update_buffers=True))
        assert isinstance(hook, mmengine.hooks.EMAHook)
        model, reference = net(), net()
        guard = SimpleNamespace(updated=True)
        runner = SimpleNamespace(model=model, train_loop=SimpleNamespace(guard=guard), iter=0, epoch=0)
        hook.before_run(runner)
    expected = ExponentialMovingAverage(reference, momentum=0.1, update_buffers=True)
    for update in range(3):
        for part in range(accumulated):
            guard.updated = part == accumulated - 1
            if guard.updated:
                moved(model, update)
                moved(reference, update)
                expected.update_parameters(reference)
            hook.after_train_iter(runner, 0)
    for name, value in expected.state_dict().items():
        assert torch.equal(hook.ema_model.state_dict()[name], value), name
