"""Shipped recipes made so small that they train in seconds, for tests of whole runs."""

import importlib
import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
SPARK = ROOT / "configs/spark/spark_resnet18_shapes.py"
HGKD = ROOT / "configs/hgkd/hgkd_vit-s14_resnet18_10e_cifar128.py"


def need_library(recipe):
    """Skip the calling test where the library of the recipe's student is not installed."""
    if "cspnext" in str(recipe) and importlib.util.find_spec("mmdet") is None:
        pytest.skip("mmdet is not installed")


def load_tool(name):
    """The module of a command."""
    return importlib.import_module(f"hgkd.cli.{name}")


def torchrun(command, folder):
    """Two processes on the CPU of a script and its arguments, started in a folder; the finished process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    starter = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    command = [*starter, *map(str, command)]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def write_images(root, classes=("a", "b"), each=8, size=64):
    rng = np.random.default_rng(0)
    for c, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(0, 120, (size, size, 3), dtype=np.uint8) + np.uint8(100 * c % 256)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def tiny(images, **options):
    """Options that make a shipped recipe train in seconds."""
    return {
        "student": "test_resnet",
        "data_root": str(images),
        "val_train_root": str(images),
        "val_test_root": str(images),
        "image_size": 64,
        "batch_size": 8,
        "workers": 0,
        "epochs": 2,
        "warmup_epochs": 1,
        "model.student.decoder_width": 32,
        "default_hooks.logger.interval": 1,
        **options,
    }


# of a teacher with two blocks
BLOCKS = {"model.objectives.hgkd.block": 1, "model.objectives.pooled.block": 1}


def tiny_hgkd(images, **options):
    vit = {"allow_random": True, "depth": 2, "embed_dim": 32, "num_heads": 2}
    teacher = {f"model.teacher.{key}": value for key, value in vit.items()}
    return tiny(images, teacher="vit_tiny_patch16_224", **teacher, **BLOCKS, **options)


def same(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right
