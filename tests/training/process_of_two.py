"""What each of two processes does in test_distributed.py; started by torchrun, not collected by pytest."""

import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from tiny_runs import SPARK, tiny
from torch.distributed.device_mesh import init_device_mesh

from hgkd.api import train as train_tool
from hgkd.api.train import leave_group
from hgkd.distillers import MaskedDistiller
from hgkd.registry import build_runner
from hgkd.training.checkpoint_hook import RunCheckpointHook
from hgkd.training.loop import GuardedOptimWrapper
from hgkd.training.wrapping import plain_model


class GivenMask:
    """Serves the visible cells that it was given, instead of drawing them."""

    guided = False
    progress = 0.0
    current_ratio = 0.6

    def __init__(self, visible):
        self.visible = visible

    def check(self, grid):
        pass

    def __call__(self, batch, grid, *, device, generator=None, scores=None):
        assert tuple(self.visible.shape) == (batch, *grid)
        return self.visible


def build(images, folder, launcher="pytorch", **options):
    torch.manual_seed(0)
    options = tiny(images, val_train_root=None, val_test_root=None, **{"batch_size": 4, "sync_bn": True, **options})
    return build_runner(train_tool.load_config(SPARK, folder, launcher=launcher, options=options))


def one_step(runner, pictures, visible, stop=False):
    """Loss, gradients and running statistics of a step, and whether a process asked to stop."""
    model = plain_model(runner)
    model.mask = GivenMask(visible)
    wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.model.train()
    gradients = {}
    wrapper.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    )
    guard = GuardedOptimWrapper(wrapper, runner.model)
    losses = guard.settle(runner.model.train_step({"inputs": pictures}, optim_wrapper=guard), stop=stop)
    statistics = {n: b.clone() for n, b in model.named_buffers() if "running" in n}
    return losses["loss"], gradients, statistics, guard.stop


def material(counts):
    """Eight pictures and cells of a 2 x 2 grid, so many visible in each."""
    generator = torch.Generator().manual_seed(7)
    pictures = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8, generator=generator)
    visible = torch.zeros(8, 4, dtype=torch.bool)
    for i, count in enumerate(counts):
        visible[i, torch.randperm(4, generator=generator)[:count]] = True
    return pictures, visible.view(8, 2, 2)


def step(images, folder):
    """One step of this process's half; the tensors go to a file."""
    runner = build(images, folder)
    rank = get_rank()
    half = slice(4 * rank, 4 * rank + 4)
    pictures, visible = material([2] * 8)
    torch.save(one_step(runner, pictures[half], visible[half]), Path(folder) / f"rank_{rank}.pt")
    # numbers of visible cells that differ between the processes must not make one wait for the other
    pictures, visible = material([1, 1, 1, 1, 3, 3, 3, 3])
    loss, _, _, stop = one_step(runner, pictures[half], visible[half])
    assert loss == loss
    assert not stop
    # what one process asks is seen by both
    assert one_step(runner, pictures[half], visible[half], stop=rank == 1)[3]
    # a loss that is not finite in one process leaves out the step in both
    before = {n: v.clone() for n, v in plain_model(runner).state_dict().items()}
    wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    guard = GuardedOptimWrapper(wrapper, runner.model)
    inputs = pictures[half].float() / 255
    if rank == 1:
        inputs[0, 0, 0, 0] = float("nan")
        plain_model(runner).mask.visible[0] = True
    guard.settle(runner.model.train_step({"inputs": inputs}, optim_wrapper=guard))
    assert guard.skipped
    after = plain_model(runner).state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before if before[n].is_floating_point())


class Fail(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if get_rank() == 1 and runner.iter == 1:
            raise RuntimeError("the second process gives up")


class Die(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if get_rank() == 1 and runner.iter == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def fail(images, folder, hook=Fail):
    """A training whose second process raises while the first goes on."""
    runner = build(images, folder)
    assert get_world_size() == 2
    runner.register_hook(hook())
    runner.train()
    time.sleep(600)  # never reached: the first process waits for the second in the next step


def idle(images, folder):
    """Two epochs of a model with a part that no loss reaches: torch alone would end the run in the second step."""
    with pytest.MonkeyPatch.context() as patch:
        built = MaskedDistiller.__init__

        def with_spare(self, *args, **options):
            built(self, *args, **options)
            self.spare = torch.nn.Parameter(torch.ones(3))

        patch.setattr(MaskedDistiller, "__init__", with_spare)
        runner = build(images, folder, epochs=2)
    runner.train()
    assert runner.iter == 4
    weights = torch.cat([value.flatten().float() for value in plain_model(runner).parameters()])
    others = [torch.zeros_like(weights) for _ in range(2)]
    torch.distributed.all_gather(others, weights.detach())
    assert torch.equal(*others)  # the gradients were summed
    assert torch.equal(plain_model(runner).spare, torch.ones(3))
    if get_rank() == 0:
        log = "".join(file.read_text() for file in Path(folder).glob("*/*.log"))
        assert "1 parameters got no gradient and are not trained, because no loss depends on them: spare" in log


class Late(Hook):
    def before_train(self, runner):
        if get_rank() == 1:
            next(hook for hook in runner.hooks if isinstance(hook, RunCheckpointHook))._saved_at -= 1e6


def minutes(images, folder):
    """An epoch of sharded parameters, of which only the second process's clock says that a checkpoint is due."""
    runner = build(images, folder, epochs=1, warmup_epochs=0, fsdp=True)
    runner.register_hook(Late(), priority="LOWEST")
    runner.train()
    assert (Path(folder) / "epoch_0_step_1.pth").is_file()


ARCH = {"embed_dim": 16, "depth": 3, "num_heads": 2}
ARCH |= {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
STUDENTS = (dict(type="MaskedViT", arch=ARCH, cell=32), dict(type="SparseUNet", encoder="test_resnet", decoder_width=32))


def shard(images, folder):
    """Two steps of parameters that the processes share out (FSDP2), against those of ordinary ones."""
    from torch.distributed.fsdp import fully_shard  # torch 2.6

    torch.distributed.init_process_group("gloo")
    for student in STUDENTS:
        losses = []
        for sharded in (False, True):
            torch.manual_seed(0)
            objectives, mask = dict(pixels=dict(type="PixelReconstruction")), dict(type="RandomMask", mask_ratio=0.5)
            model = MaskedDistiller(student=student, objectives=objectives, mask=mask, image_size=64)
            if sharded:
                model = model.to(memory_format=torch.contiguous_format)  # sparsify lays some kernels out channels last
                # only modules that are called as such can gather their parameters: a CNN's encoder is walked through instead
                parts = model.student.network.blocks if student["type"] == "MaskedViT" else []
                for part in [*parts, model]:
                    fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
            guard = GuardedOptimWrapper(OptimWrapper(torch.optim.AdamW(model.parameters(), lr=1e-3)), model)
            for seed in range(3):
                torch.manual_seed(seed)
                with guard.optim_context(model):
                    total = sum(model(material([2] * 8)[0], mode="loss").values())
                guard.update_params(total)
                losses.append(guard.settle({"loss": total})["loss"])
                assert guard.updated
        assert losses[3:] == pytest.approx(losses[:3], rel=1e-5), (student["type"], losses)
        assert losses[2] != losses[0]


if __name__ == "__main__":
    {"step": step, "fail": fail, "die": partial(fail, hook=Die), "shard": shard, "idle": idle, "minutes": minutes}[sys.argv[1]](
        sys.argv[2], sys.argv[3]
    )
    leave_group()
