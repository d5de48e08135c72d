"""Commands of pages, as a reader types them, made so small that they run in seconds; the folder in which they are typed."""

import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import timm
from mmengine.config import Config
from safetensors.torch import save_file
from small_models import shrink
from tiny_runs import ROOT, write_images

from hgkd.cli.main import main
from hgkd.config.reading import read_config

WIDTHS = (8, 16, 32, 64)
TEACHER = dict(embed_dim=32, num_heads=2)


def readers_folder(folder: Path, monkeypatch) -> Path:
    """Makes ``folder`` the current one, and like a reader's: the recipes, photographs, the file of a (thin) teacher."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setattr("mmengine.config.config.FormatCode", lambda text, **options: (text, True))  # slow, and of no account
    for part in ("configs", "downstream"):
        (folder / part).symlink_to(ROOT / part)
    write_images(folder / "home/photos", each=2)
    teacher = timm.create_model("vit_small_patch14_dinov2", num_classes=0, **TEACHER)
    save_file(teacher.state_dict(), folder / "home/vit_small_patch14_dinov2.safetensors")
    return folder


def tiny_student(**more: object) -> dict[str, object]:
    """Options of hgkd train that make a student's training from the reader's teacher tiny."""
    teacher = {f"model.teacher.{key}": value for key, value in {**TEACHER, "allow_random": True}.items()}
    small = {"image_size": 64, "batch_size": 2, "epochs": 2, "workers": 0, "model.student.decoder_width": 32}
    return {**small, **teacher, **more}


def run_replaced(words: list[str], options: dict[str, object], thin: Callable[[Config], Config]) -> int:
    """An hgkd command, in this process, with options in place of those of the same names, and its config made thin."""
    words = [os.path.expanduser(word) for word in words if word.partition("=")[0] not in options]  # as a shell does it
    with mock.patch("hgkd.api.train.read_config", lambda file: thin(read_config(file))):
        return main([*words, *(f"{key}={value}" for key, value in options.items())])


def appended(words: list[str]) -> list[str]:
    """What is appended to a command of hgkd train."""
    if words[0] != "train":
        return []
    small = ["workers=0", "batch_size=2"]
    resnet = f"channels={','.join(map(str, WIDTHS))}"
    if not words[1].startswith("downstream/"):
        encoder = str(dict(channels=list(WIDTHS))).replace(" ", "")
        teacher = [f"model.teacher.{key}={value}" for key, value in {**TEACHER, "allow_random": True}.items()]
        thin = [f"model.student.encoder_kwargs={encoder}", "model.student.decoder_width=32"]
        return [*small, "image_size=64", "default_hooks.checkpoint.interval=50", *teacher, *thin]
    if "/classification/" in words[1]:
        return [*small, "image_size=64", "epochs=1", "warmup_epochs=0", f"model.classifier.{resnet}"]
    length = "iterations=1" if "/segmentation/" in words[1] else "epochs=1"
    return [*small, length, "model.backbone.stem_channels=64"]  # timm's ResNet has that stem at any width


def run_command(words: list[str], more: list[str] | None = None) -> int:
    """An hgkd command, in this process; networks of mmdet and mmseg are an eighth of their size.

    ``more`` is appended; None: what :func:`appended` says.
    """
    small = len(words) > 1 and ("/detection/" in words[1] or "/segmentation/" in words[1])
    with mock.patch("hgkd.api.train.read_config", lambda file: shrink(read_config(file)) if small else read_config(file)):
        return main([*words, *(appended(words) if more is None else more)])
