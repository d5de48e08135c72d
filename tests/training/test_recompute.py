"""Activation checkpointing changes the memory of a step and nothing else."""

import pytest
import torch
from refusals import refused
from tiny_runs import SPARK, tiny, write_images
from torch import nn
from torch.utils.checkpoint import checkpoint

from hgkd.api import train as train_tool
from hgkd.registry import build_runner
from hgkd.training.loop import GuardedOptimWrapper, seed_step
from hgkd.training.recompute import recompute_activations


def build(images, work_dir):
    torch.manual_seed(0)
    options = tiny(images, val_train_root=None, val_test_root=None)
    return build_runner(train_tool.load_config(SPARK, work_dir, options=options))


def gradients(model, wrapper, pictures):
    found = {}
    wrapper.optimizer.register_step_pre_hook(
        lambda *_: found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    )
    seed_step(0, 0, 0)
    guard = GuardedOptimWrapper(wrapper, model)
    losses = guard.settle(model.train_step({"inputs": pictures}, optim_wrapper=guard))
    statistics = {n: b.clone() for n, b in model.named_buffers() if "running" in n}
    return losses["loss"], found, statistics


def test_activation_checkpointing_gives_the_same_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = write_images(tmp_path / "images")
    pictures = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    results = []
    for modules in ([], ["student.encoder.layer1", "student.encoder.layer3"]):
        runner = build(images, tmp_path / str(len(modules)))
        if modules:
            recompute_activations(runner.model, modules)
        wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
        results.append(gradients(runner.model, wrapper, pictures))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for plain, again in zip(results[0][1:], results[1][1:], strict=True):
        assert plain.keys() == again.keys()
        for name, expected in plain.items():
            torch.testing.assert_close(again[name], expected, rtol=1e-4, atol=1e-6)


def test_a_config_turns_it_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"epochs": 1, "warmup_epochs": 0, "val_train_root": None, "val_test_root": None}
    options |= {"activation_checkpointing": ["student.encoder.layer1"]}
    runner = train_tool.train(SPARK, tmp_path / "run", options=tiny(write_images(tmp_path / "images"), **options))
    assert runner.iter == 2
    assert runner.model.student.encoder.layer1.forward.func is checkpoint


def test_an_unknown_part_is_refused():
    with refused(ValueError, "checkpointing-module-unknown", "activation_checkpointing", "layr", "layer"):
        recompute_activations(nn.ModuleDict({"layer": nn.Linear(1, 1)}), ["layr"])
