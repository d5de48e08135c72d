"""Recipes of every method train through the launcher, at toy size, and what they leave behind serves."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hgkd.api import train as train_tool
from hgkd.distillers import MAEPretraining
from hgkd.evaluation import load_extractor

ROOT = Path(__file__).parents[2]

VIT = dict(embed_dim=32, depth=12, num_heads=2, decoder_embed_dim=16, decoder_depth=4, decoder_num_heads=2)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for c, name in enumerate(("a", "b")):
        (root / name).mkdir()
        for i in range(4):
            pixels = rng.integers(0, 120, (64, 64, 3), dtype=np.uint8) + np.uint8(100 * c)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def run(recipe, images, work_dir, **options):
    mae = MAEPretraining(VIT, 64).save_teacher(work_dir / "mae.safetensors")
    folders = {key: str(images) for key in ("data_root", "val_train_root", "val_test_root")}
    teacher = {"model.teacher.allow_random": True}
    if "_mae-" in recipe:
        teacher["teacher_checkpoint"] = str(mae)
    else:
        teacher |= {f"model.teacher.{key}": VIT[key] for key in ("embed_dim", "depth", "num_heads")}
    student = {"model.student.arch": {**VIT, "_delete_": True}} if "_vit-ti16_" in recipe else {"student": "test_resnet"}
    small = {"image_size": 64, "batch_size": 4, "workers": 0, "epochs": 1, "warmup_epochs": 0}
    options = {**folders, **small, **teacher, **student, "default_hooks.logger.interval": 1, **options}
    runner = train_tool.train(ROOT / "configs" / recipe, work_dir / "run", options=options)
    (scalars,) = (work_dir / "run").glob("*/vis_data/scalars.json")
    return runner, [json.loads(line) for line in scalars.read_text().splitlines()]


@pytest.mark.parametrize(
    ("recipe", "terms"),
    [
        ("dmae/dmae_vit-s14_vit-ti16_10e_cifar128.py", {"dmae_align_8_loss", "pixels_reconstruction_loss"}),
        ("g2sd/g2sd_mae-ti16_vit-ti16_10e_cifar128.py", {"g2sd_decoder_loss"}),
    ],
)
def test_a_vit_student_trains_and_its_checkpoint_is_a_mae(recipe, terms, images, tmp_path):
    runner, lines = run(recipe, images, tmp_path)
    assert terms <= set(lines[0])
    assert "knn/top1" in lines[-1]
    assert (tmp_path / "run/pictures/epoch_1.png").is_file()
    extractor = load_extractor(tmp_path / "run/epoch_1.pth", block=11)
    batch = torch.rand(2, 3, 64, 64)
    student = runner.model.student.eval()
    last = student(batch).features[-1].to_dense().mean((2, 3))
    torch.testing.assert_close(extractor(batch), last, rtol=1e-4, atol=1e-5)


def test_a_mix_logs_what_each_term_does(images, tmp_path):
    options = {"teacher_features": str(tmp_path / "features"), "model.student.decoder_width": 32}
    _, lines = run("hgkd/hgkd-mix_vit-s14_resnet18_10e_cifar128.py", images, tmp_path, **options)
    shares = {key: value for key, value in lines[0].items() if key.endswith("_share") and key != "teacher_share"}
    assert len(shares) == 7
    assert sum(shares.values()) == pytest.approx(1.0, abs=1e-4)
    assert all(f"{key.removesuffix('_share')}_vs_mean" in lines[0] for key in shares)
