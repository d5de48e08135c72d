"""tools/doctor.py on files made here."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from teaching import ARCH

from hgkd.distillers import MAEPretraining, MaskedDistiller

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import doctor

SIZES: dict[str, Any] = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 0}


def mae(folder: Path) -> str:
    return str(MAEPretraining(ARCH, 64).save_teacher(folder / "mae.safetensors"))


def saved(folder: Path, name: str, **kwargs: Any) -> str:
    path = folder / "vit.pth"
    torch.save(timm.create_model(name, **SIZES, **kwargs).state_dict(), path)
    return str(path)


def test_a_mae_with_its_decoder(tmp_path: Path) -> None:
    found = doctor.examine_teacher(mae(tmp_path))
    assert found.kind == "timm, a MAE with its decoder"
    assert (found.width, found.depth, found.patch_size, found.grid, found.decoder) == (16, 3, 16, (4, 4), (1, 16))
    assert set(found.targets.values()) == {"yes"}
    assert found.health.looks_random
    assert found.features is None


def test_an_encoder_alone(tmp_path: Path) -> None:
    found = doctor.examine_teacher(saved(tmp_path, "vit_small_patch14_reg4_dinov2", img_size=56))
    assert (found.depth, found.patch_size, found.grid, found.decoder, found.prefix_tokens) == (2, 14, (4, 4), None, 5)
    refused = {target for target, answer in found.targets.items() if answer.startswith("no: the file has no decoder")}
    assert refused == {"HGKD target='inferred'", "G2SD"}


def test_beit(tmp_path: Path) -> None:
    found = doctor.examine_teacher(saved(tmp_path, "beit_base_patch16_224", img_size=64))
    assert found.grid is None
    assert found.targets["DMAE"].startswith("no: BEiT")
    assert found.targets["MGD"] == "yes"


def test_a_distilled_vit(tmp_path: Path) -> None:
    model = MaskedDistiller(
        dict(type="MaskedViT", arch=ARCH), dict(p=dict(type="PixelReconstruction")), dict(type="RandomMask"), 64
    )
    torch.save({"state_dict": model.state_dict(), "meta": {"hgkd": model.meta()}}, tmp_path / "epoch_1.pth")
    found = doctor.examine_teacher(str(tmp_path / "epoch_1.pth"))
    assert (found.kind, found.depth, found.decoder) == ("distilled ViT of hgkd", 3, (1, 16))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, colour in {"red": (230, 30, 30), "blue": (30, 30, 230)}.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(5):
            pixels = np.clip(np.array(colour) + rng.normal(0, 10, (64, 64, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def test_features_on_images(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = doctor.examine_teacher(mae(tmp_path), images=str(images), image_size=64)
    assert found.features is not None
    assert found.features.knn is not None
    assert found.features.knn >= 80.0  # colours are told apart even by a random network
    assert 1.0 <= found.features.rank <= 9.0
    unlabelled = doctor.examine_teacher(str(tmp_path / "mae.safetensors"), images=str(images / "red"), image_size=64, limit=3)
    assert unlabelled.features is not None
    assert unlabelled.features.knn is None
    assert doctor.main(["teacher", str(tmp_path / "mae.safetensors"), "--images", str(images), "--image-size", "64"]) == 1
    printed = capsys.readouterr().out
    assert "looks random" in printed
    assert "directions" in printed


def test_what_is_wrong_is_said(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved(tmp_path, "vit_tiny_patch16_224", img_size=64)
    assert doctor.main(["teacher", file, "--images", str(images)]) == 2
    assert "give --name, timm's name of" in capsys.readouterr().err
    assert doctor.main(["teacher", str(tmp_path / "none.pth")]) == 2
    assert "does not exist" in capsys.readouterr().err
    torch.save({"layer1.0.conv1.weight": torch.ones(1)}, tmp_path / "resnet.pth")
    assert doctor.main(["teacher", str(tmp_path / "resnet.pth")]) == 2
    assert "no ViT in a known naming" in capsys.readouterr().err


def test_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["environment", "--work-dir", str(tmp_path / "work")]) == 0
    assert "torch" in capsys.readouterr().out
    assert doctor.main(["environment", "--work-dir", str(tmp_path), "--images", str(tmp_path / "none")]) == 1
    printed = capsys.readouterr().out
    assert "failure" in printed
    assert "fix:" in printed
