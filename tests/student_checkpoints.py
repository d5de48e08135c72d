"""Checkpoints as the runner writes them, around tiny random encoders; used by tests of export, evaluation and tools."""

from pathlib import Path
from typing import Any

import timm
import torch
from mmengine.logging import MessageHub
from torch import nn


def randomised(model: nn.Module) -> nn.Module:
    """The model in eval mode, with norms and scales that do something (timm starts many of them at or near zero)."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    for name, parameter in model.named_parameters():
        if name.endswith(".gamma") or ".grn." in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.eval()


def write_student(
    path: Path,
    name: str = "test_resnet",
    stem: str = "default",
    kwargs: dict[str, Any] | None = None,
    encoder: nn.Module | None = None,
    drop: str | None = None,
    pixels: tuple[list[float], list[float]] | None = None,
    **hgkd: Any,
) -> nn.Module:
    """Write a checkpoint and return its encoder.

    Args:
        encoder: default: timm's own model of that name.
        drop: leave out the encoder's weights whose names start so.
        pixels: mean and std, as a student with ``normalize`` notes them.
        hgkd: entries of ``meta['hgkd']`` that replace the right ones.
    """
    if encoder is None:
        encoder = timm.create_model(name, num_classes=0, global_pool="", **(kwargs or {}))
    randomised(encoder)
    state = {f"student.encoder.{k}": v for k, v in encoder.state_dict().items() if not (drop and k.startswith(drop))}
    state["student.decoder.out.weight"] = torch.randn(3)
    state["objectives.hgkd.projector.weight"] = torch.randn(3)
    hub = MessageHub(f"fake_{path.stem}")
    hub.update_scalar("train/loss", 1.5)
    hub.update_scalar("val/knn/top1", 42.5)
    noted = {} if pixels is None else {"pixels": pixels}
    spec = {"encoder": {"name": name, "stem": stem, "kwargs": kwargs or {}, **noted}, "format": 1}
    torch.save(
        {
            "meta": {"hgkd": {**spec, **hgkd}, "cfg": "image_size = 96\n", "epoch": 3, "iter": 30},
            "state_dict": state,
            "message_hub": hub.state_dict(),
            "optimizer": torch.optim.AdamW(encoder.parameters()).state_dict(),
        },
        path,
    )
    return encoder
