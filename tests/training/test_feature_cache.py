"""The hook that stores teacher features, and a faulty teacher, in whole runs."""

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tiny_runs import HGKD, tiny_hgkd, write_images

from hgkd.cli import train as train_command
from hgkd.teachers.cache import store_bytes
from hgkd.training.hooks.feature_cache import TeacherCacheHook

SIZES: dict[str, Any] = {"depth": 2, "embed_dim": 32, "num_heads": 2}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = write_images(tmp_path_factory.mktemp("images"))
    return root


def arguments(images: Path, folder: Path, **options: Any) -> list[str]:
    options = tiny_hgkd(images, val_train_root=None, val_test_root=None, **options)
    return [str(HGKD), "--work-dir", str(folder / "run"), "--cfg-options", *(f"{k}={v}" for k, v in options.items())]


def overflowing(folder: Path) -> str:
    """A file of finite weights whose last block leaves float16's range."""
    weights = timm.create_model("vit_tiny_patch16_224", num_classes=0, **SIZES).state_dict()
    for key in ("blocks.1.mlp.fc2.weight", "blocks.1.mlp.fc2.bias"):
        weights[key].fill_(3e4)
    torch.save(weights, folder / "teacher.pth")
    return str(folder / "teacher.pth")


def test_no_folder_stores_nothing() -> None:
    hook = TeacherCacheHook(None)
    hook.before_train(None)  # type: ignore[arg-type]  # not even looked at
    assert hook.planned(None) == "not stored"  # type: ignore[arg-type]


def test_the_size_is_said_by_a_dry_run_and_in_the_log(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(images, tmp_path, teacher_features=tmp_path / "features", epochs=1, warmup_epochs=0)
    assert train_command.main([*given, "--dry-run"]) == 0
    said = re.search(r"teacher's features +(\S+ \S+) for 16 images in (\S+); .* free", capsys.readouterr().out)
    assert said is not None
    assert said[2] == str(tmp_path / "features")
    assert not (tmp_path / "features").exists()
    logged: list[str] = []
    monkeypatch.setattr("hgkd.teachers.cache.print_log", lambda text, *_: logged.append(text))
    assert train_command.main(given) == 0
    assert f"features of 16 images take {said[1]} in" in logged[0]
    files = sum(file.stat().st_size for file in (tmp_path / "features").glob("*.npy"))
    assert files == store_bytes(16, 1, 32, (4, 4)) + 2 * 128


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
@pytest.mark.parametrize("stored", [True, False])
def test_a_teacher_that_overflows_ends_a_run_before_its_first_step(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], stored: bool
) -> None:
    options = {"model.teacher.dtype": "float16", "teacher_checkpoint": overflowing(tmp_path)}
    given = arguments(images, tmp_path, teacher_features=tmp_path / "features", **options)
    if not stored:
        given[0] = str(HGKD.with_name("hgkd_vit-s14_resnet18_20e_imagenet-sample224.py"))
        given = [part for part in given if not part.startswith(("teacher_features", "model.objectives.pooled"))]
    assert train_command.main([*given, *more]) == 2
    error = capsys.readouterr().err
    assert "block 1 (blocks.1.mlp.fc2) gives inf in float16 on the first images" in error
    assert "dtype=bfloat16" in error
    assert "teacher_features" not in error
    assert not list(tmp_path.glob("run/*.pth"))
    for sums in (tmp_path / "features").glob("*.sums.npy"):
        assert not any(sums.read_bytes()[128:]), "nothing of it is stored"


@pytest.mark.parametrize(("kind", "step"), [("train", "RandomResizedCrop"), ("augment", "_TimmAugmentation")])
def test_random_crops_are_refused_by_a_dry_run_too(
    kind: str, step: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transform = {"train_dataloader.dataset.transform.kind": kind}
    given = arguments(images, tmp_path, teacher_features=tmp_path / "features", **transform)
    for more in ([], ["--dry-run"]):
        assert train_command.main([*given, *more]) == 2
        error = capsys.readouterr().err
        assert "needs pictures that are the same in every epoch" in error
        assert step in error
