"""What each of two processes does in test_sharding.py; started by torchrun, not collected by pytest."""

import json
import sys
from pathlib import Path

import torch
from mmengine.dist import get_rank
from tiny_runs import HGKD, SPARK, tiny, tiny_hgkd
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hgkd.api.train import leave_group, load_config, train
from hgkd.registry import RUNNERS
from hgkd.training.sharding import local_bytes
from hgkd.training.wrapping import plain_model

ARCH = {"embed_dim": 64, "depth": 4, "num_heads": 2, "decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
VIT = {"model.student": dict(type="MaskedViT", arch=ARCH, cell=32)}


def options_of(kind, images, **options):
    """A CNN, or a ViT that learns from a ViT; the teacher of both learns nothing."""
    if kind == "vit":
        options |= {"val_train_root": None, "val_test_root": None}
    options = {"batch_size": 4, "teacher_features": None, "optim_wrapper.clip_grad": dict(max_norm=0.5), **options}
    if kind == "cnn":
        return SPARK, tiny(images, sync_bn=True, **options)
    small = tiny_hgkd(images, **options)
    student = [key for key in small if key == "student" or key.startswith("model.student.")]
    return HGKD, {key: value for key, value in small.items() if key not in student} | VIT | {"model.student._delete_": True}


def run(kind, images, folder, resume=False, **options):
    """A training; the losses of its steps, and the bytes that this process holds of what."""
    recipe, found = options_of(kind, images, **options)
    before = sorted(Path(folder).glob("*/vis_data/scalars.json"))
    held = {}

    def weigh(optimizer, *_):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        held["parameters"] = local_bytes(parameters)
        held["gradients"] = local_bytes([p.grad for p in parameters if p.grad is not None])
        held["optimiser"] = local_bytes(optimizer.state_dict()["state"])

    handle = register_optimizer_step_pre_hook(weigh)
    runner = train(recipe, folder, launcher="pytorch", options=found, resume=resume)
    handle.remove()
    teacher = getattr(plain_model(runner), "teacher", None)
    held["teacher"] = 0 if teacher is None else local_bytes(teacher.parameters())
    losses = []
    if get_rank() == 0:
        logs = [file for file in sorted(Path(folder).glob("*/vis_data/scalars.json")) if file not in before]
        lines = [json.loads(line) for file in logs for line in file.read_text().splitlines()]
        losses = [[line["loss"], line["grad_norm"]] for line in lines if "lr" in line]
    return losses, held


def whole_run(kind, images, folder):
    """Two epochs ordinary and sharded, and the second of them once more: resumed, sharded and ordinary."""
    folder = Path(folder)
    found = {name: run(kind, images, folder / name, fsdp=name == "fsdp") for name in ("ddp", "fsdp")}
    again = {}
    for name, fsdp in (("resumed", True), ("unsharded", False)):
        again[name] = run(kind, images, folder / name, resume=folder / "fsdp/epoch_1.pth", fsdp=fsdp)
    if get_rank() == 0:
        content = {name: {"losses": losses, "held": held} for name, (losses, held) in (found | again).items()}
        (folder / "found.json").write_text(json.dumps(content))


def refusals(kind, images, folder):
    """Codes of what is refused."""
    recipe, options = options_of(kind, images, fsdp=True)
    codes = []
    for changes in (
        {"teacher_features": str(Path(folder) / "store")},
        {"custom_hooks": [dict(type="EMAHook")]},
        {"model.mask": dict(type="AttentionMask", mask_ratio=0.5)},
        {"fsdp": "yes"},
    ):
        name = f"run_{len(codes)}"
        try:
            RUNNERS.build(load_config(recipe, Path(folder) / name, launcher="pytorch", options={**options, **changes})).train()
        except ValueError as error:
            codes.append(getattr(error, "code", str(error)))
    if get_rank() == 0:
        (Path(folder) / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    torch.set_num_threads(1)
    whole_run(*sys.argv[1:4])
    if sys.argv[1] == "vit":
        refusals(*sys.argv[1:4])
    leave_group()
