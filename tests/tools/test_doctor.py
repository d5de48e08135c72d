"""hgkd doctor on files made here."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from teaching import ARCH

from hgkd.cli import doctor
from hgkd.distillers import MAEPretraining, MaskedDistiller
from hgkd.errors import WeightsError
from hgkd.teachers import TimmTeacher

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
    assert found.targets["DMAE"].startswith("no: a BEiT teacher")
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


def answers(found: doctor.Finding) -> set[str]:
    return {answer.partition(":")[0] for answer in found.targets.values()}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_base_patch16_rpn_224"])
def test_a_file_that_a_teacher_takes_is_told_so_and_is_taken(tmp_path: Path, name: str) -> None:
    file = saved(tmp_path, name, img_size=64)
    found = doctor.examine_teacher(file)
    assert [found.targets[target] for target in ("HGKD target='full'", "MGD", "DMAE", "AttentionMask")] == ["yes"] * 4
    sizes = {key: value for key, value in SIZES.items() if key != "num_classes"}
    TimmTeacher(name, checkpoint=file, allow_random=True, img_size=64, **sizes)


def test_a_file_that_no_teacher_takes_is_told_so_for_every_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {"relative": ("vit_relpos_small_patch16_224", {}), "six": ("vit_tiny_patch16_224", {"in_chans": 6})}
    file = saved(tmp_path, kinds["six"][0], **kinds["six"][1])
    found = doctor.examine_teacher(file)
    assert answers(found) == {"no"}
    assert found.health is None
    assert "channels of" in found.targets["MGD"]
    assert doctor.main(["teacher", file]) == 1
    assert "not judged" in capsys.readouterr().out
    assert doctor.main(["teacher", saved(tmp_path, kinds["relative"][0])]) == 2
    assert "looks like a ViT with relative positions" in capsys.readouterr().err


def test_half_a_model_in_several_files_serves_nothing(tmp_path: Path) -> None:
    weights = timm.create_model("vit_tiny_patch16_224", **SIZES).state_dict()
    part = {key: value for key, value in weights.items() if "blocks.0.mlp" not in key}
    save_file(part, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(WeightsError, match="this is part 2 of 2; give the index file"):
        doctor.examine_teacher(str(tmp_path / "model-00002-of-00002.safetensors"))


@pytest.mark.parametrize("kind", ["hiera_tiny_224", "swin_tiny_patch4_window7_224"])
def test_other_families_end_in_their_name(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(timm.create_model(kind, num_classes=0).state_dict(), tmp_path / "vit.pth")
    assert doctor.main(["teacher", str(tmp_path / "vit.pth")]) == 2
    assert "looks like " + {"h": "Hiera", "s": "a Swin"}[kind[0]] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "kwargs", "attention"),
    [
        ("vit_small_patch16_dinov3", {}, "yes"),
        ("vit_pe_core_tiny_patch16_384", {"img_size": 64}, "yes"),
        ("eva02_tiny_patch14_224", {"img_size": 56}, "yes"),
        ("aimv2_large_patch14_224", {"img_size": 56}, "yes"),
    ],
)
def test_a_rotary_vit_s_file_needs_no_name(tmp_path: Path, name: str, kwargs: dict[str, Any], attention: str) -> None:
    found = doctor.examine_teacher(saved(tmp_path, name, **kwargs))
    given = [found.targets[target] for target in ("HGKD target='full'", "MGD", "DMAE", "AttentionMask")]
    assert given == ["yes", "yes", "yes", attention]
    assert found.health is not None
    assert found.health.looks_random


def test_a_hierarchical_teacher_s_file_is_examined_by_its_name(tmp_path: Path, images: Path) -> None:
    torch.save(timm.create_model("convnext_atto", num_classes=3).state_dict(), tmp_path / "a.pth")
    found = doctor.examine_teacher(str(tmp_path / "a.pth"), "convnext_atto", str(images), image_size=64)
    assert "3 (stride 32, 320 channels)" in found.kind
    assert found.targets["MGD"] == "yes"
    assert "sees whole images alone" in found.targets["DMAE"]
    assert "RandomMask" in found.targets["AttentionMask"]
    assert found.health is not None
    assert found.health.looks_random
    assert found.features is not None
    found = doctor.examine_teacher(str(tmp_path / "a.pth"), "convnext_femto")
    assert (
        "width 40, 4-pixel patches of 3 channels, the network 4 stages of 2, 2, 6, 2 blocks, width 48" in found.targets["MGD"]
    )


def test_the_name_counts_without_images_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "vit.pth"
    torch.save(timm.create_model("vit_tiny_patch16_384", num_classes=0).state_dict(), path)
    assert answers(doctor.examine_teacher(str(path), "vit_tiny_patch16_384")) == {"yes", "no"}  # no decoder
    found = doctor.examine_teacher(str(path), "vit_tiny_patch16_224")
    assert answers(found) == {"no"}
    assert "model.teacher.img_size=384" in found.targets["MGD"]
    assert doctor.main(["teacher", str(path), "--name", "vit_tiny_patch16_24"]) == 2
    assert "did you mean 'vit_tiny_patch16_224'" in capsys.readouterr().err
    found = doctor.examine_teacher(str(path), "vit_small_patch16_dinov3")
    assert "12 blocks, width 192, 16-pixel patches of 3 channels, the network 12 blocks, width 384" in found.targets["MGD"]


def test_parallel_blocks_are_named_where_attention_is_asked_for(tmp_path: Path) -> None:
    file = saved(tmp_path, "vit_small_patch16_18x2_224")
    unnamed = doctor.examine_teacher(file)
    assert "give its name with --name" in unnamed.targets["MGD"]
    torch.save(timm.create_model("vit_pwee_patch16_reg1_gap_256", num_classes=0).state_dict(), file)
    found = doctor.examine_teacher(file, "vit_pwee_patch16_reg1_gap_256")
    assert found.targets["MGD"] == found.targets["DMAE"] == "yes"
    assert "ParallelScalingBlock is not read" in found.targets["AttentionMask"]


def test_one_of_two_sets_of_weights_is_examined_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (timm.create_model("vit_tiny_patch16_224", **SIZES).state_dict() for _ in range(2))
    second["blocks.0.mlp.fc1.weight"] *= torch.linspace(0, 9, 32)
    torch.save({"state_dict": first, "state_dict_ema": second}, tmp_path / "both.pth")
    file, out = str(tmp_path / "both.pth"), str(tmp_path / "ema.safetensors")
    assert doctor.main(["extract", file, "state_dict_ema", out]) == 0
    assert f"tensors of 'state_dict_ema' written to {out}" in capsys.readouterr().out
    written = load_file(out)
    assert set(written) == set(second)
    assert all(torch.equal(value, second[key]) for key, value in written.items())
    scores = [doctor.examine_teacher(file, entry=entry).health for entry in (None, "state_dict_ema")]
    assert scores[1] == doctor.examine_teacher(out).health != scores[0]
    for wrong, message in (
        ((file, "ema", out), "exists already"),
        ((file, "ema", str(tmp_path / "a.safetensors")), "no entry"),
    ):
        assert doctor.main(["extract", *wrong]) == 2
        assert message in capsys.readouterr().err
    assert doctor.main(["extract", file, "state_dict", str(tmp_path / "a.pth")]) == 2
    assert "must end in .safetensors" in capsys.readouterr().err
