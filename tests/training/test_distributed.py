"""Two processes on the CPU (gloo), started by torchrun as a user would."""

import json
from pathlib import Path

import pytest
import torch
from process_of_two import build, material, one_step
from refusals import refused
from tiny_runs import SPARK, tiny, torchrun, write_images
from torch import nn

from hgkd.training.sync_norm import sync_batch_norms

SCRIPT = Path(__file__).with_name("process_of_two.py")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


def two_processes(task, images, folder):
    return torchrun([SCRIPT, task, images, folder], folder)


@pytest.mark.slow
def test_two_processes_do_the_step_of_one_with_twice_the_batch(images, tmp_path, monkeypatch):
    done = two_processes("step", images, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [torch.load(tmp_path / f"rank_{rank}.pt") for rank in range(2)]
    monkeypatch.chdir(tmp_path)
    runner = build(images, tmp_path / "one", launcher="none", batch_size=8)
    loss, gradients, statistics, _ = one_step(runner, *material([2] * 8))
    assert (ranks[0][0] + ranks[1][0]) / 2 == pytest.approx(loss, rel=1e-5)
    for found in ranks:
        assert found[1].keys() == gradients.keys()
        for name, expected in gradients.items():
            torch.testing.assert_close(found[1][name], expected, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        for name, expected in statistics.items():
            torch.testing.assert_close(found[2][name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_process_that_fails_ends_all_of_them_and_says_why(images, tmp_path):
    done = two_processes("fail", images, tmp_path)
    assert done.returncode != 0
    assert "RuntimeError: the second process gives up" in done.stderr


@pytest.mark.slow
def test_a_process_that_is_killed_ends_all_of_them_and_the_signal_is_named(images, tmp_path):
    done = two_processes("die", images, tmp_path)
    assert done.returncode not in (0, -9)
    assert "Signal 9 (SIGKILL) received" in done.stderr
    assert "rank      : 1" in done.stderr


@pytest.mark.slow
def test_a_part_that_no_loss_reaches_is_said_and_does_not_end_the_training(images, tmp_path):
    done = two_processes("idle", images, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.6", reason="fully_shard has its public name since then")
def test_parameters_shared_out_over_processes_make_the_same_steps(images, tmp_path):
    done = two_processes("shard", images, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.6", reason="fully_shard has its public name since then")
def test_processes_with_clocks_of_their_own_save_together(images, tmp_path):
    done = two_processes("minutes", images, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]


def test_layers_that_cannot_be_synchronised_are_refused():
    with refused(ValueError, "sync-bn-without-norm"):
        sync_batch_norms(nn.Linear(2, 2))
    with refused(ValueError, "norm-not-synchronised", "0", "BatchNorm1d"):
        sync_batch_norms(nn.Sequential(nn.BatchNorm1d(2)))


def test_alone_a_synchronised_layer_is_the_ordinary_one():
    plain, synced = nn.Sequential(nn.BatchNorm2d(3)), nn.Sequential(nn.BatchNorm2d(3))
    assert sync_batch_norms(synced) == 1
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(plain(x), synced(x))
    assert plain.state_dict().keys() == synced.state_dict().keys()


@pytest.mark.slow
def test_one_process_measures_kernels_for_both(images, tmp_path, monkeypatch):
    monkeypatch.delenv("HGKD_KERNELS")
    monkeypatch.setenv("HGKD_KERNELS_CACHE", str(tmp_path / "kernels"))
    options = tiny(images, val_train_root=None, val_test_root=None, batch_size=4, epochs=1, warmup_epochs=0)
    command = ["-m", "hgkd", "train", SPARK, "--launcher", "pytorch", "--work-dir", tmp_path / "run", "--cfg-options"]
    done = torchrun([*command, *(f"{key}={value}" for key, value in options.items())], tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    said = [line for line in done.stdout.splitlines() if "kernels of ResNet" in line]
    assert len(said) == 1, "it is the first process that logs"
    (file,) = (tmp_path / "kernels").iterdir()
    (choice,) = json.loads(file.read_text()).values()
    assert choice["backend"] in said[0]
    assert {"gather", "masked", "dense"} == choice["step_ms"].keys()
