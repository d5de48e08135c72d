"""Decay groups and bfloat16."""

import copy
import itertools
from typing import Any

import pytest
import torch
from refusals import refused
from torch import nn

from hgkd.training import BFloat16OptimWrapper, DecayGroupsConstructor
from hgkd.training.optim import AdamW, check_optim_config


def build(model, **wrapper):
    cfg = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=0.1, weight_decay=0.05), **wrapper)
    return DecayGroupsConstructor(cfg)(model)


def test_only_weights_decay():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    model.token = nn.Parameter(torch.zeros(4))
    model[2].bias.requires_grad_(False)
    decayed, plain = build(model).optimizer.param_groups
    assert decayed["weight_decay"] == 0.05
    assert plain["weight_decay"] == 0.0
    assert {id(p) for p in decayed["params"]} == {id(model[0].weight), id(model[2].weight)}
    assert {id(p) for p in plain["params"]} == {id(model[0].bias), id(model[1].weight), id(model[1].bias), id(model.token)}


def test_the_config_is_not_changed_and_other_arguments_arrive():
    cfg = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.1), clip_grad=dict(max_norm=5.0))
    wrapper = DecayGroupsConstructor(cfg)(nn.Linear(2, 2))
    assert wrapper.clip_grad_kwargs == {"max_norm": 5.0}
    assert cfg == dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.1), clip_grad=dict(max_norm=5.0))


def test_paramwise_options_are_refused():
    with refused(ValueError, "paramwise-cfg-refused", "paramwise_cfg"):
        DecayGroupsConstructor(dict(optimizer=dict(type="SGD")), dict(bias_decay_mult=0.0))


def test_bfloat16_computes_in_it_and_keeps_float32_weights():
    model = nn.Linear(4, 4)
    wrapper = BFloat16OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    with wrapper.optim_context(model):
        out = model(torch.ones(2, 4))
    assert out.dtype == torch.bfloat16
    assert model.weight.dtype == torch.float32
    wrapper.update_params(out.float().sum())
    assert model.weight.grad is None or model.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("wrapper", "refusal"),
    [
        (dict(accumulative_counts=0), ("accumulation-not-whole", "accumulative_counts=0")),
        (dict(accumulative_counts=1.5), ("accumulation-not-whole", "accumulative_counts=1.5")),
        (dict(optimizer=dict(type="AdamW", lr=float("inf"))), ("optimizer-value-not-finite", "optimizer.lr=inf")),
        (dict(optimizer=dict(type="AdamW", betas=(0.9, float("nan")))), ("optimizer-value-not-finite", "optimizer.betas")),
        (dict(clip_grad=dict(max_norm=float("nan"))), ("clip-grad-not-positive", "clip_grad.max_norm=nan", "0")),
        (dict(clip_grad=dict(max_norm=0)), ("clip-grad-not-positive", "clip_grad.max_norm=0", "0", "clip_grad=None")),
    ],
)
def test_numbers_that_would_do_damage_or_nothing(wrapper, refusal):
    with refused(ValueError, *refusal):
        check_optim_config(dict(type="OptimWrapper", **wrapper))


@pytest.mark.skipif(torch.cuda.is_available(), reason="it works there")
def test_loss_scaling_on_a_cpu():
    for kind in ("AmpOptimWrapper", "mmengine.AmpOptimWrapper"):
        with refused(ValueError, "amp-needs-gpu", "--amp", "bfloat16"):
            check_optim_config(dict(type=kind))
    check_optim_config(dict(type="AmpOptimWrappers", optimizer=dict(lr=0.1), clip_grad=None))


@pytest.mark.parametrize("layouts", list(itertools.product(("channels_last", "contiguous_format"), repeat=3)))
def test_adamw_whatever_lies_how_in_memory(layouts):
    """torch's fused kernel pairs values by their places in memory; a checkpoint may hold moments of another layout."""
    weight, gradient, moment = (getattr(torch, layout) for layout in layouts)
    values = [torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]

    def stepped(cls, formats, **options):
        of_weight, of_gradient, of_moment = formats
        parameter = nn.Parameter(values[0].clone(memory_format=of_weight))
        optimizer = cls([parameter], lr=0.1, **options)
        moments = [value.clone(memory_format=of_moment) for value in (values[2], values[3].square())]
        state = {0: {"step": torch.tensor(3.0), "exp_avg": moments[0], "exp_avg_sq": moments[1]}}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        parameter.grad = values[1].clone(memory_format=of_gradient)
        optimizer.step()
        return parameter.detach(), optimizer.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg_sq"]

    plain = stepped(torch.optim.AdamW, (torch.contiguous_format,) * 3, foreach=False)
    for ours, theirs in zip(stepped(AdamW, (weight, gradient, moment), fused=True), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


class TestAdamW:
    @pytest.mark.parametrize("amsgrad", [False, True])
    def test_channels_last_weights_change_as_in_torch(self, amsgrad: bool) -> None:
        torch.manual_seed(0)
        ours = nn.Sequential(nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last), nn.Conv2d(16, 8, 3))
        theirs = copy.deepcopy(ours)
        options: dict[str, Any] = dict(lr=1e-2, weight_decay=0.05, amsgrad=amsgrad, fused=True)
        pairs = ((AdamW(ours.parameters(), **options), ours), (torch.optim.AdamW(theirs.parameters(), **options), theirs))
        for optimizer, net in pairs:
            generator = torch.Generator().manual_seed(1)
            for _ in range(3):
                for p in net.parameters():
                    p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
                optimizer.step()
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert one.stride() == other.stride()
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
        for one, other in zip(*(optimizer.state_dict()["state"].values() for optimizer, _ in pairs), strict=True):
            assert {name: value.stride() for name, value in one.items()} == {name: v.stride() for name, v in other.items()}
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)

    def test_the_fused_kernel_gets_contiguous_values(self, monkeypatch: pytest.MonkeyPatch) -> None:
        given: list[torch.Tensor] = []
        kernel = torch._fused_adamw_

        def noted(*lists: list[torch.Tensor], **options: Any) -> None:
            for values in lists[:4]:
                given.extend(values)
            kernel(*lists, **options)

        monkeypatch.setattr(torch, "_fused_adamw_", noted)
        net = nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)
        before = net.weight.detach().clone()
        net.weight.grad = torch.ones_like(net.weight)
        AdamW(net.parameters(), fused=True).step()
        assert given
        assert all(value.is_contiguous() for value in given)
        assert not torch.equal(net.weight, before)

    def test_weights_that_are_laid_out_anew_take_their_moments_with_them(self) -> None:
        net = nn.Conv2d(8, 16, 3)
        twin = copy.deepcopy(net)
        pairs = (net, AdamW(net.parameters(), fused=True)), (twin, torch.optim.AdamW(twin.parameters(), foreach=False))
        for step in range(2):
            for model, rule in pairs:
                generator = torch.Generator().manual_seed(step)
                for p in model.parameters():
                    p.grad = torch.randn(p.shape, generator=generator)
                rule.step()
            if not step:
                net.weight.data = net.weight.data.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(net.weight, twin.weight, rtol=1e-5, atol=1e-6)

    def test_the_constructor_makes_it(self) -> None:
        wrapper = DecayGroupsConstructor(dict(optimizer=dict(type="AdamW", lr=1e-3, fused=True)))(nn.Linear(2, 2))
        assert type(wrapper.optimizer) is AdamW
