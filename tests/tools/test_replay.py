"""hgkd replay on the dump of a training that diverged."""

import json

import pytest
from mmengine.hooks import Hook
from tiny_runs import SPARK, tiny, write_images

from hgkd.api import train as train_tool
from hgkd.cli import replay as replay_tool
from hgkd.diagnosis.replay import replay
from hgkd.errors import DivergedError
from hgkd.registry import HOOKS, build_runner
from hgkd.weights import find_last_checkpoint
from hgkd.weights.files import read_checkpoint


def diverge(folder, lr, hooks=(), **options):
    """Work folder of a run whose first updates are so large that later losses are not finite."""
    images, work_dir = write_images(folder / "images"), folder / "run"
    options = tiny(images, epochs=3, warmup_epochs=0, lr=lr, val_train_root=None, val_test_root=None, **options)
    cfg = train_tool.load_config(SPARK, work_dir, options=options)
    cfg.custom_hooks = [*cfg.custom_hooks, *hooks]
    next(hook for hook in cfg.custom_hooks if hook["type"] == "FiniteLossHook")["patience"] = 2
    with pytest.raises(DivergedError, match=r"3 updates in a row .*hgkd replay .*nonfinite_step_\d_rank_0\.json"):
        build_runner(cfg).train()
    return work_dir


@pytest.fixture(scope="module")
def diverged(tmp_path_factory):
    return diverge(tmp_path_factory.mktemp("diverged"), lr=1e18)


def test_the_steps_happen_again(diverged, capsys):
    dump = diverged / "nonfinite_step_2_rank_0.json"
    steps = replay(dump)
    assert [step.step for step in steps] == [1, 2, 3]
    assert not any(step.finite for step in steps)
    assert all(step.same for step in steps)
    assert replay_tool.main([str(dump)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("NOT FINITE again") == 3
    assert "the first output that is not finite is that of student." in printed


def test_a_step_is_one_of_the_weights_and_not_of_their_moving_average(tmp_path):
    """The average, which is what a checkpoint has as its state, is far from where the weights went."""
    work_dir = diverge(tmp_path, 1e10, [dict(type="EMAHook", momentum=1e-9, update_buffers=True)])
    (dump,) = work_dir.glob("nonfinite_step_*_rank_0.json")
    steps = replay(dump)
    assert len(steps) == 3
    assert not any(step.finite for step in steps)
    assert all(step.same for step in steps)


@HOOKS.register_module()
class SpoiltGradients(Hook):
    """Losses stay finite, and tell which pixels they are of."""

    def before_train(self, runner):
        next(runner.model.parameters()).register_hook(lambda gradient: gradient * float("nan"))


def test_images_that_are_shown_several_times_get_the_crops_of_their_turn(tmp_path):
    work_dir = diverge(tmp_path, 1e-3, [dict(type="SpoiltGradients")], **{"train_dataloader.sampler.repeats": 2})
    steps = replay(work_dir / "nonfinite_step_1_rank_0.json")
    assert len(steps) == 3
    assert all(step.finite and step.same for step in steps)


def test_a_step_from_sound_weights_is_finite(diverged, tmp_path, capsys):
    # the same images and seeds on the weights of the beginning
    content = json.loads((diverged / "nonfinite_step_2_rank_0.json").read_text())
    weights = read_checkpoint(diverged / content["checkpoint"])
    for name, value in weights["state_dict"].items():
        if value.is_floating_point():
            weights["state_dict"][name] = value.clamp(-0.01, 0.01) + (1.0 if "var" in name else 0.0)
    import torch

    torch.save(weights, tmp_path / content["checkpoint"])
    (tmp_path / "dump.json").write_text(json.dumps(content))
    assert replay_tool.main([str(tmp_path / "dump.json")]) == 1
    assert "finite this time" in capsys.readouterr().out


def test_the_run_left_no_checkpoint_to_resume_but_the_dump(diverged):
    assert find_last_checkpoint(diverged) in (None, str(diverged / "epoch_1.pth"))
    assert (diverged / "nonfinite_step_2.pth").is_file()


@pytest.mark.parametrize("content", ["{}", "not json", "[1]"])
def test_what_is_no_dump(tmp_path, content, capsys):
    (tmp_path / "x.json").write_text(content)
    assert replay_tool.main([str(tmp_path / "x.json")]) == 2
    assert "is no dump of a run" in capsys.readouterr().err


def test_no_dump(tmp_path, capsys):
    assert replay_tool.main([str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
